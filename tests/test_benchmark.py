"""The benchmark compares programs that do the same work, and prints what it measured."""

import json
import math
import sys
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from pixart import cli
from pixart.benchmark import beside
from pixart.benchmark.cases import CASES
from pixart.benchmark.measure import Case, Result, Settings, count_flops, largest_batch, measure
from pixart.benchmark.networks import call_diffusers, native, network_in_diffusers, network_inputs, random_network
from pixart.benchmark.report import compare, median_interval, paired_ratios, table, write_json
from pixart.benchmark.run import _fits, run
from pixart.cpu import use_onednn
from pixart.errors import InputError
from pixart.model.flops import forward_flops
from pixart.train.state import TrainState
from runs import ROOT, run_command
from toy import relative

SMALL = Settings(
    preset="S/2", height=32, width=32, tokens=7, rounds=1, text_width=64, text_layers=1, memory=False,
    config=str(ROOT / "configs" / "openmoji.yaml"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr("pixart.benchmark.measure.SIDES", {"cpu": 64})


def test_both_networks_have_the_same_tensors_in_memory_and_the_same_output():
    pytest.importorskip("diffusers")
    model = random_network(SMALL, native(SMALL)).eval()
    network = network_in_diffusers(model).eval()
    theirs = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    assert theirs <= {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    inputs = network_inputs(model, SMALL)
    with torch.no_grad():
        assert relative(call_diffusers(network, **inputs), model(**inputs)) <= 1e-6


@pytest.mark.parametrize("name", ["decode", "encode"])
def test_both_autoencoders_do_the_same(name):
    pytest.importorskip("diffusers")
    programs = CASES[name](SMALL).programs
    outputs = {program: make()() for program, make in programs.items()}
    assert set(outputs) == {"ours", "ours-channels-last", "diffusers"}
    for output in outputs.values():
        assert relative(output, outputs["ours"]) <= 1e-5


def test_attention_without_padding_is_that_under_a_mask():
    settings = replace(SMALL, height=64, width=64, batch=4, tokens=30, programs=("nested",))
    programs = {name: make()() for name, make in CASES["cross"](settings).programs.items()}
    assert set(programs) == {"ours", "padded to 120", "no mask", "one by one", "nested"}
    ours = programs["ours"]
    assert relative(programs["padded to 120"], ours) <= 1e-6
    assert relative(programs["one by one"], ours) <= 1e-6
    assert relative(programs["nested"].view(4, 16, 6, 64).transpose(1, 2), ours) <= 1e-6
    assert relative(programs["no mask"], ours) > 1e-2


def test_padding_the_heads_does_not_change_attention():
    programs = CASES["attention"](replace(SMALL, height=64, width=64)).programs
    assert relative(programs["heads of 128"]()(), programs["ours"]()()) <= 1e-6


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sample", "pipeline", "train", "lora", "lora-sample")]


def test_compiled_programs_of_sampling_are_made_with_any_number_of_tokens():
    settings = replace(SMALL, programs=("ours-compiled", "ours-reduce-overhead"))
    programs = CASES["lcm"](settings).programs
    for name in settings.programs:
        assert callable(programs[name]())


QUICK = ["forward", "backward", "attention", "cross", "optimizer", "lcm", "text", "load", "lora-load"]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_every_case_runs_every_program(name):
    found = measure(CASES[name](SMALL), SMALL)
    assert found[0].program == "ours"
    assert len(found) > 1
    for result in found:
        assert len(result.seconds) == 1
        assert result.median > 0
        assert result.flops > 0 or result.bytes > 0
        assert result.program in table(found)


@pytest.mark.slow
def test_a_lora_trains_its_own_layers_and_the_step_without_an_update_trains_nothing():
    def step(name):
        call = CASES["lora"](SMALL).programs[name]()
        state = call.__closure__[-1].cell_contents
        assert isinstance(state, TrainState)
        before = {key: value.detach().clone() for key, value in state.parts.training.named_parameters()}
        call()
        now = state.parts.training.named_parameters()
        return {key.split(".")[0] for key, value in now if not torch.equal(value, before[key])}

    assert step("ours") == {"adapter"}
    assert step("all weights") == {"network"}
    assert step("all weights, no update") == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["page", "page-pixels"])
def test_the_page_is_measured_beside_the_same_call(name):
    pytest.importorskip("gradio", reason="the page; extra: app")
    ours, page = measure(CASES[name](SMALL), SMALL)  # the call fails unless the page says "done"
    assert (ours.program, page.program) == ("ours", "through the page")
    assert page.median > 0
    assert page.cpu_seconds[0] > 0


def test_sampling_with_an_adapter_is_the_same_merged_and_beside_the_weights():
    programs = {name: make() for name, make in CASES["lora-sample"](SMALL).programs.items()}
    ours, merged, beside = (torch.stack(list(programs[name]())) for name in ("ours", "merged", "not merged"))
    assert relative(merged, beside) < 1e-4 < 1e-2 < relative(merged, ours)


def test_loading_an_adapter_is_measured_on_the_network_that_it_was_made_for():
    calls = [make() for make in CASES["lora-load"](SMALL).programs.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # another base
        for call in [*calls, *calls]:
            call()


def test_ours_is_the_network_of_the_commands_and_ours_torch_that_of_python():
    programs = CASES["forward"](replace(SMALL, programs=("ours", "ours-torch"))).programs
    model = random_network(SMALL, native(SMALL)).eval()
    with torch.no_grad():
        plain = model(**network_inputs(model, SMALL))
        use_onednn(model)
        onednn = model(**network_inputs(model, SMALL))
    assert torch.equal(programs["ours-torch"]()(), plain)
    assert torch.equal(programs["ours"]()(), onednn)


@pytest.mark.slow
def test_ours_trains_with_both_products():
    settings = replace(SMALL, programs=("ours", "ours-torch"))
    found = {result.program: result for result in measure(CASES["train"](settings), settings)}
    assert found["ours"].flops == found["ours-torch"].flops > 0


STAND_IN = """
import os, sys, time
def note(text):
    with open("log.txt", "a") as log:
        print(text, file=log)
print("ready", flush=True)
for _ in sys.stdin:
    note(os.environ.get("OMP_WAIT_POLICY"))
    time.sleep(0.5)
    note("end")
    print("done", flush=True)
"""


def test_trainings_beside_each_other_run_at_the_same_time_with_the_right_waiting_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(beside, "COMMAND", (sys.executable, "-c", STAND_IN))
    found = {}
    for name, make in CASES["beside"](SMALL).programs.items():
        make()()
        found[name] = (tmp_path / "log.txt").read_text().split()
        (tmp_path / "log.txt").unlink()
    assert found == {
        "alone, sleeping": ["PASSIVE", "end"],
        "beside another, sleeping": ["PASSIVE", "PASSIVE", "end", "end"],
        "alone, spinning": ["None", "end"],
        "beside another, spinning": ["None", "None", "end", "end"],
    }


@pytest.mark.parametrize(("body", "match"), [("", "before it was ready"), ("print('ready')", "before it was done")])
def test_a_training_that_ends_early_fails_the_case(monkeypatch, body, match):
    monkeypatch.setattr(beside, "COMMAND", (sys.executable, "-c", body))
    with pytest.raises(InputError, match=match):
        measure(CASES["beside"](SMALL), SMALL)


@pytest.mark.slow
def test_two_trainings_run_beside_each_other(tmp_path, monkeypatch):
    (tmp_path / "x.yaml").write_text(LATENTS)
    monkeypatch.setattr(beside, "STEPS", 2)
    settings = replace(SMALL, config=str(tmp_path / "x.yaml"), batch=3, memory=True)
    settings = replace(settings, programs=("beside another, sleeping",))
    text = run(["beside"], settings)
    assert f"2 steps of {tmp_path / 'x.yaml'}" in text.splitlines()[-1]


@pytest.mark.slow
def test_the_plain_loop_learns_what_we_learn():
    # the same step in the optimizer's terms: from one batch, both losses fall
    pytest.importorskip("diffusers")
    call = CASES["train"](SMALL).programs["plain loop"]()
    losses = [call().item() for _ in range(4)]
    assert losses[-1] < losses[0]


LATENTS = """
output: x
data: {folder: x, resolution: 64}
vae: {kind: kl, source: x}
model: {hidden_size: 96, depth: 2, num_heads: 4, caption_channels: 32, caption_length: 12, latent_size: 8,
  micro_conditions: true}
text: {length: 12}
train: {steps: 9, batch_size: 64, accumulation: 2, mixed_precision: bf16, gradient_checkpointing: true}
"""


def test_both_training_loops_take_the_same_first_step_on_latents_in_bf16(tmp_path):
    # a large model's settings: learned variance, micro-conditions, checkpointing, and a batch that one device holds
    pytest.importorskip("diffusers")
    (tmp_path / "x.yaml").write_text(LATENTS)
    settings = replace(SMALL, config=str(tmp_path / "x.yaml"), batch=3)
    case = CASES["train"](settings)
    assert (case.images, case.dtype) == (3, torch.bfloat16)
    found = {result.program: result for result in measure(case, settings)}
    assert set(found) == {"ours", "plain loop"}
    assert math.isclose(found["ours"].flops, found["plain loop"].flops, rel_tol=0.02)
    assert 0 < float(case.programs["plain loop"]()()) < 10
    (tmp_path / "x.yaml").write_text(LATENTS.replace("bf16", "fp16"))
    with pytest.raises(InputError, match=r"expected train\.mixed_precision bf16 or no, got fp16"):
        CASES["train"](settings)


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (2, 2), (3, 3), (5, 4), (6, 6), (100, 96)])
def test_the_largest_batch_is_one_that_fits(limit, expected):
    assert largest_batch(lambda size: size <= limit) == expected


def test_a_batch_that_does_not_fit_is_recognised(monkeypatch):
    held = []

    def case(settings):
        def call():
            held.append(settings.images)
            if settings.images > 4:
                raise torch.OutOfMemoryError("full")

        return Case("forward", {"ours": lambda: call, "other": lambda: call}, steps=2)

    monkeypatch.setitem(CASES, "forward", case)
    settings = replace(SMALL, programs=("ours",))
    assert largest_batch(lambda batch: _fits("forward", settings, batch)) == 4
    assert held == [1, 1, 2, 2, 4, 4, 8, 6]
    with pytest.raises(InputError, match="not even one image"):
        largest_batch(lambda batch: False)


def test_the_flops_of_a_forward_are_those_of_the_formula():
    case = CASES["forward"](SMALL)
    assert count_flops(case.programs["ours"]()) == forward_flops(native(SMALL), 4, 4, 7, batch=2)


def test_programs_are_interleaved_and_the_first_calls_are_not_counted():
    order = []
    case = Case("x", {name: lambda name=name: lambda: order.append(name) for name in "ab"})
    results = measure(case, replace(SMALL, rounds=3))
    assert order == [*"ab", *"ab", *"ba", *"ab"]  # in turn, and back in every other round
    assert [len(result.seconds) for result in results] == [3, 3]


def test_a_program_that_runs_out_of_memory_leaves_the_others_measured(tmp_path):
    def full():
        raise torch.OutOfMemoryError("full")

    case = Case("forward", {"ours": lambda: lambda: None, "other": lambda: full, "third": lambda: full()})
    results = measure(case, SMALL)
    assert [len(r.seconds) for r in results] == [1, 0, 0]
    text = table(results)
    assert "| forward | other | does not fit the device's memory |" in text
    write_json(results, tmp_path / "x.json")
    assert [row["program"] for row in json.loads((tmp_path / "x.json").read_text())["results"]] == ["ours"]


def test_a_peak_that_cannot_be_measured_is_a_note_beside_the_times(monkeypatch):
    def fail(*_):
        raise InputError("its memory could not be measured")

    monkeypatch.setattr("pixart.benchmark.run.measure_memory", fail)
    text = run(["attention"], replace(SMALL, memory=True, programs=("ours",)))
    assert "heads of 64; its memory could not be measured" in text


def test_compiled_programs_are_called_three_times_before_timing():
    calls = []
    case = Case("x", {"ours-compiled": lambda: lambda: calls.append(0)})
    measure(case, SMALL)
    assert len(calls) == 1 + 2 + SMALL.rounds


def test_sizes_whose_conditions_diffusers_leaves_out_are_measured_without_it():
    programs = CASES["lcm"](replace(SMALL, preset="alpha-1024", height=64, width=64)).programs
    assert list(programs) == ["ours"]


def result(program: str, seconds: list[float], **changes) -> Result:
    return Result(
        "forward",
        program,
        seconds,
        1.0,
        10**9,
        2,
        0,
        rates={"slow": 5e9, "fast": 1e10},
        settings=asdict(SMALL),
        **changes,
    )


def test_the_table_says_how_many_times_as_fast_ours_is():
    text = table([result("ours", [0.2, 0.1, 0.4]), result("diffusers", [0.5])])
    ours, theirs = (line.split(" | ") for line in text.splitlines()[2:4])
    assert ours[2:5] == ["200.0 ms", "100.0 ms … 400.0 ms", ""]
    assert ours[6:8] == ["5", "50%"]
    assert theirs[4] == "2.50 ×"


def test_ratios_are_paired_by_round_and_have_an_interval():
    """The load doubles from round to round: the medians of the times say nothing, the pairs do."""
    load = [2.0**i for i in range(8)]
    ours = result("ours", load, cpu_seconds=[1.0] * 8)
    theirs = result("other", [t * (1 + 0.01 * i) for i, t in enumerate(load)], cpu_seconds=[1.5] * 8)
    (line,) = paired_ratios([ours, theirs])
    assert "other / ours, median ratio of 8 rounds" in line
    assert "time 1.035 (1.000 … 1.070); CPU time 1.500 (1.500 … 1.500)" in line
    assert not paired_ratios([result("ours", load[:5]), result("other", load[:5])])  # too few rounds


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    from scipy.stats import binom

    for n in (6, 9, 20, 51):
        low, high = median_interval(list(range(n, 0, -1)))
        k = int(low)
        assert high == n + 1 - k
        assert 1 - 2 * binom.cdf(k - 1, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(k, n, 0.5)
    assert median_interval([1.0] * 5) is None


def test_compiling_pays_after_so_many_images():
    text = table([result("ours", [0.3]), replace(result("ours-compiled", [0.2]), first=10.2)])
    assert "first call 10.20 s; pays after 100 calls, 200 images" in text
    assert "never pays" in table([result("ours", [0.3]), result("ours-compiled", [0.4])])


def test_an_older_measurement_is_compared_at_equal_sizes(tmp_path):
    old = [result("ours", [0.2]), replace(result("diffusers", [9.0]), images=7)]
    write_json(old, tmp_path / "old.json")
    new = [result("ours", [0.1]), result("diffusers", [1.0])]
    new[0].settings |= {"rounds": 99, "batch": "largest"}
    assert compare(new, tmp_path / "old.json") == "forward, ours: 200.0 ms → 100.0 ms, 2.00 × as fast"
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(InputError, match=r"expected a file that --json wrote"):
        compare(new, tmp_path / "bad.json")
    with pytest.raises(InputError, match="none of its programs ran at the same size"):
        compare(new[1:], tmp_path / "old.json")


def test_a_profile_is_a_trace_and_a_table_of_kernels(tmp_path):
    settings = replace(SMALL, programs=("ours",))
    assert "mkldnn::_linear_pointwise" in run(["forward"], settings, profile_into=str(tmp_path))
    assert json.loads((tmp_path / "forward-ours.json").read_text())["traceEvents"]
    assert "Self CPU time total" in (tmp_path / "forward-ours.txt").read_text()


@pytest.mark.parametrize(
    ("names", "changes", "match"),
    [
        (["fly"], {}, "there is no case 'fly'; there are forward"),
        (["forward"], {"programs": ("theirs",)}, "case forward has no program theirs; there are ours"),
        (["forward"], {"preset": "M/2"}, "unknown preset 'M/2'"),
    ],
)
def test_unknown_cases_programs_and_files_are_refused(names, changes, match):
    with pytest.raises(InputError, match=match):
        run(names, replace(SMALL, **changes))


def test_sizes_are_read_as_height_and_width():
    assert cli.read_size("512") == (512, 512)
    assert cli.read_size("384x672") == (384, 672)
    with pytest.raises(InputError, match="--size 5x"):
        cli.read_size("5x")
    assert [cli.read_batch("4"), cli.read_batch("largest")] == [4, "largest"]
    with pytest.raises(InputError, match="--batch many: expected a number of images, or largest"):
        cli.read_batch("many")
    with pytest.raises(InputError, match="expected positive numbers"):
        Settings(batch=0)
    with pytest.raises(InputError, match="batch largest: expected device cuda"):
        Settings(batch="largest")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="there is no CUDA device here"):
            Settings(device="cuda")


@pytest.mark.slow
def test_the_script_prints_a_table_and_memory_and_writes_json(tmp_path):
    done = run_command(
        "benchmark", "forward", "load", "--preset", "S/2", "--size", "64x32", "--rounds", "1", "--programs", "ours",
        "--json", tmp_path / "x.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| forward | ours |" in done.stdout
    rows = json.loads((tmp_path / "x.json").read_text())["results"]
    weights = 4 * 31e6
    for row in rows:
        assert weights < row["memory"] < 40 * weights
        assert math.isclose(row["median"], row["seconds"][0])
        assert (row["settings"]["height"], row["settings"]["width"]) == (64, 32)
