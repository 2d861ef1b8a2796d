"""Freezing, learning rates by batch size, stages, and what is looked for before any work."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from pixart.adapters.adapter import AdapterConfig, adapt
from pixart.checkpoint.files import checkpoints
from pixart.config import load_config, to_dict
from pixart.data.class_captions import write_class_captions
from pixart.encoders.text import TextConfig
from pixart.errors import InputError
from pixart.model import PRESETS, PixArt
from pixart.train.config import OptimizerConfig, TrainConfig
from pixart.train.estimate import estimate
from pixart.train.loop import train
from pixart.train.optimizer import freeze, learning_rate, match_names
from pixart.train.setup import check_shapes
from runs import ROOT, build, make_pictures, run_command, settings
from toy import tiny_model

CONFIGS = ROOT / "configs"
MISSING = ["data.folder", "text.model", "vae.source", "init_from"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures", side=16)


@pytest.fixture
def base(tmp_path, pictures, text_encoder) -> dict:
    return settings(tmp_path / "run", pictures, text_encoder)


def weights(checkpoint: Path, kind: str = "model") -> dict[str, torch.Tensor]:
    return load_file(checkpoint / kind / "model.safetensors")


def test_auto_lr_is_the_square_root_of_the_batch_over_256():
    config = OptimizerConfig(lr=2e-5, auto_lr="sqrt", warmup=0)
    assert learning_rate(config, 0, 10, 256) == 2e-5
    assert learning_rate(config, 5, 10, 1024) == pytest.approx(4e-5)
    assert learning_rate(config, 5, 10, 11392) == pytest.approx(2e-5 * 44.5**0.5)
    plain = OptimizerConfig(lr=2e-5, warmup=0)
    assert learning_rate(plain, 5, 10, 1024) == 2e-5


def test_auto_lr_is_what_a_run_trains_with(base):
    sgd = {"optimizer__name": "sgd", "optimizer__warmup": 0, "optimizer__weight_decay": 0.0, "train__steps": 1}
    scaled = train(build(base, **sgd, optimizer__lr=0.8, optimizer__auto_lr="sqrt")).run  # √(4 / 256) is 1/8
    plain = train(build(base, **sgd, optimizer__lr=0.1, output=f"{base['output']}2")).run
    found, expected = weights(checkpoints(scaled)[-1]), weights(checkpoints(plain)[-1])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert '"lr": 0.1,' in (scaled / "metrics.jsonl").read_text()


def test_frozen_parameters_stay_and_the_others_move(base):
    run = train(build(base, train__freeze=["blocks.0.*", "*.scale_shift_table", "x_embedder.proj.bias"],
                      train__save_every=1, train__keep=9, optimizer__warmup=0)).run  # fmt: skip
    first, last = weights(checkpoints(run)[0]), weights(checkpoints(run)[-1])
    averages = weights(checkpoints(run)[-1], "ema")
    for name in first:
        if name == "y_embedder.y_embedding":
            continue
        still = name.startswith("blocks.0.") or name.endswith("scale_shift_table") or name == "x_embedder.proj.bias"
        assert torch.equal(first[name], last[name]) == still, name
        if still:
            assert torch.equal(averages[name], last[name]), name
    with safe_open(next(checkpoints(run)[-1].glob("optimizer-*.safetensors")), "pt") as file:
        moved = {key.rsplit("/", 1)[0] for key in file.keys()}  # noqa: SIM118
    model = tiny_model(in_channels=3, learn_sigma=False)
    frozen = match_names([n for n, _ in model.named_parameters()], ["blocks.0.*", "*.scale_shift_table"])
    assert len(moved) == len(list(model.parameters())) - len(frozen) - 1


def test_a_frozen_run_goes_on_bit_for_bit(base):
    options = {"train__freeze": ["blocks.0.*"], "train__keep": 9}
    straight = train(build(base, **options)).run
    again = Path(f"{base['output']}2")
    shutil.copytree(straight, again)
    shutil.rmtree(checkpoints(again)[-1])
    train(build(base, **options, output=str(again)))
    found, expected = weights(checkpoints(again)[-1]), weights(checkpoints(straight)[-1])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pattern_that_matches_nothing_names_near_ones_before_any_work(base):
    broken = build(base, train__freeze=["blocks.1.atn.qkv.*"], data__folder="none", text__model="none")
    with pytest.raises(
        InputError, match=r"'blocks.1.atn.qkv.\*' matches no parameter; similar names: blocks.1.attn.qkv"
    ):
        train(broken)
    with pytest.raises(InputError, match="match every parameter, so that nothing is left to train"):
        train(build(base, train__freeze=["*"]))
    train(build(base, train__steps=2))
    with pytest.raises(InputError, match=r"another configuration .*train.freeze"):
        train(build(base, train__steps=4, train__freeze=["blocks.0.*"]))


def test_freezing_nothing_trains_everything():
    model = copy.deepcopy(tiny_model())
    freeze(model, ["blocks.*"])
    freeze(model, [])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_stage_is_a_config_with_a_base_and_the_run_before_it(base, tmp_path):
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({
        "base": "first.yaml", "output": f"{base['output']}_16", "init_from": base["output"],
        "data": {"resolution": 16}, "model": {"latent_size": 16, "position_scale": 2.0},
        "train": {"steps": 2, "batch_size": 2, "save_every": 1}, "optimizer": {"lr": 1e-30},
    }))  # fmt: skip
    first = train(load_config(TrainConfig, tmp_path / "first.yaml"))
    second = train(load_config(TrainConfig, tmp_path / "second.yaml"))
    averages, start = weights(checkpoints(first.run)[-1], "ema"), weights(checkpoints(second.run)[0])
    assert all(torch.equal(start[name], averages[name]) for name in averages)  # lr is next to nothing
    # a stage that goes on needs the one before it no more
    config = load_config(TrainConfig, tmp_path / "second.yaml", ["train.steps=3"])
    first.run.rename(tmp_path / "moved")
    assert train(config).step == 3


def test_everything_missing_is_told_at_once_before_any_work(base, tmp_path):
    with pytest.raises(InputError) as caught:
        train(build(base, text__model=str(tmp_path / "t5"), init_from=str(tmp_path / "weights.pth"),
                    vae={"kind": "kl", "source": str(tmp_path / "vae")}, model__in_channels=4, model__latent_size=1,
                    data__folder=str(tmp_path / "none"), model__patch_size=1))  # fmt: skip
    lines = str(caught.value).split("\n")
    assert lines[0] == "4 things are missing or wrong:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == MISSING
    assert not (tmp_path / "run").exists()


LESS_MEMORY = {f"{name}_16gb": name for name in ("finetune_512", "finetune_1024ms", "sigma_512", "sigma_1024")}
RECIPES = {
    "finetune_256": "alpha-256",
    "finetune_512": "alpha-512",
    "finetune_1024ms": "alpha-1024",
    "paper/1_imagenet": "alpha-256",
    "paper/2_sam": "alpha-256",
    "paper/3_aesthetic_256": "alpha-256",
    "paper/4_aesthetic_512": "alpha-512",
    "paper/5_aesthetic_1024ms": "alpha-1024",
}
SIGMA = {  # preset, global batch, warm-up, aspect ratios: as the authors' configs and their remarks have them
    "sigma_256": ("sigma-256", 64, 1000, False),
    "sigma_512": ("sigma-512", 48, 1000, True),
    "sigma_1024": ("sigma-1024", 12, 1000, True),
    "sigma_1024_kv": ("sigma-1024", 16, 500, True),
    "sigma_2k": ("sigma-2k", 4, 100, True),
    "alpha_to_sigma": ("sigma-256", 1024, 1000, False),
}
LORA = {"lora_512": "finetune_512", "lora_1024ms": "finetune_1024ms", "lora_sigma_512": "sigma_512",
        "lora_sigma_1024": "sigma_1024"}  # fmt: skip
DREAMBOOTH = ("dreambooth_512",)
PAPER = {  # steps, global batch, side: as the paper's table has them
    "1_imagenet": (300_000, 1024, 256),
    "2_sam": (150_000, 11_392, 256),
    "3_aesthetic_256": (90_000, 11_392, 256),
    "4_aesthetic_512": (100_000, 2_560, 512),
    "5_aesthetic_1024ms": (16_000, 384, 1024),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_its_preset_on_its_autoencoder(name):
    config = load_config(TrainConfig, CONFIGS / f"{name}.yaml")
    assert config.model == PRESETS[RECIPES[name]]
    assert config.vae.scale == 0.18215
    assert config.text.length == config.model.caption_length
    assert config.data.aspect_ratios == config.model.micro_conditions
    assert (config.optimizer.lr, config.optimizer.clip, config.optimizer.eps) == (2e-5, 0.01, 1e-10)
    assert (config.optimizer.weight_decay, config.optimizer.warmup, config.train.ema) == (0.03, 1000, 0.9999)
    check_shapes(config)


@pytest.mark.parametrize("name", SIGMA)
def test_a_recipe_of_sigma_has_the_settings_of_the_authors(name):
    config = load_config(TrainConfig, CONFIGS / f"{name}.yaml")
    preset, batch, warmup, ratios = SIGMA[name]
    blocks = tuple(range(14, 28)) if name.endswith("_kv") else ()
    kind = "conv" if blocks else None
    assert config.model == replace(PRESETS[preset], kv_compression=kind, kv_blocks=blocks)
    assert (config.model.kv_ratio, config.vae.scale, config.text) == (2, 0.13025, TextConfig(
        length=300, clean=False, null="empty"))  # fmt: skip
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.auto_lr, optimizer.clip) == ("came", 2e-5, "sqrt", 0.01)
    assert (optimizer.weight_decay, optimizer.warmup, config.train.ema) == (0, warmup, 0)
    assert (config.train.batch_size, config.data.aspect_ratios) == (batch, ratios)
    check_shapes(config)


@pytest.mark.parametrize("name", LORA)
def test_a_recipe_of_lora_adapts_the_model_of_its_full_recipe(name):
    config, full = (load_config(TrainConfig, CONFIGS / f"{each}.yaml") for each in (name, LORA[name]))
    assert (config.model, config.vae, config.text, config.init_from) == (
        full.model, full.vae, full.text, full.init_from)  # fmt: skip
    assert config.adapter == AdapterConfig("lora", {"rank": 16, "alpha": 16, "targets": "attention+mlp"})
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.clip) == ("adamw", 1e-4, 1.0)
    with torch.device("meta"):
        network = PixArt(config.model)
    adapter = adapt(network, config.adapter)
    assert sum(p.numel() for p in adapter.parameters()) * 4 < 64e6  # in bytes
    check_shapes(config)


@pytest.mark.parametrize("name", DREAMBOOTH)
def test_a_recipe_of_dreambooth_has_the_usual_settings(name):
    config = load_config(TrainConfig, CONFIGS / f"{name}.yaml")
    optimizer, booth = config.optimizer, config.dreambooth
    assert (optimizer.lr, optimizer.auto_lr, config.train.steps, config.train.batch_size) == (5e-6, "none", 800, 2)
    assert (booth.num_class_images, booth.prior_loss_weight) == (200, 1.0)
    spec = config.data_spec.data
    assert (spec.caption, spec.regularization_caption) == ("a photo of sks dog", "a photo of a dog")
    assert spec.regularization.endswith("class_images")
    check_shapes(config)


@pytest.mark.parametrize("name", LESS_MEMORY)
def test_a_recipe_for_a_card_trains_what_its_full_recipe_trains(name):
    config, full = (load_config(TrainConfig, CONFIGS / f"{each}.yaml") for each in (name, LESS_MEMORY[name]))
    changed = {key for key, value in to_dict(config).items() if value != to_dict(full)[key]}
    assert changed == {"output", "train"}
    assert config.train.batch_size // config.train.accumulation in (1, 4) and config.train.gradient_checkpointing
    check_shapes(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", LESS_MEMORY)
def test_a_recipe_for_a_card_fits_it(name):
    config = load_config(TrainConfig, CONFIGS / f"{name}.yaml", ["data.features=x"])
    said = float(re.search(r"(\d+\.\d) GiB", (CONFIGS / f"{name}.yaml").read_text())[1])
    assert estimate(config).memory_bytes / 2**30 == pytest.approx(said, abs=0.06) and said < 14


def test_every_recipe_is_tested_and_stages_follow_one_another():
    found = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")}
    found = {
        name for name in found if not name.startswith(("studies/", "adapters/"))
    }  # see test_study, test_adapter_experiments
    assert found - {*RECIPES, *SIGMA, *LORA, *DREAMBOOTH, *LESS_MEMORY} == {"openmoji", "openmoji_full"}
    before = None
    for name, (steps, batch, side) in PAPER.items():
        config = load_config(TrainConfig, CONFIGS / "paper" / f"{name}.yaml")
        assert (config.train.steps, config.train.batch_size, config.data.resolution) == (steps, batch, side)
        assert config.init_from == before
        before = config.output


def test_what_fine_tuning_lacks_is_told_in_one_go_before_any_work(tmp_path):
    done = run_command("train", CONFIGS / "finetune_512.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert [line.split(":")[0].strip() for line in done.stderr.splitlines()[1:]] == MISSING
    assert list(tmp_path.iterdir()) == []


def test_class_folders_get_the_names_of_their_classes_as_captions(tmp_path):
    for name in ("n01", "n02"):
        make_pictures(tmp_path / "imagenet" / name, count=2)
    (tmp_path / "names.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\nn03 shark\n")
    assert write_class_captions(tmp_path / "imagenet", tmp_path / "names.txt") == (4, 2)
    rows = [json.loads(line) for line in (tmp_path / "imagenet" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["text"]) for row in rows] == [
        ("n01/00.png", ["tench", "Tinca tinca"]),
        ("n01/01.png", ["tench", "Tinca tinca"]),
        ("n02/00.png", ["goldfish"]),
        ("n02/01.png", ["goldfish"]),
    ]
    with pytest.raises(InputError, match="already exists"):
        write_class_captions(tmp_path / "imagenet", tmp_path / "names.txt")


def test_class_captions_refuse_what_does_not_fit(tmp_path):
    make_pictures(tmp_path / "imagenet" / "n01", count=1)
    names = tmp_path / "names.txt"
    names.write_text("n02 goldfish\n")
    with pytest.raises(InputError, match="no line for 1 of 1 folders, the first is n01"):
        write_class_captions(tmp_path / "imagenet", names)
    names.write_text("n01 tench\nn01 goldfish\n")
    with pytest.raises(InputError, match=r"names.txt:2: expected a new folder name"):
        write_class_captions(tmp_path / "imagenet", names)
    names.write_text("n01\n")
    with pytest.raises(InputError, match=r"names.txt:1: "):
        write_class_captions(tmp_path / "imagenet", names)
    with pytest.raises(InputError, match="there is no such folder"):
        write_class_captions(tmp_path / "none", names)
    with pytest.raises(InputError, match="cannot be read"):
        write_class_captions(tmp_path / "imagenet", tmp_path / "none.txt")
    assert not (tmp_path / "imagenet" / "metadata.jsonl").exists()
