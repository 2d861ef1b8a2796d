"""LoRA from end to end: the journey by commands, two processes, a base in bf16, recomputed blocks, official files."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import pixart
from chaos import _finish, launch
from checkpoints import save_official
from pixart.adapters.load import read_settings
from pixart.checkpoint.files import ModelCard, checkpoints
from pixart.checkpoint.keys import NULL_CAPTION
from pixart.checkpoint.save import save
from pixart.errors import InputError
from pixart.train.loop import train
from pixart.train.metrics import read_metrics
from pixart.train.setup import start
from runs import build, change, environment, make_pictures, run_command, settings, write
from test_journey import make_t5, make_vae, take_pictures
from toy import TINY, relative, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory, text_encoder) -> dict:
    """Settings of a LoRA on a small network that was trained for two steps."""
    home = tmp_path_factory.mktemp("lora_runs")
    found = settings(home / "base", make_pictures(home / "pictures"), text_encoder)
    train(build(found, train__steps=2))
    adapter = {"kind": "lora", "rank": 3}
    found = change(found, init_from=str(home / "base"), adapter=adapter, optimizer__lr=0.02)
    return change(found, sample={"steps": 2, "guidance": 1.5})


def adapter_of(run: Path, part: str = "model") -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1] / part / "adapter.safetensors")


# --------------------------------------------------------------------------------------------------------- the journey


def command(name: str, *arguments) -> str:
    done = run_command(name, *arguments)
    assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_twenty_images_and_a_released_file_become_a_lora_and_a_sheet(emoji_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    released = save_official(tmp_path / "released.pth", tiny_model(caption_length=120))
    settings = {  # what a user changes, and what makes it tiny
        "base": "pixart:lora_512",
        "output": str(tmp_path / "style"),
        "data": {"folder": str(take_pictures(emoji_folder, tmp_path / "mine", 20)), "resolution": 64, "workers": 0},
        "init_from": str(released),
        "vae": {"source": str(make_vae(tmp_path / "vae"))},
        "text": {"model": str(make_t5(tmp_path / "t5"))},
        "model": {**TINY, "caption_length": 120},
        "optimizer": {"lr": 0.02, "warmup": 0},
        "train": {
            "steps": 8, "batch_size": 4, "sample_every": 0, "save_every": 4, "mixed_precision": "no", "log_every": 2,
            "trackers": [],
        },
        "sample": {"steps": 4},
    }  # fmt: skip
    settings["data"]["features"] = str(tmp_path / "features")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    command("extract", "mine.yaml")
    command("train", "mine.yaml")
    command("convert", "style", "style.safetensors", "--to", "kohya")
    command("convert", "style", "style-folder", "--to", "diffusers-lora")
    parts = ("--set", "num_heads=4", "--vae", tmp_path / "vae", "--text-encoder", tmp_path / "t5")
    command("convert", released, "base", "--to", "ours", *parts)
    drawn = {}
    for name, words in {
        "run": ("--model", "style"), "none": ("--model", "base"),
        "file": ("--model", "base", "--lora", "style.safetensors"),
        "folder": ("--model", "base", "--lora", "style-folder"),
    }.items():  # fmt: skip
        command("sample", *words, "a red fox", "--out", name, "--set", "steps=4", "guidance=4.5")
        (path,) = [path for path in Path(name).glob("*.png") if path.name != "contact_sheet.png"]
        drawn[name] = np.asarray(Image.open(path)).astype(int)
    for name in ("file", "folder"):  # merged into the weights, and beside them: rounding
        assert np.abs(drawn[name] - drawn["run"]).max() <= 2
    assert np.abs(drawn["none"] - drawn["run"]).max() > 2
    sheet = ("--lora", "style.safetensors", "--strengths", 0, 0.5, 1)
    command("sample", "--model", "base", "a red fox", "a dog", "--out", "sheet", "--set", "steps=2", *sheet)
    assert Image.open(tmp_path / "sheet" / "strengths.png").size[0] > 3 * 64
    # megabytes, not gigabytes: the checkpoint holds nothing of the base
    sizes = [path.stat().st_size for path in checkpoints(tmp_path / "style")[-1].rglob("*") if path.is_file()]
    assert sum(sizes) < 2 * released.stat().st_size


# -------------------------------------------------------------------------------------------------------- two processes


def run_two(base: dict, home: Path, **changes) -> Path:
    """Train in two processes → the run."""
    config = write(home / "two.yaml", base, output=str(home / "two"), **changes)
    ranks = launch([sys.executable, "-m", "pixart", "train", str(config)], 2, home / "logs", environment())
    assert _finish(ranks) == {}
    return home / "two"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_the_adapter_of_one(base, tmp_path, parallel):
    also = {"train__sample_every": 6, "prompts": ["a red square"]}
    one = train(build(base, output=str(tmp_path / "one"), **also)).run
    two = run_two(base, tmp_path, train__parallel=parallel, train__steps=3, **also)
    two = run_two(base, tmp_path, train__parallel=parallel, **also)  # resumed
    sheets = [np.asarray(Image.open(run / "samples" / "step_00000006.png")).astype(int) for run in (one, two)]
    assert np.abs(sheets[0] - sheets[1]).max() <= 2
    for part in ("model", "ema"):
        found, expected = adapter_of(two, part), adapter_of(one, part)
        assert found.keys() == expected.keys()
        assert max(relative(found[name], expected[name]) for name in found) < 1e-4
    assert any(tensor.abs().max() > 0.01 for name, tensor in found.items() if name.endswith("up"))


@pytest.mark.slow
def test_two_processes_killed_in_the_middle_end_as_undisturbed_ones_bit_for_bit(base, tmp_path):
    also = {"adapter": {**base["adapter"], "dropout": 0.2}, "train__steps": 60, "train__save_every": 5}
    (tmp_path / "a").mkdir()
    undisturbed = run_two(base, tmp_path / "a", **also)
    (tmp_path / "b").mkdir()
    config = write(tmp_path / "b" / "two.yaml", base, output=str(tmp_path / "b" / "two"), **also)
    command = [sys.executable, "-m", "pixart", "train", str(config)]
    ranks = launch(command, 2, tmp_path / "b" / "killed", environment())
    while not checkpoints(tmp_path / "b" / "two") and all(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
    assert {rank.wait() for rank in ranks} == {-signal.SIGKILL}, ranks[0].log.read_text()
    assert int(checkpoints(tmp_path / "b" / "two")[-1].name.split("_")[-1]) < 60
    found = run_two(base, tmp_path / "b", **also)
    for part in ("model", "ema"):
        expected = adapter_of(undisturbed, part)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_of(found, part).items())
    rows = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run) if "loss" in row]
        for run in (undisturbed, found)
    ]
    assert rows[0] == rows[1] and rows[0][-1][0] == 60


@pytest.mark.slow
def test_two_processes_draw_the_class_images_of_one(base, tmp_path):
    booth = {"instance_prompt": "a sks square", "class_prompt": "a square", "num_class_images": 5}
    one = train(build(base, output=str(tmp_path / "one"), dreambooth=booth)).run
    two = run_two(base, tmp_path, dreambooth=booth)
    names = [sorted(path.name for path in (run / "class_images").iterdir()) for run in (one, two)]
    assert names[0] == names[1] and len(names[0]) == 5
    for name in names[0]:
        a, b = (np.asarray(Image.open(run / "class_images" / name)).astype(int) for run in (one, two))
        assert np.abs(a - b).max() <= 1
    found, expected = adapter_of(two), adapter_of(one)
    # class images that rounding made another by 1 of 255 train an adapter that is as near
    assert max(relative(found[name], expected[name]) for name in found) < 0.02


# --------------------------------------------------------------------------------------------------------- the base


def test_a_base_in_bf16_trains_the_adapter_of_one_in_fp32(base, tmp_path):
    runs, losses = {}, {}
    for dtype in ("float32", "bfloat16"):
        adapter = {**base["adapter"], "base_dtype": dtype}
        config = build(base, output=str(tmp_path / dtype), adapter=adapter, train__mixed_precision="bf16")
        runs[dtype] = train(config).run
        rows = [json.loads(line) for line in (runs[dtype] / "metrics.jsonl").read_text().splitlines()]
        losses[dtype] = torch.tensor([row["loss"] for row in rows if "loss" in row])
    assert relative(losses["bfloat16"], losses["float32"]) < 0.01
    session = start(build(base, output=str(tmp_path / "s"), adapter=adapter, train__mixed_precision="bf16"))
    parts = session.state.parts
    assert {p.dtype for p in parts.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for _, p in parts.named_parameters()} == {torch.float32}
    # the fingerprint of the base does not depend on its precision, so that loading tells of no other base
    one, two = (read_settings(checkpoints(run)[-1] / "model")[3] for run in runs.values())
    assert one == two and one is not None
    pipeline = pixart.Pipeline.from_pretrained(runs["bfloat16"])
    assert torch.isfinite(pipeline("a red square", steps=2, output="pixels")).all()
    with pytest.raises(InputError, match=r"adapter\.base_dtype bfloat16 needs train.mixed_precision bf16: got 'no'"):
        build(base, adapter=adapter)


def test_recomputing_every_second_block_keeps_more_and_changes_no_gradient():
    x, t, caption = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 20.0]), torch.randn(2, 7, 16)
    kept, gradients = {}, {}
    for every in (0, 1, 2):  # 0: none
        model = tiny_model(depth=4)
        model.gradient_checkpointing, model.checkpointing_every = every > 0, max(every, 1)
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen=seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x, t, caption).square().mean()
        kept[every] = sum(seen.values())
        loss.backward()
        gradients[every] = [p.grad for p in model.parameters()]
    assert kept[1] < kept[2] < kept[0]
    for every in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(gradients[every], gradients[0], strict=True))


# ----------------------------------------------------------------------------------------------------------- hand-over


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_official_file_may_leave_the_null_caption_out(tmp_path, suffix):
    model, target = tiny_model(), tmp_path / f"b{suffix}"
    save(model, ModelCard(model.config), target, "official", null_caption=False)
    found = load_file(target) if suffix == ".safetensors" else torch.load(target)["state_dict"]
    expected = torch.load(save_official(tmp_path / "a.pth", model))["state_dict"]
    assert found.keys() == expected.keys() - {NULL_CAPTION}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_other_formats_keep_the_null_caption(tmp_path):
    source = save_official(tmp_path / "a.pth", tiny_model())
    done = run_command("convert", source, tmp_path / "c", "--to", "ours", "--no-null-caption", "--set", "num_heads=4")
    assert done.returncode == 2 and "can be left out of official files only, not of ours" in done.stderr
