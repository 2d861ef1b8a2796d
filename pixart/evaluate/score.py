"""The work of `pixart evaluate`: a model or a folder of images, prompts and metrics → scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pixart.cli import read_prompts, split_settings
from pixart.config import override
from pixart.cpu import use_onednn
from pixart.data.buckets import Bucket
from pixart.data.config import DataConfig
from pixart.data.sources import make_table, scan
from pixart.errors import InputError, did_you_mean
from pixart.evaluate.image_metric import ImageMetric, Item, Task, number_prompts, together
from pixart.evaluate.metrics import make_metrics, own_prompts
from pixart.evaluate.model_error import DataImages, ModelDenoisingError
from pixart.evaluate.protocols import PROTOCOLS, Ready
from pixart.evaluate.record import SCORES
from pixart.evaluate.reference import Fit, list_images
from pixart.evaluate.resize import FILTERS
from pixart.evaluate.run import ByModel, Drawer, Evaluation, FromFolder, common_size
from pixart.extensions import load_extensions
from pixart.inference.pipeline import Pipeline
from pixart.model import PixArtConfig


@dataclass(frozen=True)
class Options:
    """The options of the command; see its help."""

    model: str | None = None
    images: str | None = None
    metrics: tuple[str, ...] = ()
    reference: str | None = None
    prompts: str | None = None
    data: str | None = None
    protocol: str | None = None
    out: str | None = None
    limit: int | None = None
    count: int = 1
    seed: int = 0
    settings: tuple[str, ...] = ()  # sampling settings, as key=value
    height: int | None = None
    width: int | None = None
    filter: Literal["clean", "pil", "none"] = "clean"
    reference_fit: Fit = "exact"
    inception: str | None = None
    cache: str = "evaluation/references"
    keep_images: bool = False
    truncate: bool = False
    batch_size: int = 16
    device: str = "cpu"
    dtype: str = "float32"
    raw: bool = False
    extension: tuple[str, ...] = ()
    onednn: bool = True

    def __post_init__(self):
        if (self.model is None) == (self.images is None):
            raise InputError(
                "got no MODEL and no --images" if self.model is None else "give MODEL or --images, not both"
            )
        if self.filter not in FILTERS:
            raise InputError(f"--filter: got {self.filter}, expected {', '.join(FILTERS)}")
        for name in ("limit", "count", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            hint = did_you_mean(self.protocol, PROTOCOLS)
            raise InputError(f"--protocol: there is no '{self.protocol}'{hint} (there are {', '.join(PROTOCOLS)})")
        if not self.metrics and self.protocol is None:
            raise InputError("--metrics: got none, expected at least one, as --metrics fid clip_score")
        if self.protocol is not None and (self.data is None or self.images is not None):
            raise InputError(f"protocol {self.protocol} draws with a MODEL and reads its files from --data FOLDER")


def evaluate(
    options: Options, rank: int = 0, ranks: int = 1, *, progress: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """Score a model or images; returns the record, or None while other processes are still drawing.

    Raises:
        InputError: something is missing or does not fit; raised before anything is drawn.
    """
    load_extensions(options.extension)
    make_metrics(options.metrics, "--metrics")  # a wrong name is said before what else is missing
    if "denoising_error" in options.metrics:
        return _evaluate_on_data(options, rank, ranks, progress=progress, say=say)
    ready, paths = _find(options)
    names = tuple(dict.fromkeys([*options.metrics, *ready.metrics]))
    metrics = open_image_metrics(names)
    pipeline, size = None, None
    if options.model is None:
        size = common_size(paths)
    else:
        pipeline = _load(options)
        size = _size(options, ready, pipeline)
    reference = Path(options.reference) if options.reference else ready.reference
    task = Task(
        ready.items,
        size,
        torch.device(options.device),
        reference,
        options.reference_fit if options.reference else ready.fit,
        options.filter,
        Path(options.cache),
        options.inception,
        options.truncate,
        say if rank == 0 else lambda _: None,
    )
    if pipeline is None:
        drawer: Drawer = FromFolder(paths, size)
    else:
        if pipeline.text is not None and not options.truncate:
            pipeline.text.check_lengths(list(dict.fromkeys(item.prompt for item in ready.items)))
        drawer = ByModel(pipeline, ready.items, size, options.batch_size, truncate=options.truncate)
    folder = _folder(options)
    keep = ready.keep or ((lambda i: Path("images") / f"{i:06d}.png") if options.keep_images and pipeline else None)
    evaluation = Evaluation(folder, task, metrics, drawer, options.batch_size, options.protocol, keep)
    return _finish(evaluation, ready, rank, ranks, progress=progress, say=say)


def _finish(
    evaluation: Evaluation, ready: Ready, rank: int, ranks: int, *, progress: bool, say: Callable[[str], None]
) -> dict[str, Any] | None:
    record = evaluation.run(rank, ranks, progress=progress, begin=ready.begin)
    if record is None:
        say(f"process {rank} of {ranks} is done; the last one writes {evaluation.folder / SCORES}")
        return None
    _tell(record, evaluation, ready, say)
    return record


def _evaluate_on_data(
    options: Options, rank: int, ranks: int, *, progress: bool, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The denoising error of a model on the images of a data set; nothing is drawn."""
    if options.metrics != ("denoising_error",) or options.model is None or options.data is None or options.prompts:
        raise InputError(
            "denoising_error is of a MODEL on the images and captions of a data set: give it alone among --metrics, "
            "with --data SOURCE and without --images or --prompts"
        )
    pipeline = _load(options)
    side = pipeline.card.model.latent_size * pipeline.autoencoder.downsample
    found = scan(DataConfig(folder=options.data, resolution=side), [Bucket(1.0, side, side)])
    records = found.records[: options.limit]
    items = [Item(record.captions[0], None, i) for i, record in enumerate(records)]
    if pipeline.text is not None and not options.truncate:
        pipeline.text.check_lengths(list(dict.fromkeys(item.prompt for item in items)))
    task = Task(items, (side, side), torch.device(options.device), truncate=options.truncate, say=say)
    metrics = {"denoising_error": ModelDenoisingError(pipeline)}
    evaluation = Evaluation(_folder(options), task, metrics, DataImages(records, pipeline), options.batch_size)
    return _finish(evaluation, Ready(items), rank, ranks, progress=progress, say=say)


def open_image_metrics(names: Sequence[str], setting: str = "--metrics") -> dict[str, ImageMetric]:
    """Metrics of drawn images by name; errors name `setting` as the source of the names.

    Raises:
        InputError: there is no metric of that name, or it does not measure images.
    """
    metrics = make_metrics(names, setting)
    if other := [name for name, metric in metrics.items() if not isinstance(metric, ImageMetric)]:
        raise InputError(f"{setting}: {other[0]} measures no images; train.metrics takes it, in a validation")
    return metrics


def _find(options: Options) -> tuple[Ready, list[Path]]:
    """What is to be scored, and the files of existing images."""
    if options.protocol is not None:
        ready = PROTOCOLS[options.protocol](Path(options.data), options.seed)
        return replace(ready, items=ready.items[: options.limit]), []
    paths = list_images(Path(options.images))[: options.limit] if options.images else []
    prompts = _prompts(options, paths)
    if options.images:
        known = prompts or [None] * len(paths)
        return Ready([Item(*each) for each in zip(known, [None] * len(known), together(known), strict=True)]), paths
    if prompts is None:
        if not (own := own_prompts(options.metrics, options.reference, "--metrics")):
            raise InputError("prompts: got none; give --prompts FILE, --data SOURCE or --protocol NAME")
        return Ready(number_prompts(own)[: options.limit]), []
    repeated = [prompt for prompt in prompts for _ in range(options.count)]
    return Ready(number_prompts(repeated, options.seed)[: options.limit]), []


def _prompts(options: Options, paths: Sequence[Path]) -> list[str] | None:
    """Prompts from a file, or the first captions of a data set; with images, one prompt per image."""
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)
        if paths and len(prompts) < len(paths):
            raise InputError(
                f"{options.prompts}: {len(prompts)} prompts for {len(paths)} images; expected one for each"
            )
        return prompts[: len(paths)] if paths else prompts
    if options.data is None:
        return None
    data = DataConfig(folder=options.data, max_crop=1.0)
    records = scan(data, make_table(data, 8)).records
    if not paths:
        return [record.captions[0] for record in records]
    known = {record.id: record.captions[0] for record in records}
    names = [path.relative_to(options.images).as_posix() for path in paths]
    if missing := [name for name in names if name not in known]:
        raise InputError(f"{options.data}: has no caption for the image {missing[0]}; names must be alike")
    return [known[name] for name in names]


def _load(options: Options) -> Pipeline:
    told, settings = split_settings(options.settings, PixArtConfig.__dataclass_fields__)
    pipeline = Pipeline.from_pretrained(
        options.model,
        ema=not options.raw,
        dtype=getattr(torch, options.dtype),
        device=options.device,
        overrides=told,
        extensions=options.extension,
    )
    if options.onednn:
        use_onednn(pipeline.model)
    pipeline.card = replace(pipeline.card, sample=override(pipeline.card.sample, settings))
    return pipeline


def _size(options: Options, ready: Ready, pipeline: Pipeline) -> tuple[int, int]:
    native = pipeline.card.model.latent_size * pipeline.autoencoder.downsample
    height, width = ready.size or (native, native)
    return options.height or height, options.width or width


def _folder(options: Options) -> Path:
    if options.out:
        return Path(options.out)
    name = options.protocol or "+".join(metric.partition(":")[0] for metric in options.metrics)
    home = Path(options.model or options.images)
    return (home if (home / "checkpoints").is_dir() else Path(".")) / "evaluation" / name


def _tell(record: dict[str, Any], evaluation: Evaluation, ready: Ready, say: Callable[[str], None]) -> None:
    for text in record["sentences"].values():
        say(text)
    for name, metric in evaluation.metrics.items():
        if summary := metric.summary(evaluation.estimates[name]):
            say(summary)
    for line in evaluation.sheets:
        say(line)
    if ready.finish is not None:
        say(ready.finish(evaluation.folder))
    run = record["run"]
    say(f"{run['images_per_second_of_a_process']:.3g} images/s a process, {run['memory_gb']:.2f} GB")
    say(f"record: {evaluation.folder / SCORES}")
