"""What the page's buttons do: jobs of the pool, seen as HTML and results. It knows nothing of Gradio."""

import asyncio
import html
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from pixart.app.adapters import label, split_known
from pixart.app.drawing import Result, Store, draw_work, load_work, make_sides
from pixart.app.models import Models
from pixart.app.preview import data_url
from pixart.app.settings import Limits, read_form, read_record, read_strengths, size_choices
from pixart.app.worker import Busy, Job, Pool
from pixart.data.decoding import UnreadableImage, open_image
from pixart.errors import InputError
from pixart.inference.records import read_record as read_png

SHOWS = 0.5  # seconds between two states of a job that are shown, unless it is finished; each costs some 3 ms


class Events:
    """The page's buttons, for all sessions of a server."""

    def __init__(self, models: Models, pool: Pool, store: Store, limits: Limits):
        self.models, self.pool, self.store, self.limits = models, pool, store, limits

    def names(self) -> list[str]:
        return list(self.models.paths())

    async def draw(
        self, owner: str, model: str, other: str | None, canvas: Mapping[str, Any] | None, values: Mapping[str, Any]
    ) -> AsyncIterator[tuple[str, Sequence[Result] | None]]:
        """Draw with one model, or two sides: pairs of the status as HTML, and of the results once their number changed.

        Args:
            other: as in `make_sides`.
            values: as in `read_form`.

        Raises:
            Busy: the page draws already, and shows the status of that.
        """
        try:
            image, mask = read_canvas(canvas)
            sides = make_sides(model, other, read_form(values))
            for name, _ in sides:
                self.models.path(name)
            job = self.pool.submit(Job(draw_work(sides, image, mask, self.limits, self.store), owner))
        except Busy:
            raise
        except InputError as error:
            yield wrong(str(error)), None
            return
        try:
            shown, labels = -1, [label(name, settings.adapters) for name, settings in sides]
            async for status in self._watch(job):
                results = list(job.results)
                yield status, None if len(results) == shown and not job.finished else in_pairs(results, labels)
                shown = len(results)
        finally:
            if not job.finished:  # the page was closed
                job.cancelled = True

    async def choose(
        self, owner: str, model: str, strengths: Mapping[str, Any] | None = None
    ) -> tuple[str, list[str] | None, str]:
        """Load a model → the status; the sizes of its own table, None if it cannot be loaded; and what speaks against
        the adapters on it, "" if nothing does."""
        mine = f"{owner} loads"
        self.pool.cancel(mine)  # another model, which was chosen before
        try:
            self.models.path(model)
            job = self.pool.submit(Job(load_work(model, read_strengths(strengths or {})), mine))
        except InputError as error:
            return wrong(str(error)), None, ""
        *_, status = [status async for status in self._watch(job)]
        if job.state != "done":
            return status, None, ""
        card, misfit = job.results
        return said(f"{model} is loaded"), size_choices(card, self.limits), wrong(misfit) if misfit else ""

    def cancel(self, owner: str) -> str:
        return said("cancelled" if self.pool.cancel(owner) else "there is nothing to cancel")

    def leave(self, owner: str) -> None:
        """The page was closed."""
        for name in (owner, f"{owner} loads"):
            self.pool.cancel(name)

    def fill(self, record: Mapping[str, str] | None) -> tuple[str, dict[str, Any] | None]:
        """The record of an image → the status, and the form's values, None if it has none."""
        if record is None:
            return wrong("select an image first"), None
        try:
            values = read_record(record)
        except InputError as error:
            return wrong(str(error)), None
        values = {name: "" if value is None else repr(value).removesuffix(".0") if isinstance(value, float) else value
                  for name, value in values.items()}  # fmt: skip
        values["adapters"], unknown, beyond = split_known(values["adapters"], self.models.adapters)
        notes = ["the settings are those of the image"]
        notes += ["it started from an image, which must be given again"] if "image" in record else []
        notes += [f"it was drawn with the adapter {name}:{strength:g}, which this page does not have (start it with "
                  f"--lora FILE)" for name, strength in unknown]  # fmt: skip
        notes += [f"the adapter {name} is off: its strength {strength:g} is beyond the slider (start the page with "
                  f"--lora FILE:{strength:g})" for name, strength in beyond]  # fmt: skip
        return (wrong if unknown or beyond else said)("; ".join(notes)), values

    def fill_from(self, path: str | None) -> tuple[str, dict[str, Any] | None]:
        """A dropped file → as `fill`."""
        if path is None:
            return said(""), None
        try:
            with open_image(Path(path)):
                pass
        except UnreadableImage as error:
            return wrong(f"{Path(path).name} is not an image that can be read ({error}); drop a PNG"), None
        return self.fill(read_png(Path(path)))

    async def _watch(self, job: Job) -> AsyncIterator[str]:
        """The job's status, whenever it has changed, until it is finished."""
        before, loop, ended = None, asyncio.get_running_loop(), asyncio.Event()
        job.when_finished(lambda: loop.call_soon_threadsafe(ended.set))
        while True:
            finished = job.finished  # read first: what follows is then the last state
            job.look()
            state = (job.state, job.step, len(job.results), job.doing, self.pool.before(job))
            if state != before:
                preview = job.x0
                yield show(job, state[-1], preview() if preview is not None else None)
                before = state
            if finished:
                return
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ended.wait(), SHOWS)


def read_canvas(canvas: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The start image, and the mask of what was painted, white where it is drawn again; None without."""
    if not canvas or canvas.get("background") is None:
        return None, None
    background = canvas["background"]
    if background.getextrema()[-1][1] == 0:  # nothing was uploaded: all is transparent
        return None, None
    white = Image.new("RGBA", background.size, "white")
    image = Image.alpha_composite(white, background.convert("RGBA")).convert("RGB")
    mask = Image.new("L", background.size, 0)
    for layer in canvas.get("layers") or []:
        painted = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha >= 128 else 0)
        mask.paste(255, mask=painted)
    return image, mask if mask.getbbox() else None


def in_pairs(results: Sequence[Result], labels: Sequence[str]) -> list[Result]:
    """Results of two sides beside each other, image by image; of one side as they are."""
    if len(set(labels)) < 2:
        return list(results)
    mine = [[result for result in results if result.model == label] for label in labels]
    longest = max(map(len, mine))
    return [of[i] for i in range(longest) for of in mine if i < len(of)]


def show(job: Job, before: int, preview: Image.Image | None) -> str:
    """A job's status."""
    if job.state == "failed":
        return wrong(job.error)
    if job.state == "waiting":
        return said(f"waiting: {before} before this one")
    if job.state == "done":
        return said("done")
    if job.state == "cancelled":
        return said("cancelled")
    share = 100 * job.step / max(job.steps, 1)
    bar = f'<div role="progressbar" aria-valuenow="{share:.0f}"><div style="width: {share:.0f}%"></div></div>'
    steps = f", step {job.step} of {job.steps}" if job.steps else ""
    image = "" if preview is None else f'<img class="preview" src="{data_url(preview, "JPEG")}" alt="preview">'
    return f'<div class="job"><p>{html.escape(job.doing)}{steps}</p>{bar}{image}</div>'


def said(text: str) -> str:
    return f'<div class="job"><p>{html.escape(text)}</p></div>'


def wrong(text: str) -> str:
    return f'<div class="job"><p class="wrong" role="alert">{html.escape(text)}</p></div>'
