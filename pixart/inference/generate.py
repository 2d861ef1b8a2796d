"""Images of prompts, written to a folder as they are drawn, by any number of processes; then a contact sheet."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from PIL import Image
from tqdm import tqdm

from pixart.arguments import checked
from pixart.arguments import say as shown
from pixart.contact_sheet import contact_sheet
from pixart.data.decoding import open_image
from pixart.diffusion import make_schedule
from pixart.diffusion.sampling import SampleConfig
from pixart.errors import InputError
from pixart.files import digest_text, locked, to_json
from pixart.inference.checks import MOST_IMAGES, check_counts
from pixart.inference.latents import with_null_mode
from pixart.inference.pipeline import Pipeline
from pixart.inference.records import Folder, Record, common_record, image_record
from pixart.inference.request import ImageSource, Request, check_negative
from pixart.inference.start import Sources, check_start, count_steps
from pixart.prompt import split_prompt
from pixart.seeds import fit_seed

SHEET, SHEET_PIXELS = 200, 1 << 26  # maximum number of images on a contact sheet, and its approximate maximum of pixels
AHEAD = 4  # number of batches whose prompts are encoded at once


@dataclass(frozen=True)
class Order:
    """An image to be drawn and the file to write it to."""

    request: Request
    stem: str  # the file's name without suffix and number
    record: Record
    kind: tuple  # images of the same kind can be drawn in one batch


@checked
def save_samples(
    pipeline: Pipeline,
    prompts: Sequence[str],
    folder: str | Path,
    config: SampleConfig | None = None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
    count: int = 1,
    height: int | None = None,
    width: int | None = None,
    sizes: Literal["exact", "official"] = "exact",
    negative_prompt: str | None = None,
    null: Literal["buffer", "empty", "empty_own_mask"] | None = None,
    image: ImageSource | None = None,
    strength: float | None = None,
    mask: ImageSource | None = None,
    truncate: bool = False,
    batch_size: int = 16,
    rank: int = 0,
    ranks: int = 1,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[Path]:
    """Draw `count` images of each prompt, with seeds from `seed` on, as PNGs with a contact sheet in `folder`.

    Each PNG is written as soon as it is drawn. Its text chunks are its record: everything that its pixels depend on. An
    image is not drawn again if a file in the folder has the same record, so the same call resumes after a kill. No file
    is ever overwritten: if another image has the name, a number is appended. The contact sheet is made once all images
    are there, if they are at most 200.

    Args:
        prompts: each may end in `--ar h:w` or `--hw height:width`, which takes precedence over the arguments.
        image, strength, mask: what to start from, as in `Request`; the same for all.
        rank, ranks: draw every `ranks`-th image, from `rank` on; the process that finds all images there makes the
            contact sheet.
        progress: show a progress bar that counts the steps of all images.
        say: called at the end with a line that says how many images were drawn and how many were already there.
        others: as in a call of the pipeline.

    Returns:
        this process's files in the order of the prompts, including those that were already there.

    Raises:
        InputError: as in a call; or the folder cannot be written, which is checked before anything is drawn.
    """
    if not 1 <= count <= MOST_IMAGES or not prompts:
        raise InputError(f"got {len(prompts)} prompts and count {shown(count)}, expected at least one of each")
    check_counts("image", 1, batch_size)
    if not 0 <= rank < ranks:
        raise InputError(f"rank: got {shown(rank)} of {shown(ranks)}, expected 0 ≤ rank < ranks")
    config = pipeline.settings(config, steps=steps, guidance=guidance, sampler=sampler)
    if negative_prompt is not None:
        check_negative(null, config.guidance)
    common = {"sizes": sizes, "negative": negative_prompt, "image": image, "strength": strength, "mask": mask}
    requests = [
        Request(text, seed + n, **(asked or {"height": height, "width": width}), **common)
        for text, asked in map(split_prompt, prompts)
        for n in range(count)
    ]
    if pipeline.text is not None:
        negatives = [] if negative_prompt is None else [negative_prompt]
        pipeline.text.check_prompts([*(r.prompt for r in requests[::count]), *negatives], truncate=truncate)
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
        # of several processes that finish together only one makes the contact sheet
        with _writing(files.path), locked(files.path) if ranks > 1 else nullcontext():
            sheet = _write_sheet(files.path, orders, there)
    if say is not None:
        say(_summary(len(missing), len(mine) - len(missing), len(orders), files.path, sheet, rank, ranks))
    return [there[i] for i in sorted(mine)]


def _orders(pipeline: Pipeline, requests: Sequence[Request], config: SampleConfig, null: str | None) -> list[Order]:
    """Orders for all requests, each checked first, so that an error in the last one does not waste the work on the
    others."""
    card, schedule = with_null_mode(pipeline.card, null), make_schedule(pipeline.card.diffusion)
    sources, found = Sources(card, pipeline.autoencoder), []
    for request in requests:
        check_start(request, config, schedule)
        found.append(sources.read(request))
    common, orders = common_record(pipeline, config, null), []
    for i, (request, (sizes, source)) in enumerate(zip(requests, found, strict=True)):
        words = re.sub(r"[^\w]+", "-", request.prompt).strip("-")[:40]
        seed = (
            request.seed if abs(request.seed) < 2**64 else fit_seed(request.seed)
        )  # a name of any length is no file's
        stem, record = f"{i:03d}_{words}_seed{seed}", image_record(request, sizes, source, common)
        orders.append(Order(request, stem, record, sizes))
    return orders


def _share(orders: Sequence[Order], rank: int, ranks: int) -> list[int]:
    """The images that a process draws, grouped by size."""
    kinds = {kind: n for n, kind in enumerate(dict.fromkeys(order.kind for order in orders))}
    return sorted(range(len(orders)), key=lambda i: kinds[orders[i].kind])[rank::ranks]


def _draw(
    pipeline: Pipeline,
    orders: Sequence[Order],
    mine: Sequence[int],
    missing: set[int],
    config: SampleConfig,
    options: dict,
    bar: tqdm,
) -> Iterator[tuple[int, Image.Image]]:
    """(number, image) of the missing images. They are drawn in the same batches as if none was there, so that an image
    is the same bit for bit, whatever was there before, unless a kill has left its batch incomplete."""
    for kind in dict.fromkeys(orders[i].kind for i in mine):
        rows = [i for i in mine if orders[i].kind == kind]
        for drawn in pipeline.stream(
            (orders[i].request for i in rows),
            config,
            **options,
            skip=lambda n, request, rows=rows: rows[n] not in missing,
            callback=lambda part, *_: _count(bar, len(part)),
        ):
            yield rows[drawn.index], drawn.image


def _count(bar: tqdm, steps: int) -> None:
    bar.update(steps)


def _write_sheet(folder: Path, orders: Sequence[Order], there: Sequence[Path | None]) -> Path | None:
    """Make the contact sheet from the files if all are there, unless it exists already."""
    if len(orders) > SHEET:
        return None
    files = Folder(folder)
    if None in there:  # other processes may have written the rest
        there = files.find([(order.stem, order.record) for order in orders])
    if None in there:
        return None
    record = {"images": digest_text(to_json([[path.name, o.record] for path, o in zip(there, orders, strict=True)]))}
    if (sheet := files.find([("contact_sheet", record)])[0]) is not None:
        return sheet
    side, cells = int((SHEET_PIXELS / len(orders)) ** 0.5), []
    for path in there:
        with open_image(path) as image:
            small = image.width > side
            cells.append([image.resize((side, round(image.height * side / image.width))) if small else image.copy()])
    return files.write("contact_sheet", contact_sheet(cells, [order.request.prompt for order in orders]), record)


def _summary(drawn: int, kept: int, total: int, folder: Path, sheet: Path | None, rank: int, ranks: int) -> str:
    who = f"process {rank} of {ranks}: " if ranks > 1 else ""
    shown = f"; {sheet.name} shows them" if sheet is not None else ""
    if total > SHEET:
        shown = f"; no contact sheet for more than {SHEET}"
    return f"{who}{drawn} image{'s' * (drawn != 1)} drawn, {kept} already there, in {folder}{shown}"


@contextmanager
def _results_in(folder: Path) -> Iterator[Folder]:
    """Create a folder and check that it can be written before the work starts; it is removed if the work fails and left
    nothing in it."""
    with _writing(folder):
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
        files = Folder(folder)
    try:
        yield files
    except BaseException:
        with suppress(OSError):  # not empty, or used by another process
            for path in new:
                path.rmdir()
        raise


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); name another folder, or free some space"
        ) from None
