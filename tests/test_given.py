"""Training with the caller's samples, network, objective and callbacks."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.data.samples import Draws
from pixart.data.training_set import load_images
from pixart.diffusion.losses import per_image
from pixart.diffusion.objective import Denoising, Objective
from pixart.encoders.autoencoder import IdentityAutoencoder
from pixart.errors import InputError
from pixart.files import read_rows
from pixart.model import PixArt
from pixart.seeds import Draw
from pixart.train import health, train
from pixart.train.given import Given
from pixart.train.setup import make_accelerator, start
from runs import ROOT, build, change, environment, make_pictures, settings
from toy import tiny_model


def make_samples(count: int = 8, channels: int = 3, kind: str = "latents") -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "id": f"sample {i}",
            kind: torch.rand(channels, 8, 8, generator=generator) * 2 - 1,
            "caption": torch.randn(2 + i % 4, 16, generator=generator),
        }
        for i in range(count)
    ]


class Mine(torch.utils.data.Dataset):
    """A data set as a researcher may have it: ids known beforehand, two sizes, augmented by the epoch."""

    by_epoch = True

    def __init__(self, count: int = 8):
        self.samples = make_samples(count)
        self.ids = [sample["id"] for sample in self.samples]
        self.buckets = [i % 2 for i in range(count)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, index = key
        sample = self.samples[index]
        return {**sample, "latents": sample["latents"].roll(epoch, -1)[:, : 8 - 4 * (index % 2)]}


class Weighted(Objective):
    """The plain loss times a learned number, with a draw of its own."""

    draws = {"second": Draw("uniform")}  # noqa: RUF012

    def __init__(self, config, network, scale: float = 1.0):
        super().__init__(config, network)
        self.trained["gain"] = torch.nn.Linear(1, 1)
        self.scale = scale

    def forward(self, network, example):
        t = self.schedule.draw_times(example.draws["second"], self.config)
        x_t = self.schedule.add_noise(example.x0, example.noise, t)
        found = per_image((network(x_t, t, **example.inputs) - example.x0) ** 2)
        gain = self.trained["gain"](torch.ones(1, 1, device=found.device)).squeeze()
        return {"loss": self.scale * found * gain.exp() - gain, "second": example.draws["second"]}


@pytest.fixture
def base(tmp_path) -> dict:
    """No folder, no text encoder: nothing is there but what a call brings."""
    made = settings(tmp_path / "run", tmp_path / "nothing", tmp_path / "no encoder")
    return change(made, data={"workers": 0, "text_dtype": "float32"}, train__steps=4)


def weights(run):
    return load_file(newest_checkpoint(run, print) / "ema" / "model.safetensors")


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------- samples


def test_a_list_of_samples_trains_and_every_number_it_lacks_is_drawn_by_name(base):
    samples = make_samples()
    session = start(build(base), Given(data=samples))
    key = (3, 5)
    found, draws = session.data.train.dataset[key], Draws(0, 3, "sample 5", (3, 8, 8), 2)
    assert found["id"] == "sample 5" and torch.equal(found["latents"], samples[5]["latents"])
    assert torch.equal(found["noise"], draws.normal("noise", 3, 8, 8))
    assert found["time"] == float(draws.uniform("time")) and found["drop"] == float(draws.uniform("drop"))
    assert (found["size"], found["aspect_ratio"], found["weight"]) == ((8.0, 8.0), 1.0, 1.0)
    result = train(build(base), data=samples)
    assert result.finished and all(row["loss"] > 0 for row in read_rows(result.run / "metrics.jsonl"))


def test_what_a_sample_holds_is_taken_as_it_is(base):
    sample = make_samples(1)[0]
    own = {
        "noise": torch.ones(3, 8, 8), "time": 0.25, "drop": 0.75, "size": (512, 768), "aspect_ratio": 0.68,
        "weight": 1.0, "targets": {"class": torch.tensor(3)}, "draws": {"mine": torch.tensor(0.5)},
    }  # fmt: skip
    found = start(build(base, train__batch_size=1), Given(data=[{**sample, **own}])).data.train.dataset[0, 0]
    for name, value in own.items():
        assert found[name] == value if name != "noise" else torch.equal(found[name], value)


def test_samples_given_train_as_the_same_images_from_a_folder(tmp_path, text_encoder):
    made = settings(tmp_path / "run", make_pictures(tmp_path / "images"), text_encoder)
    config = build(change(made, data__validation=0.2, train__validate_every=6))
    data = load_images(config.data_spec, make_accelerator(config), IdentityAutoencoder())
    images = [data.train.dataset[0, i] for i in range(len(data.train))]
    images += [data.held_out.dataset[0, i] for i in range(len(data.held_out))]
    brought = [{name: image[name] for name in ("id", "pixels", "caption")} for image in images]
    brought.sort(key=lambda sample: sample["id"])
    given = build(
        change(made, output=str(tmp_path / "given"), data__folder="", data__validation=0.2, train__validate_every=6)
    )
    with_ids = type("Set", (list,), {"ids": [sample["id"] for sample in brought]})(brought)
    one, other = train(config), train(given, data=with_ids)
    assert_equal(weights(one.run), weights(other.run))
    rows = [
        [row["validation_error"] for row in read_rows(run / "metrics.jsonl") if "validation_error" in row]
        for run in (one.run, other.run)
    ]
    assert rows[0] == rows[1]
    assert one.data.fingerprint == other.data.fingerprint


def test_a_data_set_of_two_sizes_that_knows_the_epoch_goes_on_bit_for_bit(base, tmp_path):
    whole = train(build(base), data=Mine())
    cut = build(base, output=str(tmp_path / "cut"))
    first = train(cut, data=Mine(), should_stop=iter([False, False, True]).__next__)
    assert (first.finished, first.step) == (False, 2)
    again = train(cut, data=Mine())
    assert again.finished
    assert_equal(weights(whole.run), weights(again.run))


def test_samples_of_pixels_go_through_the_autoencoder_and_arrays_to_network_and_objective(base):
    samples = [
        {**sample, "targets": {"label": torch.tensor(i)}} for i, sample in enumerate(make_samples(kind="pixels"))
    ]
    seen = []

    class Looks(Denoising):
        def forward(self, network, example):
            seen.append((example.pixels.shape, sorted(example.targets["label"].tolist())))
            return super().forward(network, example)

    config = build(base, train__steps=2)
    train(config, data=samples, objective=lambda network: Looks(config.diffusion, network))
    assert [shape for shape, _ in seen] == [(4, 3, 8, 8)] * 2
    assert sorted(seen[0][1] + seen[1][1]) == list(range(8))


def test_prompts_and_null_captions_of_given_samples_come_from_the_text_encoder_alone_if_asked_for(base, text_encoder):
    config = build(base, text__model=str(text_encoder), text__null="empty_own_mask", prompts=["a red square"])
    session = start(config, Given(data=make_samples()))
    assert session.data.captions["a red square"].shape[1] == 16 and session.data.null.shape[1] == 16
    with pytest.raises(InputError, match="text encoder"):
        start(build(base, output=f"{base['output']}2", prompts=["a red square"]), Given(data=make_samples()))


def bad(**changes):
    samples = make_samples()
    samples[0] = {key: value for key, value in {**samples[0], **changes}.items() if value is not None}
    return samples


@pytest.mark.parametrize(
    ("data", "changes", "match"),
    [
        ([], {}, "data: got 0 samples"),
        (7, {}, "data: got 7, expected .*__len__"),
        (bad(latents=None), {}, r"data\[0\]: .*one of latents and pixels, got id, caption"),
        (bad(pixels=torch.zeros(3, 8, 8)), {}, r"data\[0\]: .*one of latents and pixels"),
        (bad(latents=torch.zeros(4, 8, 8)), {}, r"data\[0\].latents: got shape \(4, 8, 8\), expected \(3, h, w\)"),
        (bad(latents=torch.zeros(3, 7, 8)), {}, r"multiples of 2"),
        (bad(latents=torch.zeros(3, 8, 8, dtype=torch.uint8)), {}, r"latents: got uint8"),
        (bad(latents=None, pixels=torch.full((3, 8, 8), 255.0)), {}, r"pixels: .*\[-1, 1\]"),
        (bad(caption="a fox"), {}, r"data\[0\].caption: got a str, expected text states"),
        (bad(caption=torch.zeros(2, 8)), {}, r"caption: got shape \(2, 8\), expected \(L, 16\)"),
        (bad(caption=torch.zeros(13, 16)), {}, r"caption: .*13 tokens.*text.length 12"),
        (bad(caption=torch.zeros(0, 16)), {}, r"caption: .*no token"),
        (bad(noise=torch.zeros(3, 4, 4)), {}, r"noise: got shape \(3, 4, 4\), expected \(3, 8, 8\)"),
        (bad(time=1.5), {}, r"time: got 1.5, expected a number in \[0, 1\)"),
        (bad(captoin=torch.zeros(2, 16)), {}, r"unknown entry 'captoin'.*'caption'"),
        (bad(id=3), {}, r"id: got 3, expected a text"),
        (make_samples(), {"data__folder": "images"}, r"data.folder.*leave"),
        (make_samples(), {"data__flip": True}, r"data.flip.*leave"),
        (make_samples(), {"data__targets": {"colours": "patch_colours"}}, r"targets.*colours"),
    ],
)
def test_unusable_samples_are_refused_in_one_line_before_any_work(base, data, changes, match):
    config = build(base, **changes)
    with pytest.raises(InputError, match=match) as caught:
        train(config, data=data)
    assert "\n" not in str(caught.value)
    assert not checkpoints(Path(config.output))


def test_a_batch_of_samples_of_different_sizes_asks_for_buckets(base):
    samples = Mine()
    del samples.buckets
    with pytest.raises(InputError, match="buckets"):
        train(build(base), data=samples)
    samples.buckets = [0, 1]
    with pytest.raises(InputError, match="buckets: got 2, expected one for each of 8 samples"):
        train(build(base), data=samples)
    samples = Mine()
    samples.ids = ["a"] * 8
    with pytest.raises(InputError, match="ids: 'a' is there 8 times"):
        train(build(base), data=samples)


def test_workers_read_the_same_and_what_they_refuse_is_one_line_too(base):
    one = train(build(base), data=Mine())
    other = train(build(base, output=f"{base['output']}2", data__workers=2), data=Mine())
    assert_equal(weights(one.run), weights(other.run))
    samples = make_samples()
    samples[2]["caption"] = torch.zeros(13, 16)
    with pytest.raises(InputError, match=r"^data\[2\].caption: 13 tokens, more than text.length 12$"):
        train(build(base, output=f"{base['output']}3", data__workers=1), data=samples)


def test_without_a_folder_a_config_asks_for_data(base):
    with pytest.raises(InputError, match=r"data.folder: .*train"):
        train(build(base, data__resolution=8))


def test_a_change_of_a_runs_samples_is_reported_and_recorded(base, capsys):
    config = build(base)
    train(replace(config, train=replace(config.train, steps=2)), data=make_samples())
    capsys.readouterr()
    changed = make_samples()
    changed[0]["id"] = "another"
    train(config, data=changed)
    assert "the training data are not those of the steps so far" in capsys.readouterr().out
    rows = list(read_rows(Path(config.output) / "history.jsonl"))
    assert rows[0]["samples"] != rows[1]["samples"] and rows[0]["given"] == ["data"]


# ---------------------------------------------------------------------------------------------- a network, an objective


def own_model(**changes) -> PixArt:
    torch.manual_seed(7)
    return PixArt(replace(tiny_model().config, in_channels=3, learn_sigma=False, **changes))


def test_a_network_given_starts_the_run_is_trained_in_place_and_its_config_becomes_the_runs(base):
    model = own_model(depth=3).requires_grad_(False).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = {key: value for key, value in base.items() if key not in ("model", "diffusion")}
    result = train(build(made, train__save_every=1, train__keep=9), data=make_samples(), model=model)
    after = load_file(newest_checkpoint(result.run, print) / "model" / "model.safetensors")
    assert_equal(dict(model.state_dict()), after)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    first = load_file(checkpoints(result.run)[0] / "model" / "model.safetensors")  # its warm-up's first step is small
    assert all((first[name] - before[name]).abs().max() < 2e-3 for name in before)
    config = json.loads((newest_checkpoint(result.run, print) / "model" / "config.json").read_text())
    assert config["model"]["depth"] == 3


def test_a_run_goes_on_from_its_own_weights_whatever_network_is_given(base, tmp_path):
    whole = train(build(base), data=make_samples(), model=own_model())
    cut = build(base, output=str(tmp_path / "cut"))
    train(cut, data=make_samples(), model=own_model(), should_stop=iter([False, False, True]).__next__)
    again = train(cut, data=make_samples())  # a network of the same config, which the run knows
    assert_equal(weights(whole.run), weights(again.run))


def test_impossible_networks_are_refused_in_one_line(base):
    class Larger(PixArt):
        def __init__(self, config):
            super().__init__(config)
            self.more = torch.nn.Linear(2, 2)

    config = own_model().config
    for model, changes, match in (
        (own_model(depth=3), {}, "model: .*depth 3, .*2"),
        (own_model().bfloat16(), {}, "float32"),
        (own_model(), {"init_from": "somewhere"}, "init_from"),
        (Larger(config), {}, "model: .*more.weight"),
        ("XL/2", {}, "model: got 'XL/2', expected PixArt"),
    ):
        with pytest.raises(InputError, match=match):
            train(build(base, **changes), data=make_samples(), model=model)


def test_an_objective_given_is_trained_saved_and_goes_on_and_the_run_says_which_it_was(base, tmp_path):
    def make(network):
        return Weighted(build(base).diffusion, network, scale=0.5)

    whole = train(build(base), data=make_samples(), objective=make)
    newest = newest_checkpoint(whole.run, print)
    assert (newest / "parts" / "gain.safetensors").is_file()
    logged = [row for row in read_rows(whole.run / "metrics.jsonl") if "second" in row]
    assert len(logged) == 4
    cut = build(base, output=str(tmp_path / "cut"))
    torch.manual_seed(1)
    train(cut, data=make_samples(), objective=make, should_stop=iter([False, False, True]).__next__)
    with pytest.raises(InputError, match=r"objective.name.*python:test_given.*make"):
        train(cut, data=make_samples())  # by the usual loss it would be another run
    with pytest.raises(InputError, match=r"given to train\(\) as an object"):
        train(replace(cut, objective=replace(cut.objective, name="python:test_given.other")), data=make_samples())


def test_an_objective_instance_keeps_its_weights(base):
    model = own_model()
    objective = Weighted(build(base).diffusion, model)
    with torch.no_grad():
        objective.trained["gain"].bias.fill_(3.0)
    session = start(build(base), Given(data=make_samples(), model=model, objective=objective))
    assert session.state.parts.objective is objective
    assert objective.trained["gain"].bias.item() == 3.0
    assert session.data.train.dataset[0, 0]["draws"]["second"].shape == ()
    with pytest.raises(InputError, match=r"objective: got the class Weighted.*lambda network"):
        train(build(base), data=make_samples(), objective=Weighted)
    with pytest.raises(InputError, match=r"objective: .*returned a Linear, expected an Objective"):
        train(build(base), data=make_samples(), objective=lambda network: torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"objective: .*'other'.*leave one out"):
        train(build(base, objective={"name": "other"}), data=make_samples(), objective=objective)


# ----------------------------------------------------------------------------------------------------- told and stopped


def test_every_step_is_told_with_numbers_that_are_still_on_the_device(base):
    steps = []

    def on_step(step, report):
        assert isinstance(report.loss, torch.Tensor) and report.loss.device.type == "cpu"
        steps.append((step, report.loss.item(), report.grad_norm.item(), report.images.item(), report.outcome.item()))

    result = train(build(base), data=make_samples(), on_step=on_step)
    logged = [
        (row["step"], row["loss"], row["grad_norm"]) for row in read_rows(result.run / "metrics.jsonl") if "loss" in row
    ]
    assert sum((step[:3] for step in steps), ()) == pytest.approx(sum(logged, ()))
    assert [step[3:] for step in steps] == [(4.0, 0.0)] * 4


def test_a_step_is_told_before_anything_waits_for_its_numbers(base, monkeypatch):
    order: list = []
    read = health.read_results
    monkeypatch.setattr(health, "read_results", lambda results: order.append("read") or read(results))
    train(
        build(base, train__log_every=2, train__save_every=0),
        data=make_samples(),
        on_step=lambda step, _: order.append(step),
    )
    assert order[:3] == [1, 2, "read"]


def test_a_run_stops_when_asked_and_saves_in_a_thread_too(base):
    found = {}

    def work():
        found["result"] = train(
            build(base),
            data=make_samples(),
            should_stop=lambda: len(seen) >= 2,
            on_step=lambda step, _: seen.append(step),
        )

    seen: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    result = found["result"]
    assert (result.finished, result.step, seen) == (False, 2, [1, 2])
    summary = json.loads((result.run / "summary.json").read_text())
    assert summary["why"] == "stopped by should_stop"
    assert [path.name for path in checkpoints(result.run)] == ["step_00000002"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"config": "configs/openmoji.yaml"}, "config: got 'configs/openmoji.yaml', expected TrainConfig"),
        ({"on_step": 3}, "on_step: got 3, expected a function or None"),
        ({"should_stop": True}, "should_stop: got True, expected a function or None"),
        ({"onednn": "yes"}, "onednn: got 'yes', expected bool"),
    ],
)
def test_wrong_types_are_one_line(base, arguments, match):
    with pytest.raises(InputError, match=match):
        train(**{"config": build(base), "data": make_samples(), **arguments})


def test_a_numpy_array_is_as_good_as_a_tensor(base):
    samples = [
        {**sample, "latents": sample["latents"].numpy(), "caption": sample["caption"].numpy()}
        for sample in make_samples()
    ]
    assert isinstance(samples[0]["latents"], np.ndarray)
    one = train(build(base), data=samples)
    other = train(build(base, output=f"{base['output']}2"), data=make_samples())
    assert_equal(weights(one.run), weights(other.run))


SCRIPT = """
import os
import sys

from pixart.train import train
from runs import build
from test_given import make_samples

base, output, stop = eval(sys.argv[1]), sys.argv[2], int(sys.argv[3])
done = []
result = train(
    build(base, output=output), data=make_samples(), on_step=lambda step, _: done.append(step),
    should_stop=lambda: os.environ['RANK'] == '1' and len(done) == stop,
)
sys.stderr.write(f"rank {os.environ['RANK']}: {result.step} {result.finished}\\n")
"""


@pytest.mark.slow
def test_processes_agree_to_stop_when_one_of_them_is_told_and_go_on_as_undisturbed(base, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    base = change(base, train__steps=8, train__save_every=0)

    def launch(output: str, stop: int) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
             repr(base), str(tmp_path / output), str(stop)],
            env={**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return sorted(line for line in done.stderr.splitlines() if line.startswith("rank "))

    assert launch("whole", -1) == ["rank 0: 8 True", "rank 1: 8 True"]
    assert launch("cut", 3) == ["rank 0: 4 False", "rank 1: 4 False"]  # a step later, on both
    assert launch("cut", -1) == ["rank 0: 8 True", "rank 1: 8 True"]
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
