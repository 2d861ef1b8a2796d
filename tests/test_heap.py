"""Memory that is freed: kept for the next allocation, and given back when asked; each in a process of its own."""

import json
import subprocess
import sys

import pytest

from pixart import cli, cpu
from runs import ROOT

PROBE = """
import json, resource, torch
from pixart.benchmark.measure import resident
from pixart.cpu import give_memory_back, keep_freed_memory
if KEEP:
    assert keep_freed_memory()

def use():
    return [torch.ones(10 << 20) for _ in range(3)]  # 40 MB each, past what glibc ever keeps by itself

for _ in range(2):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
freed = resident("VmRSS")
give_memory_back()
print(json.dumps([pages, freed - resident("VmRSS")]))
"""
# a C library that gives memory back, in a process or on a system of another kind, has nothing to show here
pytestmark = pytest.mark.skipif(cpu._glibc() is None, reason="the C library is not glibc")


def probe(keep: bool) -> tuple[int, int]:
    """Pages that five repetitions of the same work touched anew, and bytes that `give_memory_back` returned."""
    done = subprocess.run(
        [sys.executable, "-c", f"KEEP = {keep}\n{PROBE}"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return tuple(json.loads(done.stdout))


def test_kept_memory_is_not_paged_in_again_until_it_is_given_back():
    pages, returned = probe(keep=True)
    assert pages < 50_000  # of 153,600, and mostly 0: where blocks begin differs from run to run
    assert returned > 100e6


def test_without_asking_the_same_work_touches_its_pages_again_and_again():
    # the claim that `keep_freed_memory` rests on; should a C library stop doing so, it can go
    pages, returned = probe(keep=False)
    assert pages > 100_000
    assert returned < 20e6


@pytest.mark.parametrize("keep", [True, False])
def test_scripts_keep_their_memory_unless_they_say_otherwise(monkeypatch, keep):
    asked = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: asked.append(True))
    with pytest.raises(SystemExit):
        cli.run(lambda: 0, keep_memory=keep)
    assert asked == [True] * keep


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cpu.keep_freed_memory() is False
    cpu.give_memory_back()
