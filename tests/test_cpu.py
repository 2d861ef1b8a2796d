"""CPU optimisations: oneDNN's products with correct derivatives, threads that sleep, freed memory that is kept."""

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pixart
from pixart import cli, commands, cpu
from pixart.cpu import use_onednn, uses_onednn
from pixart.model import PixArt, PixArtConfig
from pixart.train.distributed import shard, whole_model
from pixart.train.loop import train
from runs import ROOT, build, command, make_pictures, settings, write
from toy import relative, tiny_inputs, tiny_model

needs_both = pytest.mark.skipif(not cpu.BOTH_LIBRARIES, reason="this torch has not both MKL and oneDNN")
needs_glibc = pytest.mark.skipif(cpu._glibc() is None, reason="the C library is not glibc")

# ------------------------------------------------------------------------------------------------ oneDNN's product


def products(call) -> list[str]:
    """Names of the matrix products that a call takes, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    names = [event.name for event in sorted(profiler.events(), key=lambda event: event.time_range.start)]
    return [name for name in names if name in ("aten::addmm", "aten::mm", "mkldnn::_linear_pointwise")]


@needs_both
def test_use_onednn_replaces_every_product_of_the_network_and_can_be_undone():
    model = tiny_model(micro_conditions=True)
    layers, inputs = sum(type(module) is nn.Linear for module in model.modules()), tiny_inputs(model)
    plain = model(**inputs)
    assert not uses_onednn(model)
    assert use_onednn(model) == layers
    assert use_onednn(model) == 0
    assert uses_onednn(model)
    found = products(lambda: model(**inputs))
    assert found.count("mkldnn::_linear_pointwise") == layers
    assert len(found) == layers + 1  # the patch embedding's is no layer's
    assert relative(model(**inputs), plain) <= 2e-6
    assert use_onednn(model, on=False) == layers
    assert not uses_onednn(model)
    assert torch.equal(model(**inputs), plain)


@needs_both
def test_layers_of_a_class_of_their_own_keep_their_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), nn.LazyLinear(4))
    assert use_onednn(model) == 1
    assert [type(layer) for layer in model[1:]] == [Doubled, nn.LazyLinear]
    x = torch.randn(3, 4)
    assert relative(model[1](x), 2 * F.linear(x, model[1].weight, model[1].bias)) <= 1e-6


def test_without_both_libraries_and_off_the_cpu_nothing_changes(monkeypatch):
    with torch.device("meta"):
        assert use_onednn(nn.Linear(4, 4)) == 0
    monkeypatch.setattr(cpu, "BOTH_LIBRARIES", False)
    layer = nn.Linear(4, 4)
    assert use_onednn(layer) == 0
    assert type(layer) is nn.Linear


@needs_both
def test_names_tensors_hooks_copies_and_files_stay_what_they_were():
    model = tiny_model()
    before, calls = model.state_dict(), []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(0))
    use_onednn(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in before.items())
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in ("t_block.1", "final_layer.linear"))
    inputs = tiny_inputs(model)
    expected = model(**inputs)
    assert calls == [0]
    model.blocks[0].mlp.fc1._forward_hooks.clear()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert uses_onednn(twin)
        assert torch.equal(twin(**inputs), expected)


def onednn_linear(*sizes: int) -> nn.Linear:
    layer = nn.Linear(*sizes)
    use_onednn(layer)
    return layer


def test_the_product_is_torchs_with_all_its_derivatives():
    torch.manual_seed(0)
    layer, x = onednn_linear(24, 40), torch.randn(3, 5, 24, requires_grad=True)
    exact = nn.Linear(24, 40).double()
    exact.load_state_dict(layer.state_dict())
    z = x.detach().double().requires_grad_()
    assert relative(layer(x), exact(z)) <= 1e-6

    def derivatives(layer, x):
        first = torch.autograd.grad(layer(x).pow(3).sum(), (x, *layer.parameters()), create_graph=True)
        return first, torch.autograd.grad(first[1].square().sum(), x)

    for ours, theirs in zip(derivatives(layer, x), derivatives(exact, z), strict=True):
        assert all(relative(a, b) <= 1e-6 for a, b in zip(ours, theirs, strict=True))
    tangent = torch.randn_like(x)
    _, ours = torch.func.jvp(layer, (x.detach(),), (tangent,))
    assert relative(ours, F.linear(tangent, layer.weight)) <= 1e-6
    _, of_weight = torch.func.jvp(
        lambda weight, bias: torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x.detach(),)),
        (layer.weight.detach(), layer.bias.detach()),
        (torch.ones(40, 24), torch.full((40,), 2.0)),
    )
    assert relative(of_weight, x.detach().sum(-1, keepdim=True).expand(3, 5, 40) + 2) <= 1e-5


def test_gradients_of_every_sample_apart_are_those_of_the_samples():
    layer, x = onednn_linear(24, 40), torch.randn(3, 24)

    def loss(weights, row):
        return torch.func.functional_call(layer, weights, (row[None],)).square().sum()

    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i, row in enumerate(x):
        for name, gradient in torch.func.grad(loss)(weights, row).items():
            assert relative(found[name][i], gradient) <= 1e-6


def test_the_product_respects_autocast_and_other_dtypes():
    layer, x = onednn_linear(24, 40), torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.slow
def test_xl2_is_within_1e_6_of_diffusers_by_torchs_product_and_within_2e_6_by_onednns():
    pytest.importorskip("diffusers")
    from pixart.benchmark.measure import Settings
    from pixart.benchmark.networks import call_diffusers, network_in_diffusers, network_inputs, random_network

    settings = Settings(preset="alpha-256", batch=1, tokens=20)
    model = random_network(settings).eval()
    inputs = network_inputs(model, settings)
    with torch.no_grad():
        expected = call_diffusers(network_in_diffusers(model).eval(), **inputs)
        assert relative(model(**inputs), expected) <= 1e-6
        use_onednn(model)
        assert relative(model(**inputs), expected) <= 2e-6


def test_python_uses_torchs_product_by_default():
    assert pixart.use_onednn is use_onednn
    assert not uses_onednn(PixArt(PixArtConfig(hidden_size=48, num_heads=4, depth=1)))


# ------------------------------------------------------------------------------------------ commands take the product


@pytest.fixture
def base(tmp_path, text_encoder) -> dict:
    return settings(tmp_path / "run", make_pictures(tmp_path / "pictures"), text_encoder)


def starts(run: Path) -> list[bool]:
    return [json.loads(line)["onednn"] for line in (run / "history.jsonl").read_text().splitlines()]


def call(name: str, *arguments) -> None:
    parsed = commands.make_parser(name).parse_intermixed_args(list(map(str, arguments)))
    commands.load(name).main(parsed)


@needs_both
def test_a_run_records_its_product_and_reports_a_change_when_it_resumes(base, capsys):
    result = train(build(base, train__steps=1), onednn=True)
    assert result.onednn
    record = torch.load(result.run / "checkpoints" / "step_00000001" / "training.pt", weights_only=True)
    assert record["onednn"] is True
    train(build(base, train__steps=2), onednn=True)
    assert "matrix product" not in capsys.readouterr().out
    assert not train(build(base, train__steps=3)).onednn
    text = (
        "written with oneDNN's matrix product, resumed with torch's: results are equal up to rounding, not bit for bit"
    )
    assert text in capsys.readouterr().out
    assert starts(result.run) == [True, True, False]


@needs_both
def test_the_training_command_uses_onednn_by_default(base, tmp_path, monkeypatch):
    config = write(tmp_path / "config.yaml", base, train__steps=1)
    for name, options in (("a", []), ("b", ["--no-onednn"])):
        call("train", config, *options, f"output={tmp_path / name}")
    assert starts(tmp_path / "a") == [True]
    assert starts(tmp_path / "b") == [False]


@needs_both
def test_a_sharded_network_multiplies_by_onednn_and_so_does_its_copy_put_together_again():
    model, inputs = tiny_model(), tiny_inputs(tiny_model())
    layers = use_onednn(model)
    expected = model(**inputs)
    try:
        shard(model, torch.device("cpu"))
        found = products(lambda: model(**inputs))
        assert found.count("mkldnn::_linear_pointwise") == layers
        assert torch.equal(model(**inputs), expected)
        together = whole_model(model, main=True)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(together(**inputs), expected)
    assert use_onednn(together) == 0 and uses_onednn(together)


@needs_both
def test_without_onednn_the_command_samples_what_python_does_bit_for_bit(base, tmp_path, monkeypatch):
    run = train(build(base, train__steps=1)).run
    found = []

    def sample(pipeline, prompts, *_, **__):
        found.append((uses_onednn(pipeline.model), pipeline(prompts, 0, output="latent")))
        return []

    monkeypatch.setattr("pixart.inference.generate.save_samples", sample)
    for options in ([], ["--no-onednn"]):
        call("sample", "a red square", "--model", run, "--device", "cpu", *options)
    assert [onednn for onednn, _ in found] == [True, False]
    assert torch.equal(found[1][1], pixart.Pipeline.from_pretrained(run)(["a red square"], 0, output="latent"))


# ------------------------------------------------------------------------------------------------- threads that wait


@pytest.mark.parametrize(("given", "expected"), [({}, "0"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000")])
def test_threads_of_a_command_sleep_while_they_wait_unless_the_environment_says_otherwise(given, expected):
    # libgomp itself says what it read when it was loaded
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {**given, "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(command("describe", "/nowhere"), env=environment, capture_output=True, text=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch's OpenMP is not libgomp")
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr


# ------------------------------------------------------------------------------------------- memory that is freed

PROBE = """
import json, resource, torch
from pixart.device import resident
from pixart.cpu import give_memory_back, keep_freed_memory
if KEEP:
    assert keep_freed_memory()

def use():
    return [torch.ones(10 << 20) for _ in range(3)]  # 40 MB each, past what glibc ever keeps by itself

for _ in range(20):  # until the heap has room for all of it at once: how soon hangs on where blocks begin
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
freed = resident("VmRSS")
give_memory_back()
print(json.dumps([pages, freed - resident("VmRSS")]))
"""


def probe(keep: bool) -> tuple[int, int]:
    """Pages that five repetitions of the same work touched anew, and bytes that `give_memory_back` returned."""
    done = subprocess.run(
        [sys.executable, "-c", f"KEEP = {keep}\n{PROBE}"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return tuple(json.loads(done.stdout))


@needs_glibc
def test_kept_memory_is_not_paged_in_again_until_it_is_given_back():
    pages, returned = probe(keep=True)
    assert pages < 50_000  # of 153,600; 0 in forty runs
    assert returned > 100e6


@needs_glibc
def test_without_asking_the_same_work_touches_its_pages_again_and_again():
    # the claim that `keep_freed_memory` rests on; should a C library stop doing so, it can go
    pages, returned = probe(keep=False)
    assert pages > 100_000
    assert returned < 20e6


@pytest.mark.parametrize("keep", [True, False])
def test_commands_keep_their_memory_unless_they_say_otherwise(monkeypatch, keep):
    asked = []
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: asked.append(True))
    with pytest.raises(SystemExit):
        cli.run(lambda: 0, keep_memory=keep)
    assert asked == [True] * keep


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cpu.keep_freed_memory() is False
    cpu.give_memory_back()
