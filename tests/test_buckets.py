"""The aspect table against the authors' (tests/golden/aspect_buckets.json)."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixart.data.buckets import SAMPLING_RATIOS_ALPHA, SIZES_1024, Bucket, bucket_table, nearest_bucket
from pixart.errors import InputError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "aspect_buckets.json").read_text())
OFFICIAL = {float(ratio): tuple(size) for ratio, size in GOLDEN["train_1024"].items()}


def test_the_table_is_the_authors_in_their_order():
    assert list(SIZES_1024.items()) == list(OFFICIAL.items())
    assert len(OFFICIAL) == 40


@pytest.mark.parametrize("resolution", [256, 512, 1024, 2048])
def test_the_official_resolutions_are_the_table_scaled_exactly(resolution):
    table = bucket_table(resolution, 16)
    factor = resolution / 1024
    assert table == [Bucket(ratio, h * factor, w * factor) for ratio, (h, w) in OFFICIAL.items()]
    assert all(type(side) is int for bucket in table for side in (bucket.height, bucket.width))


def test_alpha_uses_33_of_them():
    assert list(SAMPLING_RATIOS_ALPHA) == [float(ratio) for ratio in GOLDEN["sampling_subset"]]
    assert len(SAMPLING_RATIOS_ALPHA) == 33


def test_the_square_table_has_one_bucket():
    assert bucket_table(512, 16, square=True) == [Bucket(1.0, 512, 512)]


@given(st.integers(1, 40), st.sampled_from([1, 4, 8, 16, 32]))
def test_any_resolution_gives_distinct_sizes_that_fit_and_keep_a_true_ratio(tokens, multiple):
    table = bucket_table(tokens * multiple, multiple)
    sizes = [(bucket.height, bucket.width) for bucket in table]
    assert len(set(sizes)) == len(sizes)
    assert all(side >= multiple and side % multiple == 0 for size in sizes for side in size)
    square = next(bucket for bucket in table if bucket.height == bucket.width == tokens * multiple)
    assert square.ratio == 1.0
    ratios = [bucket.ratio for bucket in table]
    assert ratios == sorted(ratios)
    for bucket in table:  # of the table's ratios that are rounded to a size, none is nearer to it
        exact = bucket.height / bucket.width
        merged = [r for r in OFFICIAL if r not in ratios or r == bucket.ratio]
        same = [r for r in merged if _scaled(r, tokens, multiple) == (bucket.height, bucket.width)]
        assert bucket.ratio in same
        assert abs(bucket.ratio - exact) == min(abs(r - exact) for r in same)


def _scaled(ratio: float, tokens: int, multiple: int) -> tuple[int, int]:
    return tuple(max(round(side * tokens / 1024), 1) * multiple for side in OFFICIAL[ratio])


def test_a_square_picture_is_square_at_a_small_resolution():
    table = bucket_table(32, 8)
    assert nearest_bucket(table, 500, 500) == Bucket(1.0, 32, 32)


@pytest.mark.parametrize(
    ("height", "width", "ratio"),
    [
        (1024, 1024, 1.0), (1, 1, 1.0), (1080, 1920, 0.57), (1920, 1080, 1.75), (2000, 3000, 0.68), (3000, 2000, 1.46),
        (1, 5000, 0.25), (5000, 1, 4.0), (97, 100, 0.94), (98, 100, 1.0),
    ],
)  # fmt: skip
def test_nearest_bucket_by_hand(height, width, ratio):
    assert nearest_bucket(bucket_table(1024, 16), height, width) == Bucket(ratio, *OFFICIAL[ratio])


@given(st.integers(1, 6000), st.integers(1, 6000))
def test_nearest_bucket_has_the_nearest_ratio(height, width):
    best = nearest_bucket(bucket_table(512, 16), height, width).ratio
    assert all(abs(best - height / width) <= abs(ratio - height / width) for ratio in OFFICIAL)


@pytest.mark.parametrize(("resolution", "multiple"), [(100, 16), (0, 16), (-16, 16), (8, 16)])
@pytest.mark.parametrize("square", [True, False])
def test_a_resolution_that_does_not_fit_is_refused(resolution, multiple, square):
    with pytest.raises(InputError, match=f"resolution {resolution} is not a multiple of {multiple}"):
        bucket_table(resolution, multiple, square=square)
