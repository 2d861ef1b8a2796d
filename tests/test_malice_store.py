"""Feature stores whose sources, models or own files change: reported, kept apart, rebuilt, or extended."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import pixart.features.extraction as extraction
from features import contents, make_store
from pixart.encoders.text import TextEncoder
from pixart.errors import InputError
from pixart.features import Share, extract
from pixart.features.append_only import PartFile
from pixart.features.repair import check_store
from pixart.features.store import FeatureStore, verify
from pixart.train.loop import train
from runs import build, change, make_pictures, settings

SMALL = {"extract__samples_per_file": 3, "extract__captions_per_file": 4, "extract__batch_size": 2,
         "extract__caption_batch": 3, "extract__latent_dtype": "float32", "data__posterior": "mean"}  # fmt: skip


@pytest.fixture
def pictures(tmp_path) -> Path:
    return make_pictures(tmp_path / "pictures", 8)


@pytest.fixture
def text(text_encoder, tmp_path) -> Path:
    return Path(shutil.copytree(text_encoder, tmp_path / "text"))


@pytest.fixture
def base(tmp_path, pictures, text) -> dict:
    return change(settings(tmp_path / "run", pictures, text), **SMALL)


@pytest.fixture
def store(base, tmp_path) -> Path:
    make_store(base, tmp_path / "store")
    return tmp_path / "store"


def again(base: dict, store: Path, **changes) -> list[str]:
    """Extract once more; what was said besides the scan."""
    config, said = build(base, data__features=str(store), **changes), []
    extract(config.data, config.data_spec.table, config.vae, config.text, config.extract, say=said.append)
    return said[1:]


def places(store: Path) -> dict[str, tuple[int, int]]:
    """Which file each of the sealed ones is; another one, once it was written anew (an inode alone may be reused)."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.glob("*-*.safetensors")}


def flip(path: Path, place: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1 << bit
    path.write_bytes(raw)


def no_encoding(monkeypatch) -> None:
    monkeypatch.setattr(TextEncoder, "load", lambda *_, **__: pytest.fail("the text encoder was loaded"))
    monkeypatch.setattr(extraction, "load_autoencoder", lambda *_, **__: pytest.fail("the autoencoder was loaded"))


# ---------------------------------------------------------------------------------------------- what the disk does


def test_what_the_check_finds_broken_is_made_again_and_nothing_else(base, store):
    good, before = contents(store), places(store)
    names = ["captions-00000.safetensors", "samples-00001.safetensors"]
    for name in names:
        flip(store / name, -3)
    assert check_store(store) == [f"{name} has changed since it was written" for name in names]
    with pytest.raises(InputError, match=r"is damaged: captions-00000\.safetensors has changed .*Extract again"):
        FeatureStore(store)
    assert again(base, store) == [f"{name}: has changed since it was written; it is made again" for name in names]
    assert contents(store) == good and verify(store) == []
    assert [name for name, place in sorted(places(store).items()) if before[name] != place] == names
    flip(store / "samples-00001.safetensors", -3)
    check_store(store)
    (store / "samples-00001.safetensors").write_bytes(good["samples-00001.safetensors"])  # from a copy of one's own
    assert check_store(store) == [] and len(FeatureStore(store)) == 8


def test_a_flipped_bit_in_a_note_condemns_no_shard(base, store, monkeypatch):
    good, before = contents(store), places(store)
    no_encoding(monkeypatch)
    for name in ("samples-00000.json", "captions-00001.json", "prompts.json"):
        for place in range(2, (store / name).stat().st_size - 3, 13):
            flip(store / name, place, place % 7)
            said = again(base, store)
            assert said in (
                [f"{name[:-5]}.json is damaged, but {name[:-5]}.safetensors is intact: the note is rewritten"],
                [],
            )
            assert contents(store) == good and places(store) == before


def test_a_damaged_note_of_an_unfinished_store_costs_its_own_file_alone(base, store, tmp_path):
    folder = tmp_path / "half"
    for rank in (1, 2):
        make_store(base, folder, Share(rank, 3))
    before = places(folder)
    flip(folder / "samples-00001.json", 20)
    reason = "its note is damaged, and nothing else shows whether it is intact; it is made again"
    assert again(base, folder) == [f"samples-00001.safetensors: {reason}"]
    assert contents(folder) == contents(store)
    assert {name for name, place in places(folder).items() if before.get(name, place) != place} <= {
        "samples-00001.safetensors"
    }


@pytest.mark.parametrize("name", ["vae.json", "text.json"])
def test_lost_facts_come_from_the_manifest_or_are_one_line(base, store, tmp_path, name):
    good = contents(store)
    (store / name).unlink()
    again(base, store)
    assert contents(store) == good
    for file in (name, "manifest.json"):
        (store / file).unlink()
    with pytest.raises(InputError, match=rf"{name} is lost, which says what the files there were made with"):
        again(base, store)


@pytest.mark.parametrize("content", ["[1, 2]", "3", "{", "[" * 100_000, '{"version": ' + "9" * 5000 + "}", "\0"])
@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "vae.json"])
def test_a_store_whose_json_is_no_mapping_is_one_line(base, store, name, content):
    good = contents(store)
    (store / name).write_text(content)
    if name == "manifest.json":
        with pytest.raises(InputError, match=r"manifest\.json: (cannot be read|expected a store's manifest)"):
            FeatureStore(store)
        again(base, store)  # writes it anew
        assert contents(store) == good
    else:
        with pytest.raises(InputError, match=rf"{name}: .*(cannot be read|expected keys and values)"):
            again(base, store)


# ------------------------------------------------------------------------------------------- what its users do


def replace_image(folder: Path) -> None:
    Image.effect_noise((8, 8), 90).convert("RGB").save(folder / "03.png")


def edit_caption(folder: Path) -> None:
    (folder / "03.txt").write_text("another caption")


def remove_image(folder: Path) -> None:
    (folder / "03.png").unlink()


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (replace_image, r"images were replaced: 1, e.g. 03\.png"),
        (edit_caption, r"captions changed: 1, e.g. 03\.png"),
        (remove_image, r"samples: 8 there, 7 now: 1 of the stored images are gone"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_what_changed_between_two_starts_is_refused_by_name(base, tmp_path, pictures, edit, expected, finished):
    make_store(base, tmp_path / "store", None if finished else Share(0, 2))
    before = contents(tmp_path / "store")
    edit(pictures)
    with pytest.raises(InputError, match=f"was started with another plan .*{expected}"):
        again(base, tmp_path / "store")
    assert contents(tmp_path / "store") == before


def test_an_image_replaced_during_an_extraction_is_not_mixed_in(base, tmp_path, pictures, store, monkeypatch):
    old, true_append = (pictures / "06.png").read_bytes(), PartFile.append

    def append(part, tensors):
        if "latents" in tensors:
            (pictures / "06.png").write_bytes(old + b"more")
        true_append(part, tensors)

    monkeypatch.setattr(PartFile, "append", append)
    with pytest.raises(InputError, match=r"06\.png: the size of its file has changed since this extraction started"):
        again(base, tmp_path / "second")
    with pytest.raises(InputError, match=r"images were replaced: 1, e.g. 06\.png"):
        again(base, tmp_path / "second")
    monkeypatch.setattr(PartFile, "append", true_append)
    (pictures / "06.png").write_bytes(old)
    again(base, tmp_path / "second")
    assert contents(tmp_path / "second") == contents(store)


def test_a_text_encoder_changed_during_an_extraction_is_not_mixed_in(base, tmp_path, store, monkeypatch):
    true_append, loaded = PartFile.append, []
    true_load = TextEncoder.load.__func__
    monkeypatch.setattr(
        TextEncoder, "load", classmethod(lambda cls, *a, **k: loaded.append(true_load(cls, *a, **k)) or loaded[-1])
    )

    def append(part, tensors):
        true_append(part, tensors)
        if "states" in tensors:
            next(loaded[0].model.parameters()).data.mul_(1.5)  # as another who writes into its mapped file

    monkeypatch.setattr(PartFile, "append", append)
    with pytest.raises(InputError, match=r"the weights of the text encoder .* have changed since"):
        again(base, tmp_path / "second")
    monkeypatch.setattr(PartFile, "append", true_append)
    again(base, tmp_path / "second")
    assert contents(tmp_path / "second") == contents(store)


def test_a_text_encoder_changed_in_place_between_two_starts_is_refused(base, tmp_path, text):
    make_store(base, tmp_path / "store", Share(0, 2))
    state = {name: tensor * 1.5 for name, tensor in load_file(text / "model.safetensors").items()}
    save_file(state, text / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"was started with another text encoder \(weights: "):
        again(base, tmp_path / "store")


def test_all_parts_are_looked_at_before_the_first_caption_is_encoded(base, tmp_path, monkeypatch):
    monkeypatch.setattr(TextEncoder, "encode", lambda *_, **__: pytest.fail("a caption was encoded"))
    kl = {"vae__kind": "kl", "vae__source": str(tmp_path / "nowhere"), "model__in_channels": 4}
    with pytest.raises(InputError, match=r"VAE .*: no such folder"):
        again(base, tmp_path / "store", **kl, data__resolution=32, model__latent_size=4)
    with pytest.raises(InputError, match="text encoder"):
        again(base, tmp_path / "store", text__model=str(tmp_path / "nowhere"))


def test_a_plan_that_failed_before_any_work_does_not_bind_the_next_try(base, tmp_path, store, monkeypatch):
    true_append = PartFile.append

    def append(part, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PartFile, "append", append)
    with pytest.raises(InputError, match="No space left"):
        again(base, tmp_path / "second", extract__batch_size=5, data__every=2, text__length=11)
    (tmp_path / "second" / "prompts.json").unlink()  # which were done before the captions
    (tmp_path / "second" / "prompts.safetensors").unlink()
    monkeypatch.setattr(PartFile, "append", true_append)
    again(base, tmp_path / "second")
    assert contents(tmp_path / "second") == contents(store)


# ----------------------------------------------------------------------------------------------------- sets that grow


def grow(folder: Path, start: int, count: int) -> None:
    make_pictures(folder / "new", start + count)
    for i in range(start, start + count):
        (folder / "new" / f"{i:02d}.png").rename(folder / f"{i:02d}.png")
        (folder / "new" / f"{i:02d}.txt").rename(folder / f"{i:02d}.txt")
    shutil.rmtree(folder / "new")


def test_of_a_set_that_grew_only_what_is_new_is_encoded(base, tmp_path, pictures, store, monkeypatch):
    before, files = contents(store), places(store)
    shutil.copy(pictures / "02.txt", pictures / "x.txt")  # an old caption, which is encoded already
    grow(pictures, 8, 4)
    Image.new("RGB", (8, 8), "red").save(pictures / "x.png")
    asked, true_encode = [], extraction.encode_captions
    monkeypatch.setattr(
        extraction, "encode_captions", lambda e, texts, **k: asked.extend(texts) or true_encode(e, texts, **k)
    )
    again(base, store)
    assert sorted(asked) == sorted((pictures / f"{i:02d}.txt").read_text() for i in range(8, 12))
    assert {name: content for name, content in contents(store).items() if name in files} == {
        name: before[name] for name in files
    }
    make_store(base, tmp_path / "fresh")
    grown, fresh = FeatureStore(store), FeatureStore(tmp_path / "fresh")
    assert len(grown) == len(fresh) == 13 and grown.manifest["captions"] == 12
    by_id = {fresh.get(i).id: i for i in range(13)}
    for i in range(13):
        a, b = grown.get(i), fresh.get(by_id[grown.get(i).id])
        assert torch.equal(a.mean, b.mean)
        (one,), (other,) = a.captions, b.captions
        assert grown.text(one) == fresh.text(other)
        assert torch.allclose(grown.caption(one), fresh.caption(other), atol=1e-5)
    assert again(base, store) == [] and verify(store) == []
    grow(pictures, 20, 2)
    again(base, store)
    assert len(FeatureStore(store)) == 15
    edit_caption(pictures)
    with pytest.raises(InputError, match=r"captions changed: 1, e.g. 03\.png"):
        again(base, store)
    train(build(base, data__features=str(store), train__batch_size=2))


def test_a_set_that_grows_by_shares_and_kills_is_the_same_store(base, tmp_path, pictures, store):
    shutil.copytree(store, tmp_path / "other")
    grow(pictures, 8, 7)
    again(base, store)
    for share in (Share(1, 2), Share(0, 2)):
        make_store(base, tmp_path / "other", share)
    assert contents(tmp_path / "other") == contents(store)


def test_a_store_of_an_earlier_version_goes_on_and_grows(base, pictures, store):
    (store / "plan.hashes").unlink()  # which it does not have, nor checksums of notes
    for path in store.glob("*.json"):
        values = json.loads(path.read_text())
        if path.name != "manifest.json" and values.pop("checksum", None):
            path.write_text(json.dumps(values, indent=1) + "\n")
    before = places(store)
    assert again(base, store) == []
    os.remove(store / "plan.hashes")
    grow(pictures, 8, 4)
    assert again(base, store) == []
    assert len(FeatureStore(store)) == 12 and before.items() <= places(store).items()
    os.remove(store / "plan.hashes")
    edit_caption(pictures)
    with pytest.raises(InputError, match=r"was started with another plan \(.*source"):
        again(base, store)
