"""Which samples form which batch: a pure function of (seed, epoch), so that a run's position is one integer."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch.utils.data import Sampler

from pixart.errors import InputError

Key = tuple[int, int]  # (epoch, index of the sample)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable; the same on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BucketBatches(Sampler[list[Key]]):
    """Batches of one bucket each, for one of several equal ranks.

    A global batch is `global_batch` samples of a bucket; it is cut into `ranks × accumulation` equal parts, and the
    part of micro-step m goes to rank r in the order (m, r). So the samples of an optimizer step depend neither on the
    number of ranks nor on accumulation, and at every micro-step all ranks have batches of one size and shape.

    `position` is the number of global batches taken since the run began: all there is to save and to resume.
    """

    def __init__(
        self,
        buckets: Sequence[int],
        global_batch: int,
        *,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        leftovers: Literal["drop", "fill"] = "drop",
        position: int = 0,
    ):
        """
        Args:
            buckets: the bucket's number of every sample.
            leftovers: what happens to a bucket's last samples that do not fill a global batch: "drop" leaves them out
                of this epoch (other ones the next, since the order differs; but all of a bucket that has fewer than a
                batch, always), "fill" completes the batch from the next epochs' orders.
        """
        parts = ranks * accumulation
        if global_batch < 1 or global_batch % parts:
            raise InputError(
                f"batch_size {global_batch} is not a multiple of {ranks} processes × {accumulation} accumulation steps"
            )
        self.global_batch, self.seed, self.leftovers, self.position = global_batch, seed, leftovers, position
        self.rank, self.ranks, self.accumulation = rank, ranks, accumulation
        self.members: dict[int, torch.Tensor] = {}
        for number in sorted(set(buckets)):
            self.members[number] = torch.tensor([i for i, bucket in enumerate(buckets) if bucket == number])
        self.per_epoch = sum(self._batches_of(len(samples)) for samples in self.members.values())
        if not self.per_epoch:
            raise InputError(
                f"no bucket has the {global_batch} images of one batch (the fullest has "
                f"{max(map(len, self.members.values()), default=0)}); "
                "lower batch_size, set leftovers to fill, or use square crops"
            )

    @property
    def dropped(self) -> int:
        """Samples left out of every epoch."""
        if self.leftovers == "fill":
            return 0
        return sum(len(samples) % self.global_batch for samples in self.members.values())

    def epoch(self, epoch: int) -> list[list[Key]]:
        """All global batches of an epoch, in order."""
        batches: list[list[Key]] = []
        for number, samples in self.members.items():
            order, later = self._order(number, samples, epoch), epoch
            while len(order) % self.global_batch and self.leftovers == "fill":
                missing, later = self.global_batch - len(order) % self.global_batch, later + 1
                order += self._order(number, samples, later)[:missing]
            for i in range(self._batches_of(len(samples))):
                batches.append(order[i * self.global_batch : (i + 1) * self.global_batch])
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, "batches"))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[Key]]:
        """This rank's micro-batches from `position` on, without end."""
        size = self.global_batch // (self.ranks * self.accumulation)
        epoch, start = divmod(self.position, self.per_epoch)
        while True:
            for batch in self.epoch(epoch)[start:]:
                for micro in range(self.accumulation):
                    first = (micro * self.ranks + self.rank) * size
                    yield batch[first : first + size]
            epoch, start = epoch + 1, 0

    def _order(self, number: int, samples: torch.Tensor, epoch: int) -> list[Key]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, "bucket", number))
        return [(epoch, i) for i in samples[torch.randperm(len(samples), generator=generator)].tolist()]

    def _batches_of(self, count: int) -> int:
        return -(-count // self.global_batch) if self.leftovers == "fill" else count // self.global_batch
