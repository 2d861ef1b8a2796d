"""What an earlier version wrote still loads and means the same; `fixtures/README.md` says which files these are."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from pixart.checkpoint.describe import describe
from pixart.checkpoint.init_from import start_from
from pixart.checkpoint.load import load_model, load_with_card
from pixart.config import load_config, to_dict
from pixart.errors import InputError
from pixart.features.store import FeatureStore, verify
from pixart.files import read_rows
from pixart.model import PixArt
from pixart.train.config import TrainConfig
from pixart.train.distributed import Processes
from pixart.train.loop import train
from pixart.train.setup import build_state
from pixart.train.state import load_checkpoint
from toy import relative, tiny_inputs

FILES = Path(__file__).parent / "fixtures"
MODELS = ["ours", "official.pth", "diffusers"]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(FILES / "expected.safetensors")


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return json.loads((FILES / "expected.json").read_text(encoding="utf-8"))


def holds(found: Any, expected: Any) -> bool:
    """Whether every value that the earlier version had is the same; what was added since may have any."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(key in found and holds(found[key], expected[key]) for key in expected)
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("source", [*MODELS, "run"])
def test_a_card_says_the_same(source, values):
    assert holds(to_dict(load_with_card(FILES / source)[1]), values[source.removesuffix(".pth")])


@pytest.mark.parametrize(
    ("source", "ema", "name"),
    [
        *((source, True, source.removesuffix(".pth")) for source in MODELS),
        ("run", True, "run ema"),
        ("run", False, "run model"),
    ],
)
def test_a_model_gives_the_same_output(source, ema, name, tensors):
    model = load_model(FILES / source, ema=ema, dtype=torch.float32)
    with torch.no_grad():
        output = model(**tiny_inputs(model, side=8 if model.config.latent_size == 8 else 4))
    assert relative(output, tensors[name]) <= 5e-6  # recorded on another processor, whose torch.exp rounds otherwise


@pytest.mark.parametrize("source", [*MODELS, "run"])
def test_nothing_of_a_model_is_new_or_left_out_in_a_start_from_it(source):
    model, card = load_with_card(FILES / source)
    start = PixArt(card.model)
    assert start_from(start, str(FILES / source), diffusion=card.diffusion) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(start.state_dict()[name], tensor.float()), name
    assert "refused           load" not in describe(FILES / source)


def test_a_runs_configuration_says_the_same(values):
    del values["config"]["evaluate"]["retrieval"]  # which is no more
    assert holds(
        to_dict(
            load_config(
                TrainConfig,
                FILES / "run" / "config.yaml",
            )
        ),
        values["config"],
    )


def test_a_runs_checkpoint_goes_into_a_run_bit_for_bit():
    config = load_config(TrainConfig, FILES / "run" / "config.yaml")
    accelerator = Accelerator(cpu=True)
    state = build_state(config, accelerator, Processes(accelerator, 60), None, fresh=False)
    checkpoint = FILES / "run" / "checkpoints" / "step_00000002"
    notes = load_checkpoint(state, checkpoint)
    assert all("written with oneDNN's matrix product" in note for note in notes)  # as it was, where there is that
    for kind, module in (("model", state.parts.network), ("ema", state.parts.average)):
        stored = load_file(checkpoint / kind / "model.safetensors")
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in stored.items())
    assert (state.progress.step, state.progress.images) == (2, 4)
    moments = load_file(checkpoint / "optimizer-00001-of-00001.safetensors")
    held = [tensor for entry in state.optimizer.state.values() for tensor in entry.values() if tensor.ndim]
    assert sum(tensor.numel() for tensor in held) == sum(t.numel() for t in moments.values() if t.ndim)
    assert torch.isclose(sum(t.double().sum() for t in held), sum(t.double().sum() for t in moments.values() if t.ndim))


def test_a_store_opens_and_gives_the_same_samples(tmp_path, tensors, values):
    shutil.copytree(FILES / "store", tmp_path / "store")
    assert verify(tmp_path / "store") == []
    store, expected = FeatureStore(tmp_path / "store"), values["store"]
    sample, mirrored = store.get(2), store.get(2, mirrored=True)
    assert torch.equal(mirrored.mean, tensors["store mean"])
    assert torch.equal(mirrored.std, tensors["store std"])
    assert torch.equal(sample.mean.flip(-1), mirrored.mean), "by the identity autoencoder"
    number = sample.captions[0]
    assert (sample.id, store.text(number), sample.height, sample.width, sample.weights) == (
        expected["id"],
        expected["text"],
        expected["height"],
        expected["width"],
        expected["weights"],
    )
    assert torch.equal(store.caption(number), tensors["store caption"])
    assert torch.equal(store.prompt("a blue square"), tensors["store prompt"])
    null, tokens = store.null_states()
    assert torch.equal(null, tensors["store null"])
    assert tokens == expected["null tokens"]


def test_a_run_of_before_goes_on_with_its_own_draws_and_its_own_split(tmp_path, capsys):
    run = Path(shutil.copytree(FILES / "run", tmp_path / "run"))
    config = load_config(
        TrainConfig, run / "config.yaml", [f"output={run}", f"data.features={FILES / 'store'}", "train.steps=6"]
    )
    train(config)
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] > 2]
    # what that revision itself came to from this checkpoint and this store
    expected = [(0.8681703, 1.1223012), (0.8659724, 0.7528369), (0.8657113, 0.5977573), (0.8587168, 0.7872607)]
    for row, (loss, norm) in zip(rows, expected, strict=True):
        assert (row["loss"], row["grad_norm"]) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
    said = capsys.readouterr().out
    assert "drawn in order, not by name (data.draws in_order)" in said
    assert "noise depended on seed (data.split_seed 0)" in said
    assert load_config(TrainConfig, run / "config.yaml").data.draws == "in_order"  # and so it is from then on


def test_a_removed_setting_is_ignored_if_it_was_off_and_explained_if_it_was_on(tmp_path):
    text = (FILES / "run" / "config.yaml").read_text()
    assert "retrieval: false" in text
    (tmp_path / "config.yaml").write_text(text.replace("retrieval: false", "retrieval: true"))
    with pytest.raises(InputError, match=r"config.yaml:\d+: evaluate.retrieval: learnt images are no longer") as caught:
        load_config(TrainConfig, tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)
    assert load_config(TrainConfig, tmp_path / "config.yaml", run_code=False).evaluate.metrics == ()
