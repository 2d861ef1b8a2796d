"""The work of a job: images of one model, or of two with the same prompts and seeds, as PNGs with records."""

import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from pixart.app.adapters import Strengths, label
from pixart.app.form import WITHOUT
from pixart.app.models import Loaded, Shelf, check_size
from pixart.app.settings import NATIVE, Limits, Settings, read_size
from pixart.app.worker import Job
from pixart.diffusion import make_schedule
from pixart.errors import InputError
from pixart.inference.latents import with_null_mode
from pixart.inference.records import Folder, Record, image_record
from pixart.inference.request import Request, check_negative
from pixart.inference.start import Sources, count_steps

BATCH = 4  # images drawn at a time; changes no image
HELD = 400  # images kept on disk, in the page's temporary folder


@dataclass(frozen=True)
class Result:
    """A drawn image in its file."""

    path: Path
    model: str  # its name on the page, with the adapters in use
    record: Record

    @property
    def caption(self) -> str:
        return f"{self.model} · seed {self.record['seed']}"


class Store:
    """A temporary folder with the newest images."""

    def __init__(self, parent: Path):
        self.folder = Folder(Path(tempfile.mkdtemp(prefix="drawn-", dir=parent)))
        self._kept: OrderedDict[Path, None] = OrderedDict()
        self._count = 0

    def write(self, image: Image.Image, record: Record) -> Path:
        self._count += 1
        words = re.sub(r"[^\w]+", "-", record["prompt"]).strip("-")[:40]
        path = self.folder.write(f"{self._count:05d}_{words}_seed{record['seed']}", image, record)
        self._kept[path] = None
        while len(self._kept) > HELD:
            self._kept.popitem(last=False)[0].unlink(missing_ok=True)
        return path


@dataclass(frozen=True)
class Plan:
    """One model's part of a job, checked."""

    label: str
    loaded: Loaded
    requests: Sequence[Request]
    records: Sequence[Record]
    draw: Callable[..., object]  # with a callback: an iterator over `Drawn`
    steps: int  # of all batches


def make_sides(model: str, other: str | None, settings: Settings) -> list[tuple[str, Settings]]:
    """What is drawn side by side: each a model's name with its settings, which have the same prompt and seeds.

    Args:
        other: another model, `WITHOUT`, or None for one side alone.

    Raises:
        InputError: no adapter is in use, so that both sides would be the same.
    """
    settings = settings.with_seed()
    if other is None:
        return [(model, settings)]
    if other != WITHOUT:
        return [(model, settings), (other, settings)]
    if not settings.adapters:
        raise InputError(f"compare with “{WITHOUT}”: all adapters are at strength 0; give one of them a strength")
    return [(model, replace(settings, adapters=())), (model, settings)]


def draw_work(
    sides: Sequence[tuple[str, Settings]],
    image: Image.Image | None,
    mask: Image.Image | None,
    limits: Limits,
    store: Store,
) -> Callable[[Shelf, Job], None]:
    """The work of a job that draws each of the sides. All of them are checked before the first image.

    Raises:
        InputError: what no model could draw.
    """
    for _, settings in sides:
        settings.check(limits)

    def work(shelf: Shelf, job: Job) -> None:
        job.doing = "loading the model"
        plans = [plan(name, shelf.get(name), settings, image, mask, limits) for name, settings in sides]
        job.steps, done = sum(p.steps for p in plans), 0
        for p in plans:
            job.doing = f"drawing with {p.label}"

            def after_step(_part: Sequence[int], _step: int, _x: Tensor, x0: Tensor, p: Plan = p) -> None:
                job.check()
                job.step += 1
                job.x0 = lambda: p.loaded.preview.image(x0)

            job.check()
            for drawn in p.draw(after_step):
                record = p.records[drawn.index]
                job.results.append(Result(store.write(drawn.image, record), p.label, record))
            done += p.steps
            job.step = done

    return work


def plan(
    name: str,
    loaded: Loaded,
    settings: Settings,
    image: Image.Image | None,
    mask: Image.Image | None,
    limits: Limits,
) -> Plan:
    """Check everything for one model.

    Raises:
        InputError: it cannot draw this.
    """
    pipeline, card = loaded.pipeline, loaded.pipeline.card
    check_size(pipeline, None if settings.size == NATIVE else read_size(settings.size), limits)
    config, null = settings.config(card)
    config = pipeline.settings(config)
    if settings.negative:
        check_negative(null, config.guidance)
    requests = settings.requests(image, mask, card)
    texts = [settings.prompt, *([settings.negative] if settings.negative else [])]
    pipeline.text.check_prompts(texts, truncate=True)
    if not settings.truncate:
        try:
            pipeline.text.check_prompts(texts)
        except InputError as error:
            raise InputError(f"{error}; or tick “Cut a prompt that is too long”") from None
    sources = Sources(with_null_mode(card, null), pipeline.autoencoder)
    try:
        common = loaded.record(config, null, settings.adapters)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    records = [image_record(request, *sources.read(request), common) for request in requests]
    batches = -(-len(requests) // BATCH)
    steps = batches * count_steps(requests[0], config, make_schedule(card.diffusion))

    def draw(callback: Callable):
        loaded.use(settings.adapters)  # another side may have other strengths on the same model
        options = {"null": null, "batch_size": BATCH, "truncate": settings.truncate, "callback": callback}
        return pipeline.stream(requests, config, **options)

    return Plan(label(name, settings.adapters), loaded, requests, records, draw, steps)


def load_work(name: str, strengths: Strengths) -> Callable[[Shelf, Job], None]:
    """The work of a job that loads a model; its results are the model's card, and what speaks against the adapters on
    it: why they do not fit, or that they were trained on another base; "" if nothing does."""

    def work(shelf: Shelf, job: Job) -> None:
        job.doing = "loading the model"
        loaded = shelf.get(name)
        try:
            loaded.adapters.check(loaded.pipeline, strengths)
            against = loaded.doubts(strengths)
        except InputError as error:
            against = [str(error)]
        job.results += [loaded.pipeline.card, "; ".join(f"{name}: {line}" for line in against)]

    return work
