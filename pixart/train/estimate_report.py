"""Estimates as Markdown tables and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pixart.features.size import store_bytes
from pixart.train.devices import DAY, DEVICES, HERE, Device
from pixart.train.estimate import Estimate
from pixart.train.rehearsal import Rehearsal

ASSUMED = 0.4  # utilisation where none is stated or measured
# of PixArt-α's five stages: the abstract of arXiv 2310.00426 up to its ICLR version; a later version says 753
PUBLISHED_DAYS = 675
# its stages and their numbers of GPUs
PAPER = {
    "pixart:paper/1_imagenet": 8,
    "pixart:paper/2_sam": 64,
    "pixart:paper/3_aesthetic_256": 64,
    "pixart:paper/4_aesthetic_512": 64,
    "pixart:paper/5_aesthetic_1024ms": 32,
}


@dataclass(frozen=True)
class Costs:
    """An estimate with what was asked beside it."""

    name: str
    estimate: Estimate
    device: Device | None = None
    utilisation: float | None = None  # stated; None is the measured one, else ASSUMED
    images: int | None = None  # of a feature store
    tokens: int | None = None  # of its captions on average; by default the longest
    measured: Rehearsal | None = None

    @property
    def reached(self) -> float | None:
        """The utilisation that was measured; above 1 if the run's products are faster than the large one."""
        if self.measured is None:
            return None
        flops = self.estimate.training_flops * self.estimate.config.train.batch_size
        return flops / self.measured.seconds / self.measured.peak

    @property
    def used(self) -> float:
        return self.utilisation or self.reached or ASSUMED

    @property
    def peak(self) -> float | None:
        """FLOP/s of the device; of this machine as measured beside the steps, if there were any."""
        if self.device is None:
            return None
        if self.device.name == HERE and self.measured is not None:
            return self.measured.peak
        return self.device.peak(self.estimate.config.train.autocast_dtype)

    @property
    def device_days(self) -> float | None:
        """Of all steps; validation, samples and saving are not in it."""
        return None if self.peak is None else self.estimate.run_flops / (self.peak * self.used) / DAY

    @property
    def store_bytes(self) -> int | None:
        if self.images is None:
            return None
        config = self.estimate.config
        tokens, width = self.tokens or config.text.length, config.model.caption_channels
        return store_bytes(self.images, config.data, config.vae, config.extract, tokens=tokens, width=width)


def to_json(costs: Costs) -> dict[str, Any]:
    """All numbers: bytes, FLOPs, seconds, days."""
    e = costs.estimate
    return {
        "config": costs.name,
        "processes": e.processes,
        "parameters": e.parameters,
        "trained_parameters": e.trained_parameters,
        "parameters_by_part": e.parameters_by_part,
        "forward_flops": e.forward_flops,
        "forward_flops_by_part": e.forward_flops_by_part,
        "training_flops": e.training_flops,
        "recomputed_flops": e.recomputed_flops,
        "encoding_flops": e.encoding_flops,
        "images": e.images,
        "run_flops": e.run_flops,
        "memory_bytes": e.memory_bytes,
        "memory_by_kind": e.memory.at_peak,
        "activation_bytes": e.memory.activations,
        "optimizer_bytes": e.memory.optimizer,
        "model_bytes": e.model_bytes,
        "checkpoint_bytes": e.checkpoint_bytes,
        "store_bytes": costs.store_bytes,
        "device": None if costs.device is None else costs.device.name,
        "utilisation": None if costs.device is None else costs.used,
        "device_days": costs.device_days,
        "measured": None if costs.measured is None else {**vars(costs.measured), "utilisation": costs.reached},
        "notes": list(e.memory.notes),
    }


def describe(costs: Costs) -> str:
    """The tables of one configuration."""
    return "\n\n".join([_network(costs.estimate), _memory(costs), _rest(costs), *costs.estimate.memory.notes])


def compare(many: Sequence[Costs], *, paper: bool = False) -> str:
    """A row for each configuration and one for their sum; with `paper`, the sum beside the published one."""
    timed = many[0].device is not None
    head = ["config", "parameters", "FLOPs of an image", "images", "FLOPs", "memory of a process", "checkpoint"]
    rows = []
    for costs in many:
        e, days = costs.estimate, [] if costs.device_days is None else [f"{costs.device_days:,.1f}"]
        images = f"{e.images / 1e6:,.1f} M"
        row = [costs.name, f"{e.parameters / 1e6:.1f} M", _flops(e.training_flops), images, _flops(e.run_flops)]
        memory = _size(e.memory_bytes)
        if costs.measured is not None:
            memory += f" (measured {_size(costs.measured.memory)})"
        rows.append([*row, memory, _size(e.checkpoint_bytes), *days])
    flops = sum(costs.estimate.run_flops for costs in many)
    total = ["together", "", "", f"{sum(c.estimate.images for c in many) / 1e6:,.1f} M", _flops(flops), "", ""]
    if timed:
        shares = " to ".join(f"{share:.0%}" for share in sorted({min(c.used for c in many), max(c.used for c in many)}))
        head.append(f"{many[0].device.name} days at {shares}")
        total.append(f"{sum(costs.device_days for costs in many):,.1f}")
    text = [_table(head, [*rows, total])]
    if paper:
        text.append(_published(many, flops))
    return "\n\n".join([*text, *dict.fromkeys(note for costs in many for note in costs.estimate.memory.notes)])


def _published(many: Sequence[Costs], flops: int) -> str:
    peak = DEVICES["a100"].peak(many[0].estimate.config.train.autocast_dtype)
    hardware = flops + sum(costs.estimate.images * costs.estimate.recomputed_flops for costs in many)
    published = PUBLISHED_DAYS * DAY * peak
    encoded = hardware + sum(costs.estimate.images * costs.estimate.encoding_flops for costs in many)
    return (
        f"Published: {PUBLISHED_DAYS} A100 days, in which these model FLOPs are {flops / published:.0%} of the peak, "
        f"{hardware / published:.0%} with the forward passes that gradient checkpointing repeats, and "
        f"{encoded / published:.0%} if the VAE encodes every image as it is read. Also in the published time, and not "
        "counted: operations bound by memory (norms, modulation, optimizer, averages), reading data, waiting for other "
        "GPUs, validation, saving."
    )


def _network(e: Estimate) -> str:
    whole, rows = e.forward_flops, []
    for part in dict.fromkeys([*e.parameters_by_part, *e.forward_flops_by_part]):
        flops = e.forward_flops_by_part.get(part, 0)
        rows.append([part, f"{e.parameters_by_part.get(part, 0):,}", _flops(flops), f"{flops / whole:.1%}"])
    frozen = f" ({e.trained_parameters:,} trained)" if e.trained_parameters != e.parameters else ""
    rows.append(["together", f"{e.parameters:,}{frozen}", _flops(whole), "100.0%"])
    return _table(["part", "parameters", "FLOPs of a forward, one image", "share"], rows)


def _memory(costs: Costs) -> str:
    e = costs.estimate
    rows = [[kind, _size(size)] for kind, size in e.memory.at_peak.items() if size]
    rows.append(["together", _size(e.memory_bytes)])
    if costs.measured is not None:
        ratio = e.memory_bytes / costs.measured.memory
        rows.append(["measured", f"{_size(costs.measured.memory)} (estimated / measured {ratio:.2f})"])
    if costs.device is not None and costs.device.gigabytes is not None:
        fits = "enough" if e.memory_bytes < costs.device.gigabytes * 1e9 else "too little"
        rows.append([costs.device.name, f"{costs.device.gigabytes:,.0f} GB, {fits}"])
    count = e.config.train.batch_size // e.config.train.accumulation // e.processes
    return _table([f"memory at the peak of a step, {count} images at once", "one process"], rows)


def _rest(costs: Costs) -> str:
    e, loop = costs.estimate, costs.estimate.config.train
    rows = [
        ["training FLOPs of an image", _flops(e.training_flops)],
        ["repeated by gradient checkpointing", _flops(e.recomputed_flops)],
        *([["VAE encoder, one image", _flops(e.encoding_flops)]] if e.encoding_flops else []),
        [f"images of {loop.steps:,} steps", f"{e.images:,}"],
        ["training FLOPs of the run", _flops(e.run_flops)],
        ["model file", _size(e.model_bytes)],
        ["checkpoint", f"{_size(e.checkpoint_bytes)}, of which {loop.keep} are kept"],
    ]
    if costs.store_bytes is not None:
        rows.append([f"feature store of {costs.images:,} images", _size(costs.store_bytes)])
    if costs.measured is not None:
        share = f"{costs.reached:.0%} of the {costs.measured.peak / 1e12:.3g} TFLOP/s of a large matrix product"
        rows.append(["measured step", f"{costs.measured.seconds:.3g} s, {share}"])
    if costs.device_days is not None:
        origin = "" if costs.utilisation or costs.reached else ", assumed"
        rows.append([
            f"{costs.device.name}, {costs.peak / 1e12:,.3g} TFLOP/s, utilisation {costs.used:.0%}{origin}",
            f"{_days(costs.device_days)} of one device, {_days(costs.device_days / e.processes)} on {e.processes}",
        ])  # fmt: skip
    return _table(["run", ""], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flops(number: float) -> str:
    for unit, name in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if number >= unit:
            return f"{number / unit:,.4g} {name}"
    return f"{number / 1e6:,.4g} MFLOP"


def _size(number: float) -> str:
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def _days(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:.1f} hours" if days >= 1 / 24 else f"{days * 24 * 60:.1f} minutes"
