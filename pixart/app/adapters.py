"""The adapters that were named at the start: read once, and put on a loaded model with the strengths of a request."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pixart.adapters.lora_files import LoraFile, name_lora, read_lora
from pixart.cli import split_strength
from pixart.errors import InputError
from pixart.inference.pipeline import Pipeline
from pixart.study.plots import name_runs

Strengths = tuple[tuple[str, float], ...]  # names and strengths of the adapters in use, in the order of the start
WIDEST = 2.0  # a slider goes from minus this to this, or further if the adapter was named with more


class Adapters:
    """Adapters by their names on the page, each with the strength that it was named with.

    The files are read here and never again. The adapters stay in main memory.
    """

    def __init__(self, given: Sequence[str] = ()):
        """
        Args:
            given: FILE or FILE:STRENGTH each; a file, a folder or a run, as `Pipeline.load_lora` takes them.

        Raises:
            InputError: one of them is no adapter of a PixArt, or is named twice.
        """
        pairs = [split_strength(words) for words in given]
        sources = [Path(source) for source, _ in pairs]
        files = [read_lora(source) for source in sources]
        names = _distinct(sources)
        self.files: dict[str, LoraFile] = dict(zip(names, files, strict=True))
        self.at_start = {name: strength for name, (_, strength) in zip(names, pairs, strict=True)}

    @property
    def names(self) -> list[str]:
        return list(self.files)

    def range(self, name: str) -> tuple[float, float]:
        """The lowest and the highest strength that the page offers."""
        most = max(WIDEST, abs(self.at_start[name]))
        return -most, most

    def check(self, pipeline: Pipeline, strengths: Strengths) -> None:
        """Refuse adapters that do not fit the model.

        Raises:
            InputError: names the adapter, and what does not fit.
        """
        for name, _ in strengths:
            pipeline.loras.check(name, self.files[name])

    def put_on(self, pipeline: Pipeline, strengths: Strengths) -> None:
        """Change a model's weights so that these adapters act on it and no others.

        They are added in one order, so that a request draws the same image whatever was drawn before.

        Raises:
            InputError: one of them does not fit; nothing has been changed then.
        """
        self.check(pipeline, strengths)
        loras = pipeline.loras
        if list(loras.loaded) == [name for name, _ in strengths]:
            for name, strength in strengths:
                if loras.loaded[name].strength != strength:
                    loras.set_strength(name, strength)
            return
        loras.unload()
        for name, strength in strengths:
            loras.load(name, self.files[name], strength)


def label(model: str, strengths: Strengths) -> str:
    """A model's name on the page with the adapters in use."""
    return " + ".join([model, *(f"{name}:{strength:g}" for name, strength in strengths)])


def split_known(
    found: Mapping[str, float], adapters: Adapters
) -> tuple[dict[str, float], list[tuple[str, float]], list[tuple[str, float]]]:
    """Strengths in an image's record → those of all the page's adapters, 0 where the record has none; those of adapters
    that the page does not have; and those that are beyond its sliders."""
    known, beyond = dict.fromkeys(adapters.names, 0.0), []
    for name in adapters.names:
        low, high = adapters.range(name)
        strength = found.get(name, 0.0)
        if low <= strength <= high:
            known[name] = strength
        else:
            beyond.append((name, strength))
    return known, [(name, strength) for name, strength in found.items() if name not in known], beyond


def _distinct(sources: Sequence[Path]) -> list[str]:
    """The names that `Pipeline.load_lora` gives, or as much of the path as tells two of the same name apart.

    Raises:
        InputError: a source is given twice.
    """
    whole = [source.resolve() for source in sources]
    if twice := [str(path) for path, count in Counter(whole).items() if count > 1]:
        raise InputError(f"--lora {twice[0]}: it is given twice; its strength can be changed in the page")
    names = [name_lora(source) for source in sources]
    return names if len(set(names)) == len(names) else name_runs(whole)
