"""What most users come for, by the README's commands: a released .pth and a folder of pictures → a diffusers folder."""

import json
import shutil
import string
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from checkpoints import save_official
from pixart.checkpoint.files import checkpoints
from pixart.checkpoint.keys import NULL_CAPTION
from pixart.model import PixArt
from runs import ROOT, run_command
from toy import TINY, relative, tiny_model


def make_t5(folder: Path) -> Path:
    """A random T5 of two layers and width 16, with a tokenizer of single letters."""
    import transformers

    letters = [(letter, -3.0) for letter in string.ascii_lowercase]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    torch.manual_seed(0)
    shape = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    transformers.T5EncoderModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_vae(folder: Path) -> Path:
    """A random VAE of SD's layout and scale."""
    import diffusers

    torch.manual_seed(1)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    ).save_pretrained(folder)
    return folder


def take_pictures(source: Path, folder: Path, count: int) -> Path:
    """Some OpenMoji, with their names as captions in a .txt beside each."""
    folder.mkdir()
    for line in (source / "metadata.jsonl").read_text().splitlines()[:: 1900 // count][:count]:
        row = json.loads(line)
        text = row["text"] if isinstance(row["text"], str) else row["text"][0]
        shutil.copy(source / row["file_name"], folder)
        (folder / Path(row["file_name"]).with_suffix(".txt").name).write_text(text)
    return folder


def run(script: str, *arguments) -> str:
    done = run_command(script, *arguments)
    assert done.returncode == 0, f"{script}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_released_model_is_fine_tuned_sampled_and_opened_by_diffusers(emoji_folder, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="opens what comes out; extra: test")
    released = tiny_model(caption_length=120)
    settings = {  # what a user changes, and what makes it tiny
        "base": str(ROOT / "configs" / "finetune_512.yaml"),
        "output": str(tmp_path / "run"),
        "data": {"folder": str(take_pictures(emoji_folder, tmp_path / "mine", 12)), "resolution": 64, "workers": 0},
        "init_from": str(save_official(tmp_path / "released.pth", released)),
        "vae": {"source": str(make_vae(tmp_path / "vae"))},
        "text": {"model": str(make_t5(tmp_path / "t5"))},
        "model": {**TINY, "caption_length": 120},
        "train": {"steps": 6, "batch_size": 5, "sample_every": 3, "save_every": 3, "mixed_precision": "no",
                  "log_every": 2, "trackers": []},
        "sample": {"steps": 4},
    }  # fmt: skip
    settings["data"]["features"] = str(tmp_path / "features")
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(settings))

    run("extract", config)
    shutil.rmtree(tmp_path / "mine")  # training reads nothing of it
    assert f"starting from {settings['init_from']}" in run("train", config)
    run("sample", "--model", tmp_path / "run", "a red fox", "--out", tmp_path / "samples")
    run("convert", tmp_path / "run", tmp_path / "mine-diffusers", "--to", "diffusers-pipeline")

    trained = load_file(checkpoints(tmp_path / "run")[-1] / "ema" / "model.safetensors")
    for name, before in released.state_dict().items():
        if name == NULL_CAPTION:
            assert torch.equal(trained[name], before)
        else:  # six steps of a warm-up: away from the released weights, but not far
            assert 0 < relative(trained[name], before) < 0.01, name
    sheets = sorted((tmp_path / "run" / "samples").glob("*.png"))
    assert [sheet.name for sheet in sheets] == ["step_00000003.png", "step_00000006.png"]
    (picture,) = [path for path in (tmp_path / "samples").glob("*.png") if path.name != "contact_sheet.png"]
    assert Image.open(picture).size == (64, 64)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]

    pipeline = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path / "mine-diffusers")
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "use_resolution_binning": False, "output_type": "pt"}
    assert torch.isfinite(pipeline("a red fox", num_inference_steps=2, **options).images).all()
    ours = PixArt(released.config)
    ours.load_state_dict(trained)
    x, t, caption = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 20.0]), torch.randn(2, 7, 16)
    theirs = pipeline.transformer(
        x,
        encoder_hidden_states=caption,
        timestep=t,
        encoder_attention_mask=torch.ones(2, 7),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    assert relative(theirs, ours(x, t, caption)) <= 1e-6
