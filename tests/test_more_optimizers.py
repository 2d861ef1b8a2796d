"""Optimizers of pytorch-optimizer: their published updates, exact resumes, and schedule-free averages."""

import shutil
import sys

import pytest
import torch
from torch import nn

from chaos import tensors
from pixart.checkpoint.files import checkpoints
from pixart.errors import InputError
from pixart.train.config import OptimizerConfig
from pixart.train.loop import train
from pixart.train.more_optimizers import take_average
from pixart.train.optimizer import make_optimizer
from pixart.train.optimizer_state import read_moments, take_moments, write_moments
from runs import build, change, make_pictures, settings
from toy import relative

pytest.importorskip("pytorch_optimizer")


def trained(config: OptimizerConfig, start: torch.Tensor, gradients: list[torch.Tensor]):
    """A parameter after steps with these gradients, and the optimizer."""
    parameter = nn.Parameter(start.clone())
    optimizer = make_optimizer({"weight": parameter}, config)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter, optimizer


def draw(*shape: int, steps: int = 5) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(steps + 1, *shape, generator=generator)
    return start, list(gradients)


def test_came_is_its_published_update():
    """arXiv 2307.02047, algorithm 2, with the update's RMS clipped at 1 as in Adafactor."""
    start, gradients = draw(3, 4)
    config = OptimizerConfig(name="came", lr=0.01, weight_decay=0.0, betas=(0.9, 0.99, 0.999))
    found, _ = trained(config, start, gradients)
    weight, m = start.clone(), torch.zeros(3, 4)
    r, c, residual_r, residual_c = torch.zeros(3), torch.zeros(4), torch.zeros(3), torch.zeros(4)

    def factored(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return rows[:, None] * columns[None, :] / rows.mean()

    for g in gradients:
        squared = g**2 + 1e-30
        r, c = 0.99 * r + 0.01 * squared.mean(1), 0.99 * c + 0.01 * squared.mean(0)
        u = g / factored(r, c).sqrt()
        u = u / (u.square().mean().sqrt() / 1.0).clamp(min=1.0)
        m = 0.9 * m + 0.1 * u
        instability = (u - m) ** 2 + 1e-16
        residual_r = 0.999 * residual_r + 0.001 * instability.mean(1)
        residual_c = 0.999 * residual_c + 0.001 * instability.mean(0)
        weight = weight - 0.01 * m / factored(residual_r, residual_c).sqrt()
    assert relative(found, weight) <= 1e-5


def test_prodigy_is_its_published_update():
    """arXiv 2306.06101, algorithm 4."""
    start, gradients = draw(6, steps=12)
    # the start is far from the optimum; in fp64, because fp32 rounds the first steps, which are of size 1e-6
    start, gradients = start.double(), [gradient.double() + 2 for gradient in gradients]
    found, optimizer = trained(OptimizerConfig(name="prodigy", lr=1.0, weight_decay=0.0), start, gradients)
    x, d, r = start, 1e-6, 0.0
    m, v, s = (torch.zeros(6, dtype=torch.float64) for _ in range(3))
    root = 0.999**0.5
    for g in gradients:
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * d**2 * g**2
        r = root * r + (1 - root) * d**2 * (g @ (start - x)).item()
        s = root * s + (1 - root) * d**2 * g
        following = max(d, r / s.abs().sum().item())
        x, d = x - d * m / (v.sqrt() + d * 1e-8), following
    assert optimizer.param_groups[0]["d"] == pytest.approx(d, rel=1e-4) and d > 1e-6
    assert relative(found - start, x - start) <= 1e-4


def test_schedule_free_adamw_is_its_published_update_and_the_average_is_x():
    """arXiv 2405.15682, algorithm 1."""
    start, gradients = draw(4, 3)
    config = OptimizerConfig(name="schedulefreeadamw", lr=0.05, weight_decay=0.0, betas=(0.9, 0.99))
    found, optimizer = trained(config, start, gradients)
    x, y, z, v = start, start, start, torch.zeros(4, 3)
    for t, g in enumerate(gradients, 1):
        v = 0.99 * v + 0.01 * g**2
        z = z - 0.05 * g / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        x = (1 - 1 / t) * x + z / t  # the rate is constant, so x is the plain mean
        y = 0.1 * z + 0.9 * x
    assert relative(found, y) <= 1e-5
    module, average = nn.Module(), nn.Module()
    module.weight, average.weight = found, nn.Parameter(torch.zeros(4, 3), requires_grad=False)
    before = found.clone()
    take_average(average, module, optimizer)
    assert relative(average.weight, x) <= 1e-5
    assert torch.equal(found, before)
    optimizer.eval()  # the package's own switch
    assert relative(average.weight, found) <= 1e-6


@pytest.mark.parametrize("name", ["came", "prodigy", "schedulefreeadamw"])
def test_an_optimizers_state_goes_on_bit_for_bit(name, tmp_path):
    def make() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(1)
        shapes = {"bias": (4,), "weight": (4, 6), "kernel": (2, 3, 2, 2)}
        named = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in shapes.items()}
        return named, make_optimizer(named, OptimizerConfig(name=name, lr=0.1))

    def step(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in named.values():
            parameter.grad = 1 + torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    whole, optimizer = make()
    for number in range(3):
        step(whole, optimizer, number)
    moments = take_moments(optimizer, whole, lambda _, value: value.clone(), main=True)
    write_moments(tmp_path, moments, 0, 1)
    torch.save(moments.record, tmp_path / "record.pt")
    again, other = make()
    for key, parameter in again.items():
        parameter.data.copy_(whole[key].data)
    read_moments(tmp_path, torch.load(tmp_path / "record.pt", weights_only=True), other, again)
    for number in range(3, 6):
        step(whole, optimizer, number)
        step(again, other, number)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_checkpoint_holds_the_groups_tensors_as_they_were():
    start, gradients = draw(6)
    parameter, optimizer = trained(OptimizerConfig(name="prodigy", lr=1.0), start, gradients)
    record = take_moments(optimizer, {"weight": parameter}, lambda _, value: value.clone(), main=True).record
    before = record["groups"][0]["d_numerator"].clone()
    parameter.grad = gradients[0]
    optimizer.step()
    assert torch.equal(record["groups"][0]["d_numerator"], before)
    assert not torch.equal(optimizer.param_groups[0]["d_numerator"], before)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"name": "camee"}, "there is no 'camee'; similar names: came"),
        (
            {"name": "came", "options": {"clip_treshold": 1.0}},
            "no option 'clip_treshold'; did you mean 'clip_threshold'",
        ),
        ({"name": "came", "eps": 1e-8}, "has no option 'eps'; did you mean 'eps[12]'"),
        ({"name": "alig"}, "'alig' cannot be used: it needs more than gradients"),
        ({"name": "bsam"}, "does not accept its options"),
        ({"name": "came", "betas": (0.9,)}, "does not accept its options"),
    ],
)
def test_what_cannot_be_used_is_one_line(config, match):
    with pytest.raises(InputError, match=match):
        make_optimizer({"weight": nn.Parameter(torch.zeros(2, 2))}, OptimizerConfig(**config))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(InputError, match=r"'prodigy' needs the package 'pytorch-optimizer': pip install .*optimizers"):
        make_optimizer({"weight": nn.Parameter(torch.zeros(2, 2))}, OptimizerConfig(name="prodigy"))


def test_eight_bit_adamw_goes_the_way_of_adamw_and_keeps_its_state_in_bytes():
    pytest.importorskip("bitsandbytes")
    start, gradients = draw(80, 96, steps=20)
    gradients = [0.1 * gradient + 0.05 for gradient in gradients]
    both = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    found, optimizer = trained(OptimizerConfig(name="bnbadamw8bit", **both), start, gradients)
    exact, _ = trained(OptimizerConfig(name="adamw", **both), start, gradients)
    assert relative(found - start, exact - start) <= 0.03
    state = optimizer.state[found]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    large = sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, torch.Tensor))
    assert large <= 2.5 * found.numel() + 2 * 4 * 256  # two bytes a number, scales, and two tables


def test_a_run_with_eight_bit_adamw_goes_on_bit_for_bit(tmp_path, text_encoder):
    pytest.importorskip("bitsandbytes")
    base = settings(tmp_path / "run", make_pictures(tmp_path / "images"), text_encoder)
    base = change(base, optimizer__name="bnbadamw8bit", optimizer__lr=0.01, model__hidden_size=72, train__keep=9)
    run, again = train(build(base)).run, tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(checkpoints(again)[-1])
    train(build(base, output=str(again)))
    found, expected = (tensors(checkpoints(place)[-1]) for place in (again, run))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert any(value.dtype == torch.uint8 for value in found.values())
    with pytest.raises(InputError, match="fsdp shards matrices by rows, but optimizer 'bnbadamw8bit' needs whole"):
        train(build(base, train__parallel="fsdp", train__steps=8))


def test_eight_bit_adamw_says_what_it_lacks_before_any_work(tmp_path, monkeypatch):
    base = settings(tmp_path / "run", tmp_path / "none", tmp_path / "none")
    wanted = build(base, optimizer__name="bnbadamw8bit")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(InputError, match=r"'bnbadamw8bit' needs the package 'bitsandbytes': .*pixart\[quantize\]"):
            train(wanted)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with pytest.raises(InputError, match=r"has no option 'blocksize' \(there are .*min_8bit_size"):
        make_optimizer(
            {"weight": nn.Parameter(torch.zeros(2, 2))}, OptimizerConfig(name="bnbadamw8bit", options={"blocksize": 64})
        )

    def lacking(*_):
        raise NotImplementedError("Could not run 'bitsandbytes::optimizer_update_8bit_blockwise'\nwith arguments")

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", lacking)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"'bnbadamw8bit' needs CUDA: bitsandbytes [\d.]+ cannot .* 'cpu'") as caught:
        train(wanted)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_wrong_optimizer_is_told_before_any_work(tmp_path):
    base = settings(tmp_path / "run", tmp_path / "none", tmp_path / "none")
    with pytest.raises(InputError, match="there is no 'camee'; similar names: came"):
        train(build(base, optimizer__name="camee"))


def test_schedule_free_asks_for_no_second_average(tmp_path):
    base = settings(tmp_path / "run", tmp_path, tmp_path)
    with pytest.raises(InputError, match=r"'schedulefreeadamw' averages the weights itself.* set train.ema to 0"):
        build(base, optimizer__name="schedulefreeadamw", train__ema=0.99)
