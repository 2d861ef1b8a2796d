"""The models that were named at the start: their names on the page, and loading them on a device."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pixart.adapters.load import WEIGHTS as ADAPTER
from pixart.adapters.load import find_adapter
from pixart.app.adapters import Adapters, Strengths
from pixart.app.preview import Preview
from pixart.app.settings import Limits, check_pixels, native_size
from pixart.checkpoint.detect import recognise
from pixart.checkpoint.files import checkpoints
from pixart.checkpoint.load import network_card
from pixart.checkpoint.locate import locate
from pixart.diffusion.sampling import SampleConfig
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.encoders.text import TextEncoder
from pixart.errors import InputError, did_you_mean
from pixart.inference.parts import check_width, loading_part
from pixart.inference.pipeline import Pipeline
from pixart.inference.records import Record, common_record
from pixart.study.plots import name_runs
from pixart.train.history import has_config

KEPT = 2  # models that stay loaded on a device: those of a comparison
DECODING = 3 << 10  # bytes for each pixel that a VAE's decoder takes on a CPU in fp32


@dataclass(frozen=True)
class Options:
    """How models are loaded; as the options of `pixart sample` of the same names."""

    dtype: torch.dtype = torch.float32
    text_encoder: str | None = None
    vae: str | None = None
    low_memory: bool = False
    quantize_text: str | None = None
    extensions: tuple[str, ...] = ()
    prepare: Callable[[Any], Any] = lambda network: None  # called with the network, as `use_onednn`


class Models:
    """Sources by their names on the page: those named at the start, and the checkpoints of those that are runs; and the
    adapters that can be put on any of them."""

    def __init__(self, sources: Sequence[str], adapters: Sequence[str] = ()):
        """
        Args:
            adapters: as in `Adapters`.

        Raises:
            InputError: there is no source, one of them is neither a model nor a run, as an adapter that does not name
                its base, or an adapter cannot be read.
        """
        self.sources = list(dict.fromkeys(os.path.abspath(s) if os.path.exists(s) else s for s in sources))
        if not self.sources:
            raise InputError("no model: name at least one, a run, a model's folder or file, or a Hub id")
        for source in self.sources:
            check_model(source)
        local = [source for source in self.sources if os.path.exists(source)]
        short = dict(zip(local, name_runs(local), strict=True)) if local else {}
        self.names = [short.get(source, source) for source in self.sources]
        self.adapters = Adapters(adapters)

    @property
    def runs(self) -> list[Path]:
        return [Path(source) for source in self.sources if is_run(source)]

    def paths(self) -> dict[str, str]:
        """Name → path or Hub id, as they are now. The name is the shortest end of the path that tells it apart."""
        found = {}
        for name, source in zip(self.names, self.sources, strict=True):
            found[name] = source
            if is_run(source):
                steps = reversed(checkpoints(Path(source)))
                found |= {f"{name}, step {int(step.name[5:])}": str(step) for step in steps}
        return found

    def path(self, name: str) -> str:
        """Raises:
        InputError: it is none of the page's models.
        """
        paths = self.paths()
        if name not in paths:
            raise InputError(f"there is no model '{str(name)[:80]}'{did_you_mean(str(name), paths)}; reload the page")
        return paths[name]


@dataclass(eq=False)
class Loaded:
    """A pipeline on a device, with what the page computes once for it."""

    pipeline: Pipeline
    preview: Preview
    adapters: Adapters = field(default_factory=Adapters)
    records: dict[tuple, Record] = field(default_factory=dict)
    _doubts: dict[str, str | None] = field(default_factory=dict)  # by the names of adapters

    def use(self, strengths: Strengths) -> None:
        """Put these adapters on the network, and take off all others. The pipeline stays as it is otherwise.

        Raises:
            InputError: one of them does not fit the network.
        """
        self.adapters.put_on(self.pipeline, strengths)

    def doubts(self, strengths: Strengths) -> list[str]:
        """What speaks against adapters that fit the network: that they were trained on another base. It is found out
        once for each, since the whole network is read for it."""
        for name, _ in strengths:
            if name not in self._doubts:
                self._doubts[name] = self.pipeline.loras.doubt(name, self.adapters.files[name])
        return [doubt for name, _ in strengths if (doubt := self._doubts[name]) is not None]

    def record(self, config: SampleConfig, null: str | None, strengths: Strengths = ()) -> Record:
        """`common_record`, whose fingerprints of the weights are computed once for all images of some settings.

        Raises:
            InputError: an adapter does not fit the network.
        """
        key = (config, null, strengths)
        if key not in self.records:
            if len(self.records) > 100:
                self.records.clear()
            self.use(strengths)
            self.records[key] = common_record(self.pipeline, config, null)
        return self.records[key]


class Shelf:
    """The models of one device. The last few that were used stay loaded; models with the same text encoder share it."""

    def __init__(self, models: Models, device: str, options: Options):
        self.models, self.device, self.options = models, device, options
        self._loaded: OrderedDict[tuple, Loaded] = OrderedDict()

    def get(self, name: str) -> Loaded:
        """Load a model by its name on the page, unless it is loaded; a run's newest checkpoint may be a new one.

        Raises:
            InputError: it cannot be loaded.
        """
        path = self.models.path(name)
        if is_run(path) and not checkpoints(Path(path)):
            raise InputError(f"run {name} has no good checkpoint yet; its training is shown in the other tab")
        key = identity(path)
        if key not in self._loaded:
            while len(self._loaded) >= KEPT:  # before loading, so that never more are in memory
                self._loaded.popitem(last=False)
            self._loaded[key] = self._load(path)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _load(self, path: str) -> Loaded:
        o = self.options
        common = {"dtype": o.dtype, "device": self.device, "vae": o.vae, "save_memory": o.low_memory}
        pipeline = Pipeline.from_pretrained(path, load_text=False, extensions=o.extensions, **common)
        if o.text_encoder is not None:
            pipeline.card = replace(pipeline.card, text=replace(pipeline.card.text, model=o.text_encoder))
        pipeline.text = self._text(path, pipeline)
        pipeline.offload_text = o.low_memory and not o.quantize_text
        o.prepare(pipeline.model)
        return Loaded(pipeline, Preview(pipeline.autoencoder, self.device), self.models.adapters)

    def _text(self, path: str, pipeline: Pipeline) -> TextEncoder:
        wanted, o = pipeline.card.text, self.options
        for other in self._loaded.values():
            if other.pipeline.card.text == wanted:
                return other.pipeline.text
        home = "cpu" if o.low_memory and not o.quantize_text else self.device
        with loading_part("text encoder", "text_encoder", path, o.text_encoder, wanted.model):
            text = TextEncoder.load(wanted, dtype=o.dtype, device=home, quantize=o.quantize_text)
        check_width(text, pipeline.card)
        return text


def is_run(source: str | Path) -> bool:
    return has_config(Path(source))


def check_model(source: str) -> None:
    """Refuse what no model can be loaded from, by its files and the names of its tensors. Our own adapters are models,
    since they name their base; those of other tools are not.

    Raises:
        InputError: says what it is, as loading it would.
    """
    if is_run(source) or find_adapter(source) is not None:  # a run may be without a checkpoint yet
        return
    found = locate(source)
    if network_card(found) is None:
        recognise(found.weights.read(), found.name)


def check_size(pipeline: Pipeline, size: tuple[int, int] | None, limits: Limits) -> None:
    """Refuse a size that is above the limit, or that a CPU's free memory cannot decode.

    Raises:
        InputError: says what would fit.
    """
    size = native_size(pipeline.card) if size is None else size
    check_pixels(size, limits)
    if pipeline.device.type != "cpu" or pipeline.card.vae.kind == AutoencoderConfig().kind:
        return
    import psutil  # accelerate brings it

    needed, free = size[0] * size[1] * DECODING, psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"size {size[0]} × {size[1]} px needs some {needed / 1e9:.1f} GB to decode, and {free / 1e9:.1f} GB are "
            "free: take a smaller size, or start with --low-memory"
        )


def identity(path: str) -> tuple:
    """What tells a model from a later one at the same place: its files and their times."""
    if not os.path.exists(path):
        return (path,)  # on the Hub
    adapter = find_adapter(path)
    files = locate(path).weights.files if adapter is None else (adapter / ADAPTER,)
    return (path, *((str(file), os.stat(file).st_mtime_ns) for file in files))
