"""Samples and batches: pixels exactly, and randomness that is a function of (seed, epoch, id) alone."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pixart.data import images
from pixart.data.batches import BucketBatches
from pixart.data.buckets import Bucket, bucket_table
from pixart.data.config import DataConfig
from pixart.data.images import Record
from pixart.data.samples import Batch, Captions, Drawing, ImageDataset, collate, encode_captions
from pixart.data.sources import scan
from pixart.errors import InputError

RANDOM = ("noise", "posterior_noise", "time", "drop")
WIDTH = 6


class Words:
    """A stand-in for a text encoder: one token a letter, whose state is the letter's code."""

    def __init__(self):
        self.calls = []

    def encode(self, captions, *, truncate):
        assert truncate
        self.calls.append(list(captions))
        length = max(map(len, captions))
        states, mask = torch.zeros(len(captions), length, WIDTH), torch.zeros(len(captions), length, dtype=torch.int64)
        for i, caption in enumerate(captions):
            states[i, : len(caption)] = torch.tensor([float(ord(c)) for c in caption])[:, None]
            mask[i, : len(caption)] = 1
        return states, mask


@pytest.fixture(scope="module")
def records(emoji_folder) -> list[Record]:
    return scan(DataConfig(str(emoji_folder)), bucket_table(32, 8, square=True)).records[::100]


@pytest.fixture(scope="module")
def captions(records) -> Captions:
    return encode_captions(Words(), [c for record in records for c in record.captions], dtype=torch.float32)


@pytest.fixture
def make(records, captions):
    def make(seed: int = 0, **options) -> ImageDataset:
        return ImageDataset(records, captions, Drawing(seed), **{"latent_channels": 4, "downsample": 8, **options})

    return make


@pytest.fixture
def picture_record(tmp_path):
    def make(width=48, height=32, bucket=Bucket(1.0, 16, 16), captions=("a",), name="p.png") -> Record:  # noqa: B008
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
        return Record(name, tmp_path / name, captions, (1 / len(captions),) * len(captions), height, width, bucket)

    return make


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_a_sample_depends_on_nothing_but_seed_epoch_and_id(make, records, captions):
    dataset = make(flip=True)
    first = dataset[0, 5]
    for key in [(0, 3), (1, 5), (0, 19)]:
        dataset[key]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert same(dataset[0, 5], first)
    # the same picture under another index, among other pictures
    alone = ImageDataset([records[5]], captions, Drawing(0), latent_channels=4, downsample=8, flip=True)
    assert same(alone[0, 0], first)


def test_another_epoch_seed_or_id_has_other_randomness(make, records, captions):
    moved = [dataclasses.replace(records[5], id="other.png")]
    base = make()[0, 5]
    others = [
        make()[1, 5],
        make(seed=1)[0, 5],
        make()[0, 6],
        ImageDataset(moved, captions, Drawing(0), latent_channels=4, downsample=8)[0, 0],
    ]
    for other in others:
        for name in RANDOM:
            assert not np.array_equal(base[name], other[name]), name


def test_drawing_leaves_the_global_generators_alone(make):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make(flip=True)[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_crop_and_cache_do_not_change_the_other_randomness(make):
    base = make()
    for options in ({"flip": True}, {"random_crop": True}, {"cache": True}, {"flip": True, "random_crop": True}):
        dataset = make(**options)
        for key in [(0, 0), (0, 7), (3, 7)]:
            for name in RANDOM:
                assert np.array_equal(base[key][name], dataset[key][name])


@pytest.mark.parametrize("options", [{"flip": True}, {"flip": True, "cache": True}])
def test_workers_change_nothing(make, records, options):
    def batches(workers: int) -> list[Batch]:
        dataset = make(**options)
        sampler = BucketBatches([0] * len(records), 4, seed=0)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
        return [batch for batch, _ in zip(loader, range(12), strict=False)]  # some three epochs

    for mine, theirs in zip(batches(0), batches(2), strict=True):
        assert mine.ids == theirs.ids
        for field in dataclasses.fields(Batch):
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_noise_is_standard_normal_and_times_and_dropout_are_uniform(make):
    samples = [make()[epoch, index] for epoch in range(40) for index in range(20)]
    noise = torch.stack([s["noise"] for s in samples] + [s["posterior_noise"] for s in samples]).flatten().double()
    n = len(noise)
    assert abs(noise.mean()) < 5 / n**0.5
    assert abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / n) ** 0.5
    for name in ("time", "drop"):
        values = torch.tensor([s[name] for s in samples]).double()
        assert values.min() >= 0
        assert values.max() < 1
        assert abs(values.mean() - 0.5) < 5 * (1 / 12 / len(values)) ** 0.5
        assert abs(values.var() - 1 / 12) < 5 * (1 / 180 / len(values)) ** 0.5
    columns = torch.stack(
        [torch.tensor([s["time"], s["drop"], s["noise"][0, 0, 0], s["posterior_noise"][0, 0, 0]]) for s in samples]
    )
    independent = torch.corrcoef(columns.T.double()) - torch.eye(4)
    assert independent.abs().max() < 5 / len(samples) ** 0.5


def test_noise_has_the_shape_of_the_latents(picture_record):
    record = picture_record(bucket=Bucket(0.5, 32, 64))
    dataset = ImageDataset(
        [record], Captions([torch.ones(1, 2)], {"a": 0}), Drawing(0), latent_channels=5, downsample=8
    )
    assert dataset[0, 0]["noise"].shape == dataset[0, 0]["posterior_noise"].shape == (5, 4, 8)
    assert dataset[0, 0]["pixels"].shape == (3, 32, 64)
    assert not torch.equal(dataset[0, 0]["noise"], dataset[0, 0]["posterior_noise"])


def test_pixels_are_the_pictures_from_minus_one_to_one_exactly(make, records):
    dataset = make()
    for index, record in enumerate(records):
        image = torch.from_numpy(np.array(Image.open(record.picture).convert("RGB"))).permute(2, 0, 1)
        pixels = dataset[0, index]["pixels"]
        assert pixels.dtype == torch.float32
        assert torch.equal(((pixels.double() + 1) * 127.5).round().to(torch.uint8), image)
        assert (pixels.double() - (image.double() / 127.5 - 1)).abs().max() < 1e-7
    everything = torch.stack([dataset[0, i]["pixels"] for i in range(len(records))])
    assert everything.max() == 1.0  # white is 1
    assert everything.min() == -1.0  # OpenMoji's outlines are black


def test_flip_mirrors_half_of_the_pictures_and_leaves_the_rest(picture_record):
    options = {"drawing": Drawing(0), "latent_channels": 1, "downsample": 16, "cache": True}
    records, captions = [picture_record()], Captions([torch.ones(1, 2)], {"a": 0})
    before = ImageDataset(records, captions, **options)[0, 0]["pixels"]
    flipping = ImageDataset(records, captions, flip=True, **options)
    mirrored = 0
    for epoch in range(2000):
        after = flipping[epoch, 0]["pixels"]
        mirrored += torch.equal(after, before.flip(-1))
        assert torch.equal(after, before.flip(-1)) or torch.equal(after, before)
    assert abs(mirrored - 1000) < 5 * (2000 / 4) ** 0.5


def test_random_crops_cover_what_is_left_over_and_a_centre_crop_is_in_the_middle(picture_record):
    record = picture_record(48, 16, Bucket(1.0, 16, 16))
    captions = Captions([torch.ones(1, 2)], {"a": 0})
    original = torch.from_numpy(np.array(Image.open(record.picture))).permute(2, 0, 1).float() / 127.5 - 1
    windows = original.unfold(2, 16, 1).permute(2, 0, 1, 3)  # (33, 3, 16, 16)

    def left(pixels: torch.Tensor) -> int:
        return (windows == pixels).flatten(1).all(1).nonzero().item()

    centre = ImageDataset([record], captions, Drawing(0), latent_channels=1, downsample=8)
    assert {left(centre[epoch, 0]["pixels"]) for epoch in range(5)} == {16}
    anywhere = ImageDataset([record], captions, Drawing(0), latent_channels=1, downsample=8, random_crop=True)
    lefts = [left(anywhere[epoch, 0]["pixels"]) for epoch in range(300)]
    assert set(lefts) == set(range(33))
    assert abs(np.mean(lefts) - 16) < 5 * 9.3 / 300**0.5


def test_the_cache_gives_the_same_and_reads_a_file_once(make, records, tmp_path):
    plain, cached = make(flip=True), make(flip=True, cache=True)
    for _ in range(2):
        for key in [(0, 0), (1, 0), (0, 4)]:
            assert same(plain[key], cached[key])
    copy = tmp_path / "copy.png"
    copy.write_bytes(records[0].picture.read_bytes())
    copied = [dataclasses.replace(records[0], picture=copy)]
    dataset = ImageDataset(copied, plain.captions, Drawing(0), latent_channels=4, downsample=8, cache=True)
    before = dataset[0, 0]
    before["pixels"].zero_()  # whoever changes a sample does not change the cache
    copy.unlink()
    assert torch.equal(dataset[1, 0]["pixels"], plain[1, 0]["pixels"]) or torch.equal(
        dataset[1, 0]["pixels"], plain[1, 0]["pixels"].flip(-1)
    )
    assert dataset[1, 0]["problem"] is None


def test_cache_and_random_crop_together_are_refused(make):
    with pytest.raises(InputError, match="random_crop"):
        make(cache=True, random_crop=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("flip", [True, False])
def test_reading_a_sample_is_silent(make, flip):
    torch.set_warn_always(True)  # torch says most things once in a process
    try:
        for epoch in range(4):
            make(flip=flip)[epoch, 0]
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("damage", ["gone", "empty", "truncated", "bomb"])
def test_an_unreadable_picture_gets_weight_zero_and_is_named(picture_record, monkeypatch, damage):
    record = picture_record()
    if damage == "gone":
        record.picture.unlink()
    elif damage == "empty":
        record.picture.write_bytes(b"")
    elif damage == "truncated":
        record.picture.write_bytes(record.picture.read_bytes()[:1500])
    else:
        monkeypatch.setattr(images, "MAX_PIXELS", 100)
        record = dataclasses.replace(record, height=1, width=1)
    good = picture_record(8, 8, name="good.png") if damage != "bomb" else dataclasses.replace(record, id="also.png")
    dataset = ImageDataset(
        [record, good], Captions([torch.ones(2, 3)], {"a": 0}), Drawing(0), latent_channels=4, downsample=8, cache=True
    )
    batch = collate([dataset[0, 0], dataset[0, 1]])
    assert batch.weight[0] == 0
    assert batch.weight[1] == (damage != "bomb")
    assert batch.problems[0][0] == "p.png"
    assert batch.problems[0][1].startswith("unreadable: ")
    assert len(batch.problems) == 2 - batch.weight.sum()
    assert batch.pixels[0].isfinite().all()
    assert batch.pixels.shape == (2, 3, 16, 16)


def test_an_image_that_can_be_read_again_is_used_again_with_a_cache(picture_record):
    record = picture_record()
    content = record.picture.read_bytes()
    record.picture.write_bytes(b"")
    dataset = ImageDataset(
        [record], Captions([torch.ones(2, 3)], {"a": 0}), Drawing(0), latent_channels=4, downsample=8, cache=True
    )
    assert dataset[0, 0]["weight"] == 0.0
    record.picture.write_bytes(content)
    assert dataset[0, 0]["weight"] == 1.0
    assert dataset[0, 0]["problem"] is None


def test_several_captions_are_drawn_equally_often(picture_record):
    names = ("a", "b", "c")
    captions = Captions([torch.full((1, 2), float(i)) for i in range(3)], {name: i for i, name in enumerate(names)})
    dataset = ImageDataset([picture_record(captions=names)], captions, Drawing(0), latent_channels=1, downsample=16)
    taken = [int(dataset[epoch, 0]["caption"][0, 0]) for epoch in range(600)]
    assert all(abs(taken.count(i) - 200) < 5 * (600 * 2 / 9) ** 0.5 for i in range(3))


def test_micro_conditions_are_the_original_size_and_the_buckets_rounded_ratio(picture_record):
    table = bucket_table(256, 16)
    bucket = next(b for b in table if b.ratio == 0.57)
    dataset = ImageDataset(
        [picture_record(190, 110, bucket)],
        Captions([torch.ones(1, 2)], {"a": 0}),
        Drawing(0),
        latent_channels=4,
        downsample=8,
    )
    batch = collate([dataset[0, 0]])
    assert batch.size.tolist() == [[110.0, 190.0]]  # height, width
    assert batch.aspect_ratio.tolist() == [np.float32(0.57)]  # not 192 / 336
    assert batch.size.dtype == batch.aspect_ratio.dtype == torch.float32


@pytest.mark.parametrize("weights", [(0.7, 0.1, 0.2), (1 / 3, 1 / 3, 1 / 3)])
def test_captions_are_drawn_in_proportion_to_their_weights(picture_record, weights):
    captions = Captions([torch.full((2, WIDTH), float(i)) for i in range(3)], {"a": 0, "b": 1, "c": 2})
    record = dataclasses.replace(picture_record(captions=("a", "b", "c")), weights=weights)
    dataset = ImageDataset([record], captions, Drawing(0), latent_channels=1, downsample=16, cache=True)
    taken = [int(dataset[epoch, 0]["caption"][0, 0]) for epoch in range(1000)]
    for i, weight in enumerate(weights):
        assert abs(taken.count(i) - 1000 * weight) < 5 * (1000 * weight * (1 - weight)) ** 0.5


def sample(length: int, name: str = "a", **changes) -> dict:
    return {
        "pixels": torch.zeros(3, 8, 8), "noise": torch.zeros(4, 1, 1), "posterior_noise": torch.zeros(4, 1, 1),
        "time": 0.25, "caption": torch.arange(1.0, length * WIDTH + 1).reshape(length, WIDTH).bfloat16(), "drop": 0.5,
        "size": (8.0, 9.0), "aspect_ratio": 1.0, "weight": 1.0, "id": name, "problem": None, **changes,
    }  # fmt: skip


def test_collate_pads_captions_with_zeros_and_masks_the_padding():
    batch = collate([sample(2, "a"), sample(5, "b"), sample(1, "c", problem="unreadable: x", weight=0.0)])
    assert batch.caption.shape == (3, 5, WIDTH)
    assert batch.caption.dtype == torch.bfloat16
    assert batch.caption_mask.dtype == torch.bool
    assert batch.caption_mask.tolist() == [
        [True, True, False, False, False],
        [True] * 5,
        [True, False, False, False, False],
    ]
    assert torch.equal(batch.caption[1], sample(5)["caption"])
    assert torch.equal(batch.caption[0, :2], sample(2)["caption"])
    assert (batch.caption[~batch.caption_mask] == 0).all()
    assert batch.ids == ["a", "b", "c"]
    assert batch.problems == [("c", "unreadable: x")]
    assert batch.weight.tolist() == [1.0, 1.0, 0.0]
    assert batch.time.tolist() == [0.25] * 3
    assert batch.size.shape == (3, 2)


def test_collate_keeps_every_bit_of_the_times(make):
    samples = [make()[epoch, 0] for epoch in range(50)]
    batch = collate(samples)
    assert batch.time.double().tolist() == [s["time"] for s in samples]
    assert batch.drop.double().tolist() == [s["drop"] for s in samples]


def test_a_caption_without_tokens_is_refused():
    with pytest.raises(InputError, match=r"b\.png: its caption has no token"):
        collate([sample(2), sample(0, "b.png")])


def test_moving_and_pinning_a_batch_keep_every_field(monkeypatch):
    batch = collate([sample(2), sample(3, "b", problem="x")])
    moved = batch.to("meta")
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    held = batch.pin_memory()
    for field in dataclasses.fields(Batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            assert getattr(moved, field.name).device.type == "meta", field.name
            assert (getattr(moved, field.name).shape, getattr(moved, field.name).dtype) == (value.shape, value.dtype)
            assert torch.equal(getattr(held, field.name), value)
        else:
            assert getattr(moved, field.name) == getattr(held, field.name) == value
    assert len(pinned) == sum(isinstance(getattr(batch, f.name), torch.Tensor) for f in dataclasses.fields(Batch)) == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_captions_keeps_real_tokens_of_each_distinct_caption_in_its_own_memory(dtype):
    words = Words()
    captions = encode_captions(words, ["ccc", "z", "yy", "z", "aaaa"], dtype=dtype, batch_size=2)
    assert words.calls == [["z", "yy"], ["ccc", "aaaa"]]  # distinct, and of similar length
    for caption in ("z", "yy", "ccc", "aaaa"):
        states = captions[caption]
        assert states.dtype == dtype
        assert states[:, 0].tolist() == [float(ord(c)) for c in caption]
        assert states.shape == (len(caption), WIDTH)
        # not a view that keeps the whole batch
        assert states.untyped_storage().nbytes() == states.numel() * states.element_size()
