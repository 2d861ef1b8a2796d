"""Which samples form which batch: a pure function of (seed, epoch), so that a run's position is one integer."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from pixart.errors import InputError
from pixart.seeds import derive_seed

Key = tuple[int, int]  # (epoch of the sample's set, with new random numbers in each; index of the sample)


class BucketBatches(Sampler[list[Key]]):
    """Batches of one bucket each, for one of several equal ranks.

    A global batch is `global_batch` samples of one bucket. It is split into `ranks × accumulation` equal parts, which
    are assigned to (micro-step m, rank r) in this order. So the samples of an optimizer step depend neither on the
    number of ranks nor on accumulation, and at every micro-step all ranks have batches of the same size and shape.

    Samples may come from several sets (image folders, feature stores), each with a number of `repeats` per epoch. Each
    set is an endless stream of its own epochs, each a new random order of all its samples; an epoch of the run takes
    the stream's next repeats × size samples, bucket by bucket. So with 1 an epoch shows each sample once, with 0.25
    each once in four epochs, with 3 each three times with different noise.

    `position` is the number of global batches taken since the run started; nothing else needs to be saved to resume.

    Memory: 12 bytes per sample (its index and its position in the epoch), besides `buckets` itself.
    """

    def __init__(
        self,
        buckets: Sequence[int] | np.ndarray,
        global_batch: int,
        *,
        seed: int,
        sets: Sequence[tuple[int, float]] | None = None,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        leftovers: Literal["drop", "fill"] = "drop",
        position: int = 0,
    ):
        """
        Args:
            buckets: the bucket number of every sample, one set after the other.
            sets: (number of samples, repeats) of every set; by default one set, shown once per epoch.
            leftovers: what happens to a bucket's last samples, which do not fill a global batch: "drop" leaves them out
                of this epoch (different ones in each epoch, since the order differs; a bucket smaller than a batch is
                never used), "fill" completes the batch with samples from the next epochs.
        """
        parts = ranks * accumulation
        if global_batch < 1 or global_batch % parts:
            raise InputError(
                f"batch_size {global_batch} is not a multiple of {ranks} processes × {accumulation} accumulation steps"
            )
        self.global_batch, self.seed, self.leftovers, self.position = global_batch, seed, leftovers, position
        self.rank, self.ranks, self.accumulation = rank, ranks, accumulation
        buckets = np.asarray(buckets)
        self.sets = [(len(buckets), 1.0)] if sets is None else list(sets)
        assert sum(count for count, _ in self.sets) == len(buckets)
        if wrong := [repeats for _, repeats in self.sets if not 0 < repeats < math.inf]:
            raise InputError(f"a set's repeats: got {wrong[0]}, expected a positive number")
        self.samples = len(buckets)
        # bucket → its samples in each set
        self.members: dict[int, list[Tensor]] = {}
        for number in np.unique(buckets).tolist():
            self.members[number], first = [], 0
            for count, _ in self.sets:
                found = np.flatnonzero(buckets[first : first + count] == number) + first
                self.members[number].append(torch.from_numpy(found.astype(np.int32)))
                first += count
        self.sizes = {number: sum(self._shares(number)) for number in self.members}  # samples per epoch
        self.per_epoch = sum(self._batches_of(size) for size in self.sizes.values())
        self._plan: tuple[int, list[tuple[int, Tensor]], Tensor] | None = None
        if not self.per_epoch:
            raise InputError(
                f"no bucket has the {global_batch} images of one batch (the largest has "
                f"{max(self.sizes.values(), default=0)}); "
                "lower batch_size, set leftovers to fill, or use square crops"
            )

    @property
    def dropped(self) -> int:
        """Samples left out of every epoch."""
        if self.leftovers == "fill":
            return 0
        return sum(size % self.global_batch for size in self.sizes.values())

    def epoch(self, epoch: int) -> list[list[Key]]:
        """All global batches of an epoch, in order."""
        return [self.batch(epoch, i) for i in range(self.per_epoch)]

    def batch(self, epoch: int, index: int) -> list[Key]:
        """Global batch `index` of an epoch."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = None  # free the previous epoch's plan before making this one
            self._plan = (epoch, *self._make_plan(epoch))
        _, orders, sequence = self._plan
        number = int(sequence[index])
        for batches, order in orders:
            if number < batches:
                keys = order[number * self.global_batch : (number + 1) * self.global_batch].tolist()
                return [divmod(key, self.samples) for key in keys]
            number -= batches
        raise IndexError(index)

    def __iter__(self) -> Iterator[list[Key]]:
        """This rank's micro-batches from `position` on, endlessly."""
        size = self.global_batch // (self.ranks * self.accumulation)
        epoch, start = divmod(self.position, self.per_epoch)
        while True:
            for index in range(start, self.per_epoch):
                batch = self.batch(epoch, index)
                for micro in range(self.accumulation):
                    first = (micro * self.ranks + self.rank) * size
                    yield batch[first : first + size]
            epoch, start = epoch + 1, 0

    def _make_plan(self, epoch: int) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """For every bucket, (number of batches, samples in order, as set epoch × samples + index); and the random
        order of all batches."""
        orders = []
        for number in self.members:
            order, batches, later = self._order(number, epoch), self._batches_of(self.sizes[number]), epoch
            while batches and (missing := batches * self.global_batch - len(order)) > 0:
                later += 1
                order = torch.cat([order, self._order(number, later)[:missing]])
            orders.append((batches, order))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, "batches"))
        return orders, torch.randperm(self.per_epoch, generator=generator)

    def _order(self, number: int, epoch: int) -> Tensor:
        """The samples of a bucket that an epoch shows: each set's share, shuffled together."""
        shares = self._shares(number)
        parts = [self._stream(number, which, epoch * share, share) for which, share in enumerate(shares) if share] or [
            torch.empty(0, dtype=torch.int64)
        ]
        if len(parts) == 1:
            return parts[0]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, "mix", number))
        return torch.cat(parts)[torch.randperm(sum(shares), generator=generator)]

    def _stream(self, number: int, which: int, start: int, count: int) -> Tensor:
        """`count` samples, from `start` on, of a set's endless stream of epochs over one bucket."""
        samples, parts = self.members[number][which], []
        for set_epoch in range(start // len(samples), -(-(start + count) // len(samples))):
            name = (number,) if which == 0 else (number, which)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, set_epoch, "bucket", *name))
            order = samples[torch.randperm(len(samples), generator=generator)].long() + set_epoch * self.samples
            begin = set_epoch * len(samples)
            parts.append(order[max(start - begin, 0) : start + count - begin])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _shares(self, number: int) -> list[int]:
        return [
            round(repeats * len(samples)) for samples, (_, repeats) in zip(self.members[number], self.sets, strict=True)
        ]

    def _batches_of(self, count: int) -> int:
        return -(-count // self.global_batch) if self.leftovers == "fill" else count // self.global_batch
