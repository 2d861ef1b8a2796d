"""What the page shows of runs in progress: their curves and their newest sheets of samples."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pixart.app.preview import data_url
from pixart.data.decoding import UnreadableImage, open_image
from pixart.errors import InputError
from pixart.study.plots import draw_curves, name_runs, read_curves
from pixart.train.metrics import METRICS_FILE, merge_declarations

SHEETS, SIDE = 3, 1200  # newest sheets shown of a run, and their longer side in pixels
MAX_PIXELS = 1 << 26  # of a sheet


class Watch:
    """Runs, and which state of their files the page has seen last."""

    def __init__(self, runs: Sequence[Path]):
        self.runs = list(runs)

    def state(self) -> str:
        """Changes when a file that is shown does."""
        files = [file for run in self.runs for file in (run / METRICS_FILE, *sheets(run))]
        return json.dumps([(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file()])

    def show(self) -> str:
        """The page's part: curves of all runs in one figure, then each run's newest sheets."""
        if not self.runs:
            return _note("None of the models named at the start is a run. Start with the folder of one to watch it.")
        return "\n".join([*self._curves(), *(part for run in self.runs for part in _show_sheets(run))])

    def _curves(self) -> list[str]:
        notes, curves, drawn = [], {}, []
        for name, run in zip(name_runs(self.runs), self.runs, strict=True):
            try:
                curves[name] = read_curves(run)
                drawn.append(run)
            except InputError as error:
                notes.append(_note(str(error)))
        if not curves:
            return notes
        try:
            figure = draw_curves(curves, merge_declarations(drawn))
        except InputError as error:  # matplotlib is not there
            return [*notes, _note(str(error))]
        figure.canvas.draw()
        image = Image.frombytes("RGBA", figure.canvas.get_width_height(), bytes(figure.canvas.buffer_rgba()))
        return [*notes, _image(image.convert("RGB"), f"Curves of {', '.join(curves)}")]


def sheets(run: Path) -> list[Path]:
    """A run's newest sheets of samples, newest first; a link that leaves the run is left out."""
    files = sorted((run / "samples").glob("step_*.png"), reverse=True)
    return [file for file in files if file.resolve().is_relative_to(run.resolve())][:SHEETS]


def _show_sheets(run: Path) -> list[str]:
    parts = []
    for file in sheets(run):
        try:
            with open_image(file, MAX_PIXELS) as image:
                image.thumbnail((SIDE, SIDE))
                parts.append(_image(image.convert("RGB"), f"{run.name}, step {file.stem[5:].lstrip('0') or 0}"))
        except UnreadableImage:  # being written
            continue
    return parts


def _image(image: Image.Image, caption: str) -> str:
    text = html.escape(caption)
    return f'<figure class="sheet"><img src="{data_url(image)}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'
