"""Images of prompts in a folder, each written as it is drawn, by any number of processes; then a contact sheet."""

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from PIL import Image
from tqdm import tqdm

from pixart.cli import split_prompt
from pixart.contact_sheet import contact_sheet
from pixart.diffusion import make_schedule
from pixart.diffusion.sampling import SampleConfig
from pixart.errors import InputError
from pixart.files import digest_text, to_json
from pixart.inference.latents import with_null_mode
from pixart.inference.pipeline import Pipeline
from pixart.inference.records import Folder, Record, common_record, image_record
from pixart.inference.request import ImageSource, Request, check_negative
from pixart.inference.start import Sources, check_start, count_steps

SHEET, SHEET_PIXELS = 200, 1 << 26  # most images on a contact sheet, and about its most pixels
AHEAD = 4  # batches of prompts whose states are made at once


@dataclass(frozen=True)
class Order:
    """An image to be drawn and the file it goes to."""

    request: Request
    stem: str  # of the file's name
    record: Record
    kind: tuple  # what is drawn together


def save_samples(
    pipeline: Pipeline, prompts: Sequence[str], folder: str | Path, config: SampleConfig | None = None, *,
    steps: int | None = None, guidance: float | None = None, sampler: str | None = None, seed: int = 0, count: int = 1,
    height: int | None = None, width: int | None = None, sizes: Literal["exact", "official"] = "exact",
    negative_prompt: str | None = None, null: Literal["buffer", "empty", "empty_own_mask"] | None = None,
    image: ImageSource | None = None, strength: float | None = None, mask: ImageSource | None = None,
    truncate: bool = False, batch_size: int = 16, rank: int = 0, ranks: int = 1, progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[Path]:  # fmt: skip
    """Draw `count` images of each prompt, with seeds from `seed` on, into PNGs and a contact sheet in `folder`.

    Each PNG is written as soon as it is drawn. Its text chunks are its record: all that its pixels depend on. An image
    is not drawn again if a file of the folder carries the same record, so the same call goes on after a kill; a name
    that another image has gets a number behind it, and nothing is ever written over. The contact sheet is made once
    all images are there, of at most 200.

    Args:
        prompts: each may end in `--ar h:w` or `--hw height:width`, which goes before the arguments.
        image, strength, mask: where to start from, as of `Request`; the same for all.
        rank, ranks: draw every `ranks`-th image, from `rank` on; who finds all there makes the contact sheet.
        progress: show a bar of steps, each counted once for every image.
        say: called at the end with a line that says what was drawn and what was there.
        others: as of a call of the pipeline.

    Returns:
        this process's files in the prompts' order, those that were there already among them.

    Raises:
        InputError: as of a call, or the folder cannot be written, which is tried before anything is drawn.
    """
    if count < 1 or not prompts:
        raise InputError(f"got {len(prompts)} prompts and count {count}, expected at least one of each")
    if batch_size < 1:
        raise InputError(f"got batch_size {batch_size}, expected at least 1")
    config = pipeline.settings(config, steps=steps, guidance=guidance, sampler=sampler)
    if negative_prompt is not None:
        check_negative(null, config.guidance)
    common = {"sizes": sizes, "negative": negative_prompt, "image": image, "strength": strength, "mask": mask}
    requests = [
        Request(text, seed + n, **(asked or {"height": height, "width": width}), **common)
        for text, asked in map(split_prompt, prompts)
        for n in range(count)
    ]
    if pipeline.text is not None and not truncate:
        pipeline.text.check_lengths([request.prompt for request in requests[::count]])
    orders = _orders(pipeline, requests, config, null)
    options = {"null": null, "truncate": truncate, "batch_size": batch_size, "look_ahead": AHEAD * batch_size * count}
    with _results_in(Path(folder)) as files:
        there, mine = files.find([(order.stem, order.record) for order in orders]), _share(orders, rank, ranks)
        missing = [i for i in mine if there[i] is None]
        total = len(missing) * count_steps(requests[0], config, make_schedule(pipeline.card.diffusion))
        with tqdm(total=total, desc="sampling", unit="step", disable=not progress) as bar:
            for i, drawn in _draw(pipeline, orders, mine, set(missing), config, options, bar):
                with _writing(files.path):
                    there[i] = files.write(orders[i].stem, drawn, orders[i].record)
        with _writing(files.path), _one_at_a_time(files.path, ranks):
            sheet = _write_sheet(files.path, orders, there)
    if say is not None:
        say(_summary(len(missing), len(mine) - len(missing), len(orders), files.path, sheet, rank, ranks))
    return [there[i] for i in sorted(mine)]


def _orders(
    pipeline: Pipeline, requests: Sequence[Request], config: SampleConfig, null: str | None
) -> list[Order]:  # fmt: skip
    """Every request, checked: the last one's fault must not cost the others' images."""
    card, schedule = with_null_mode(pipeline.card, null), make_schedule(pipeline.card.diffusion)
    sources, found = Sources(card, pipeline.autoencoder), []
    for request in requests:
        check_start(request, config, schedule)
        found.append(sources.read(request))
    common, orders = common_record(pipeline, config, null), []
    for i, (request, (sizes, source)) in enumerate(zip(requests, found, strict=True)):
        words = re.sub(r"[^\w]+", "-", request.prompt).strip("-")[:40]
        stem, record = f"{i:03d}_{words}_seed{request.seed}", image_record(request, sizes, source, common)
        orders.append(Order(request, stem, record, sizes))
    return orders


def _share(orders: Sequence[Order], rank: int, ranks: int) -> list[int]:
    """Which images a process draws, those of one size side by side."""
    kinds = {kind: n for n, kind in enumerate(dict.fromkeys(order.kind for order in orders))}
    return sorted(range(len(orders)), key=lambda i: kinds[orders[i].kind])[rank::ranks]


def _draw(
    pipeline: Pipeline, orders: Sequence[Order], mine: Sequence[int], missing: set[int], config: SampleConfig,
    options: dict, bar: tqdm,
) -> Iterator[tuple[int, Image.Image]]:  # fmt: skip
    """(number, image) of what is missing, in the batches in which all would be drawn: so an image is the same bit for
    bit, whatever was there before, but for those whose batch a kill has cut."""
    for kind in dict.fromkeys(orders[i].kind for i in mine):
        rows = [i for i in mine if orders[i].kind == kind]
        for drawn in pipeline.stream(
            (orders[i].request for i in rows), config, **options,
            skip=lambda n, request, rows=rows: rows[n] not in missing,
            callback=lambda part, *_: _count(bar, len(part)),
        ):  # fmt: skip
            yield rows[drawn.index], drawn.image


def _count(bar: tqdm, steps: int) -> None:
    bar.update(steps)


def _write_sheet(folder: Path, orders: Sequence[Order], there: Sequence[Path | None]) -> Path | None:
    """The contact sheet, made of the files, if all are there and it does not lie there already."""
    if len(orders) > SHEET:
        return None
    files = Folder(folder)
    if None in there:  # other processes' share
        there = files.find([(order.stem, order.record) for order in orders])
    if None in there:
        return None
    record = {"images": digest_text(to_json([[path.name, o.record] for path, o in zip(there, orders, strict=True)]))}
    if (sheet := files.find([("contact_sheet", record)])[0]) is not None:
        return sheet
    side, cells = int((SHEET_PIXELS / len(orders)) ** 0.5), []
    for path in there:
        with Image.open(path) as image:
            small = image.width > side
            cells.append([image.resize((side, round(image.height * side / image.width))) if small else image.copy()])
    return files.write("contact_sheet", contact_sheet(cells, [order.request.prompt for order in orders]), record)


def _summary(drawn: int, kept: int, total: int, folder: Path, sheet: Path | None, rank: int, ranks: int) -> str:
    who = f"process {rank} of {ranks}: " if ranks > 1 else ""
    shown = f"; {sheet.name} shows them" if sheet is not None else ""
    if total > SHEET:
        shown = f"; no contact sheet of more than {SHEET}"
    return f"{who}{drawn} image{'s' * (drawn != 1)} drawn, {kept} there already, in {folder}{shown}"


@contextmanager
def _one_at_a_time(folder: Path, ranks: int) -> Iterator[None]:
    """Of several processes that end at once, one makes the contact sheet; the system unlocks for those that die."""
    if ranks == 1:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _results_in(folder: Path) -> Iterator[Folder]:
    """A folder made and tried before the work that fills it; gone again if that fails and nothing is in it."""
    with _writing(folder):
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
        files = Folder(folder)
    try:
        yield files
    except BaseException:
        with suppress(OSError):  # not empty: another's by now
            for path in new:
                path.rmdir()
        raise


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); name another folder, or make room there"
        ) from None
