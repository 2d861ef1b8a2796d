"""What an adapter's file does to one weight: low-rank, DoRA, LoHa, LoKr (arXiv 2309.14859) or a whole difference."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pixart.errors import InputError


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale · up · down; with a magnitude (DoRA) W' = m · (W + ΔW) / ‖W + ΔW‖, by rows or by columns."""

    down: Tensor  # (r, in), or (r, C, p, p) of a convolution
    up: Tensor  # (out, r)
    scale: float
    magnitude: Tensor | None = None  # (out,) of rows, or (1, in) of columns

    def delta(self, weight: Tensor) -> Tensor:
        """The change of a weight, in its shape."""
        flat = weight.flatten(1)
        change = self.scale * (self.up.flatten(1).to(flat) @ self.down.flatten(1).to(flat))
        if self.magnitude is None:
            return change.view_as(weight)
        whole = flat + change
        if self.by_columns:
            moved = whole * (self.magnitude.to(flat) / whole.norm(dim=0, keepdim=True))
        else:
            moved = whole * (self.magnitude.to(flat) / whole.norm(dim=1))[:, None]
        return (moved - flat).view_as(weight)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the change: rows, and the width of a row."""
        return len(self.up), self.down[0].numel()

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def by_columns(self) -> bool:
        """Whether it is DoRA with a magnitude of every column instead of every row."""
        return self.magnitude is not None and self.magnitude.ndim == 2

    def misfit(self) -> str | None:
        """Why its tensors do not belong together, None if they do."""
        if self.magnitude is not None:
            rows, width = self.shape
            count, expected = self.magnitude.numel(), width if self.by_columns else rows
            if count != expected:
                return f"the magnitude has {count} values, expected {expected}"
        return _misfit(("B", self.up), ("A", self.down))

    def folded(self) -> "LowRank":
        """The same with scale 1, so that every reader gets the same strength."""
        return replace(self, up=self.up.float() * self.scale, scale=1.0)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: ΔW = scale · (a1 · b1) ⊙ (a2 · b2)."""

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.first[0]), self.first[1][0].numel()

    def misfit(self) -> str | None:
        """Why its tensors do not belong together, None if they do."""
        for i, (a, b) in enumerate((self.first, self.second), 1):
            if (found := _misfit((f"hada_w{i}_a", a), (f"hada_w{i}_b", b))) is not None:
                return found
        other = len(self.second[0]), self.second[1][0].numel()
        return None if other == self.shape else f"its two products are of {self.shape} and {other}"

    def delta(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        (a, b), (c, d) = self.first, self.second
        return (self.scale * (a.to(flat) @ b.to(flat)) * (c.to(flat) @ d.to(flat))).view_as(weight)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: ΔW = scale · first ⊗ second, each whole or a product of two factors."""

    first: Tensor | tuple[Tensor, Tensor]
    second: Tensor | tuple[Tensor, Tensor]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        rows, width = 1, 1
        for part in (self.first, self.second):
            left, right = (part, part) if isinstance(part, Tensor) else part
            rows, width = rows * len(left), width * right[0].numel()
        return rows, width

    def misfit(self) -> str | None:
        """Why its tensors do not belong together, None if they do."""
        for i, part in enumerate((self.first, self.second), 1):
            if isinstance(part, Tensor):
                continue
            named = [(f"lokr_w{i}_{which}", tensor) for which, tensor in zip("ab", part, strict=True)]
            if (found := _misfit(*named)) is not None:
                return found
        return None

    def delta(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        parts = [
            part.flatten(1).to(flat) if isinstance(part, Tensor) else part[0].to(flat) @ part[1].flatten(1).to(flat)
            for part in (self.first, self.second)
        ]
        return (self.scale * torch.kron(*parts)).view_as(weight)


@dataclass(frozen=True)
class Difference:
    """ΔW itself, of a weight or a bias."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def misfit(self) -> str | None:
        """It is one tensor."""
        return None

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight).view_as(weight)


def _misfit(left: tuple[str, Tensor], right: tuple[str, Tensor]) -> str | None:
    """Why two matrices, each with its name, cannot be multiplied, None if they can."""
    (a, first), (b, second) = left, right
    columns = first.flatten(1).shape[1]
    return None if columns == len(second) else f"{b} has {len(second)} rows, {a} {columns} columns"


Change = LowRank | Hadamard | Kronecker | Difference


def split(change: Change, parts: int, what: str) -> list[Change]:
    """The change of a fused matrix as those of the equal parts of its rows, which share `down`.

    Raises:
        InputError: it has no rows that could be cut; `what` names it.
    """
    if parts == 1:
        return [change]
    if isinstance(change, Difference):
        return [Difference(rows) for rows in change.value.chunk(parts)]
    if not isinstance(change, LowRank) or change.by_columns:
        raise InputError(f"{what}: {type(change).__name__} of a fused matrix cannot be written for its parts; merge it")
    magnitudes = [None] * parts if change.magnitude is None else change.magnitude.chunk(parts)
    return [
        replace(change, up=up, magnitude=magnitude)
        for up, magnitude in zip(change.up.chunk(parts), magnitudes, strict=True)
    ]


def fuse(changes: list[Change | None], what: str) -> Change:
    """The changes of the equal parts of a matrix's rows (None: unchanged) as one of the whole: A stacked, B
    block-diagonal.

    Raises:
        InputError: they are no low-rank changes, or some of them only are of DoRA.
    """
    if len(changes) == 1 and changes[0] is not None:
        return changes[0]
    there = [change for change in changes if change is not None]
    if not all(isinstance(change, LowRank) for change in there):
        raise InputError(
            f"{what}: {type(there[0]).__name__} of parts of a matrix cannot be written for the whole; merge"
        )
    magnitudes = [change.magnitude for change in there]
    whole = all(m is not None and m.ndim == 1 for m in magnitudes) and len(there) == len(changes)
    if not whole and any(m is not None for m in magnitudes):
        raise InputError(f"{what}: DoRA of some parts of a matrix alone cannot be written for the whole; merge it")
    rows = len(there[0].up)
    blocks = [torch.zeros(rows, 0) if change is None else change.folded().up.flatten(1).float() for change in changes]
    first = there[0].down
    if all(torch.equal(change.down, first) for change in there) and len(there) == len(changes):
        return LowRank(first, torch.cat(blocks), 1.0, torch.cat(magnitudes) if whole else None)  # they shared it
    return LowRank(
        torch.cat([change.down.float() for change in there]), torch.block_diag(*blocks), 1.0,
        torch.cat(magnitudes) if whole else None,
    )  # fmt: skip
