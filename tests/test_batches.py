"""The bucket batch sampler: which rank gets which sample when, for any number of ranks and any position."""

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixart.data.batches import BucketBatches
from pixart.errors import InputError
from pixart.seeds import derive_seed


def take(count: int, batches: BucketBatches) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(batches, count))


@st.composite
def cases(draw, leftovers=("drop", "fill")):
    """Bucket sizes, then a global batch that the ranks and accumulation divide and that at least one bucket fills."""
    ranks, accumulation = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    global_batch = ranks * accumulation * draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 3 * global_batch), min_size=1, max_size=4))
    sizes[0] += global_batch
    buckets = draw(st.permutations([number for number, size in enumerate(sizes) for _ in range(size)]))
    options = {"seed": draw(st.integers(0, 2**40)), "leftovers": draw(st.sampled_from(leftovers))}
    return buckets, global_batch, ranks, accumulation, options


def all_ranks(buckets, global_batch, ranks, accumulation, options, *, epochs=1, position=0):
    """Global batches as the ranks together see them: [step][rank][micro-step]."""
    one = BucketBatches(buckets, global_batch, **options)
    steps = one.per_epoch * epochs
    streams = []
    for rank in range(ranks):
        batches = BucketBatches(
            buckets, global_batch, rank=rank, ranks=ranks, accumulation=accumulation, position=position, **options
        )
        micros = take(steps * accumulation, batches)
        streams.append([micros[i : i + accumulation] for i in range(0, len(micros), accumulation)])
    return [[stream[step] for stream in streams] for step in range(steps)]


def flat(step) -> list[tuple[int, int]]:
    return [key for rank in step for micro in rank for key in micro]


@given(cases(leftovers=["drop"]))
def test_drop_shows_no_sample_twice_in_an_epoch_and_reports_what_it_leaves_out(case):
    buckets, global_batch, *_ = case
    batches = BucketBatches(buckets, global_batch, **case[-1])
    for epoch in (0, 1):
        keys = [key for step in batches.epoch(epoch) for key in step]
        assert len(set(keys)) == len(keys)
        assert {e for e, _ in keys} == {epoch}
        assert len(keys) == len(buckets) - batches.dropped
    by_hand = sum(size % global_batch for size in Counter(buckets).values())
    assert batches.dropped == by_hand
    assert batches.per_epoch == (len(buckets) - by_hand) / global_batch


@given(cases(leftovers=["fill"]))
def test_fill_shows_every_sample_in_every_epoch_and_no_key_twice(case):
    buckets, global_batch, *_ = case
    batches = BucketBatches(buckets, global_batch, **case[-1])
    assert batches.dropped == 0
    for epoch in (0, 1):
        steps = batches.epoch(epoch)
        keys = [key for step in steps for key in step]
        own = [index for e, index in keys if e == epoch]
        assert sorted(own) == list(range(len(buckets)))  # each exactly once under this epoch's randomness
        assert len(set(keys)) == len(keys)  # a repeated sample has a later epoch's noise
        assert all(e >= epoch for e, _ in keys)
        assert len(steps) == batches.per_epoch == sum(-(-size // global_batch) for size in Counter(buckets).values())


def test_fill_of_a_bucket_smaller_than_its_gap_repeats_its_samples_with_other_randomness():
    batches = BucketBatches([0], 4, seed=0, leftovers="fill")
    assert batches.epoch(5) == [[(5, 0), (6, 0), (7, 0), (8, 0)]]


@given(cases())
def test_the_ranks_together_see_the_global_batches_whatever_their_number_and_accumulation(case):
    buckets, global_batch, _, _, options = case
    expected = BucketBatches(buckets, global_batch, **options).epoch(0)
    assert all(len(step) == global_batch for step in expected)
    for step, whole in zip(all_ranks(*case), expected, strict=True):
        assert [key for parts in zip(*step, strict=True) for part in parts for key in part] == whole  # micro, rank


@given(cases())
def test_micro_batches_of_a_step_are_equal_in_size_and_of_one_bucket_on_all_ranks(case):
    buckets, global_batch, ranks, accumulation, _ = case
    for step in all_ranks(*case, epochs=2):
        assert {len(rank) for rank in step} == {accumulation}
        assert {len(micro) for rank in step for micro in rank} == {global_batch // (ranks * accumulation)}
        assert len({buckets[index] for _, index in flat(step)}) == 1


@given(cases(), st.data())
def test_resuming_at_any_position_is_exact(case, data):
    buckets, global_batch, ranks, accumulation, options = case
    rank = data.draw(st.integers(0, ranks - 1))
    per_epoch = BucketBatches(buckets, global_batch, **options).per_epoch
    position = data.draw(st.integers(0, 3 * per_epoch))

    def make(position):
        return BucketBatches(
            buckets, global_batch, rank=rank, ranks=ranks, accumulation=accumulation, position=position, **options
        )

    total = 4 * per_epoch
    undisturbed = take(total * accumulation, make(0))
    assert take((total - position) * accumulation, make(position)) == undisturbed[position * accumulation :]


def test_resuming_works_at_every_single_position():
    buckets = [0] * 7 + [1] * 5 + [2] * 2
    whole = take(40, BucketBatches(buckets, 2, seed=3))
    for position in range(40):
        assert take(40 - position, BucketBatches(buckets, 2, seed=3, position=position)) == whole[position:]


def test_resuming_with_another_number_of_ranks_gives_the_same_global_batches():
    case = [0] * 30 + [1] * 19, 6
    options = {"seed": 1, "leftovers": "fill"}
    expected = [sorted(flat(step)) for step in all_ranks(*case, 1, 1, options, epochs=2)][4:]
    resumed = [sorted(flat(step)) for step in all_ranks(*case, 3, 2, options, epochs=2, position=4)]
    assert resumed[: len(expected)] == expected


def test_epochs_and_seeds_differ_in_the_order_of_samples_and_of_buckets():
    buckets = [0] * 64 + [1] * 64
    batches = BucketBatches(buckets, 8, seed=0)
    orders = [[index for step in batches.epoch(epoch) for _, index in step] for epoch in range(3)]
    orders.append([index for step in BucketBatches(buckets, 8, seed=1).epoch(0) for _, index in step])
    assert len({tuple(order) for order in orders}) == 4
    turns = [tuple(buckets[order[i]] for i in range(0, 128, 8)) for order in orders]
    assert len(set(turns)) == 4
    assert all(sorted(order) == list(range(128)) for order in orders)


def test_other_samples_are_dropped_in_the_next_epoch():
    batches = BucketBatches([0] * 11, 4, seed=0)
    seen = [{index for step in batches.epoch(epoch) for _, index in step} for epoch in range(20)]
    assert all(len(indices) == 8 for indices in seen)
    assert set.union(*seen) == set(range(11))


def test_all_orders_are_equally_likely():
    first = Counter(BucketBatches([0] * 4, 4, seed=seed).epoch(0)[0][0][1] for seed in range(2000))
    assert all(abs(first[i] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for i in range(4))  # five sigma


def test_iterating_again_starts_at_the_same_position():
    batches = BucketBatches([0] * 9, 2, seed=0, position=3)
    assert take(5, batches) == take(5, batches)


def test_another_process_draws_the_same_batches_and_seeds():
    code = (
        "import itertools; from pixart.data.batches import *; from pixart.seeds import derive_seed; "
        "b = BucketBatches([0, 1] * 9, 4, seed=7, rank=1, ranks=2); "
        "print(list(itertools.islice(b, 12)), derive_seed(1, 'é', (2, 3)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    batches = BucketBatches([0, 1] * 9, 4, seed=7, rank=1, ranks=2)
    assert result.stdout.strip() == f"{take(12, batches)} {derive_seed(1, 'é', (2, 3))}"


def test_seeds_are_63_bit_and_differ_with_every_part():
    seeds = {derive_seed(seed, epoch, name) for seed in range(20) for epoch in range(20) for name in ("a", "b", 1)}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


@pytest.mark.parametrize(
    ("global_batch", "options", "expected"),
    [
        (10, {"ranks": 4}, "batch_size 10 is not a multiple of 4 processes × 1 accumulation steps"),
        (6, {"ranks": 2, "accumulation": 2}, "batch_size 6 is not a multiple of 2 processes × 2 accumulation steps"),
        (0, {}, "batch_size 0 is not a multiple of"),
        (9, {}, r"no bucket has the 9 images of one batch \(the largest has 8\)"),
    ],
)
def test_an_impossible_batch_is_refused(global_batch, options, expected):
    with pytest.raises(InputError, match=expected):
        BucketBatches([0] * 8 + [1] * 3, global_batch, seed=0, **options)


def test_an_empty_data_set_is_refused():
    with pytest.raises(InputError, match=r"the largest has 0"):
        BucketBatches([], 1, seed=0, leftovers="fill")


# ------------------------------------------------------------------------------------------------------- several sets


@st.composite
def mixtures(draw):
    """Two or three sets over two buckets, with repeats from an eighth to three."""
    counts = draw(st.lists(st.integers(1, 30), min_size=2, max_size=3))
    buckets = draw(st.lists(st.integers(0, 1), min_size=sum(counts), max_size=sum(counts)))
    repeats = [draw(st.sampled_from([0.125, 0.3, 0.5, 1.0, 1.5, 3.0])) for _ in counts]
    ranks = draw(st.integers(1, 8))
    options = {
        "seed": draw(st.integers(0, 2**40)),
        "sets": list(zip(counts, repeats, strict=True)),
        "leftovers": "fill",
    }
    return buckets, ranks, options


def shares_of(buckets, sets):
    """{(set, bucket): (its samples, how many an epoch shows)}, counted by hand."""
    shares, first = {}, 0
    for which, (count, repeats) in enumerate(sets):
        for bucket in (0, 1):
            samples = [i for i in range(first, first + count) if buckets[i] == bucket]
            shares[which, bucket] = (samples, round(repeats * len(samples)))
        first += count
    return shares


@given(mixtures())
def test_an_epoch_shows_each_set_as_often_as_its_repeats_say_and_no_key_twice(case):
    buckets, _, options = case
    shares = shares_of(buckets, options["sets"])
    if not any(share for _, share in shares.values()):
        return
    batches = BucketBatches(buckets, 1, **options)
    seen = Counter()
    for epoch in range(8):
        keys = [key for step in batches.epoch(epoch) for key in step]
        assert len(set(keys)) == len(keys)
        for samples, share in shares.values():
            assert sum(index in set(samples) for _, index in keys) == share
        seen.update(keys)
    assert all(count == 1 for count in seen.values())  # nor in another epoch
    for samples, share in shares.values():  # evenly: whole passes, and at most one part of a pass
        times = Counter(index for _, index in seen if index in set(samples))
        assert not share or max(times[i] for i in samples) - min(times[i] for i in samples) <= 1


@given(mixtures(), st.data())
def test_mixed_sets_resume_at_any_position_on_any_number_of_ranks(case, data):
    buckets, ranks, options = case
    if not any(share for _, share in shares_of(buckets, options["sets"]).values()):
        return
    whole = BucketBatches(buckets, ranks, **options)
    position = data.draw(st.integers(0, 3 * whole.per_epoch))
    expected = [batch for epoch in range(5) for batch in whole.epoch(epoch)][position : position + 6]
    streams = [
        take(6, BucketBatches(buckets, ranks, rank=rank, ranks=ranks, position=position, **options))
        for rank in range(ranks)
    ]
    for step, batch in enumerate(expected):
        assert [key for stream in streams for key in stream[step]] == batch
        assert len({buckets[index] for _, index in batch}) == 1


def test_the_positions_of_a_set_in_an_epoch_differ_between_epochs():
    sampler = BucketBatches([0] * 40, 40, seed=0, sets=[(25, 1.0), (15, 1.0)])
    places = [tuple(index < 25 for _, index in sampler.batch(epoch, 0)) for epoch in range(20)]
    assert all(sum(place) == 25 for place in places)
    assert len(set(places)) == 20


def test_one_set_with_repeats_of_one_is_the_order_without_sets():
    buckets = [0] * 9 + [1] * 5
    plain, sets = BucketBatches(buckets, 2, seed=4), BucketBatches(buckets, 2, seed=4, sets=[(14, 1.0)])
    assert [plain.epoch(e) for e in range(3)] == [sets.epoch(e) for e in range(3)]


def test_memory_is_twelve_bytes_per_sample():
    buckets = np.arange(10_000, dtype=np.int16) % 40
    batches = BucketBatches(buckets, 16, seed=0)
    batches.batch(0, 0)
    _, orders, turns = batches._plan
    held = sum(part.nbytes for parts in batches.members.values() for part in parts)
    held += sum(order.nbytes for _, order in orders)
    assert held == 12 * 10_000
    assert turns.nbytes <= 8 * 10_000 / 16
