"""Pictures of prompts in a folder: PNGs that say how they were drawn, and a contact sheet."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart.cli import split_prompt
from pixart.contact_sheet import contact_sheet
from pixart.diffusion.sampling import SampleConfig
from pixart.errors import InputError
from pixart.inference.latents import choose_size
from pixart.inference.pipeline import Pipeline


def save_samples(
    pipeline: Pipeline, prompts: Sequence[str], folder: str | Path, config: SampleConfig | None = None, *,
    steps: int | None = None, guidance: float | None = None, sampler: str | None = None, seed: int = 0, count: int = 1,
    height: int | None = None, width: int | None = None, sizes: Literal["exact", "official"] = "exact",
    negative_prompt: str | None = None, truncate: bool = False, **options,
) -> list[Path]:  # fmt: skip
    """Draw `count` pictures of each prompt, with seeds from `seed` on, into PNGs and a contact sheet in `folder`.

    A prompt may end in `--ar h:w` or `--hw height:width`, which goes before the arguments. A PNG's text chunks hold
    prompt, seed, sampler, steps and guidance. `options` are further ones of `Pipeline.__call__`.

    Raises:
        InputError: as there, or the folder cannot be written, which is tried before anything is drawn.
    """
    if count < 1 or not prompts:
        raise InputError(f"got {len(prompts)} prompts and count {count}, expected at least one of each")
    config = pipeline.settings(config, steps=steps, guidance=guidance, sampler=sampler)
    parsed = [split_prompt(prompt) for prompt in prompts]
    texts = [text for text, _ in parsed]
    wanted = [size or {"height": height, "width": width} for _, size in parsed]
    for size in wanted:  # the last prompt's fault must not cost the others' pictures
        choose_size(pipeline.card, **size, sizes=sizes)
    if pipeline.text is not None and not truncate:
        pipeline.text.check_lengths(texts)
    folder, images = Path(folder), {}
    with _results_in(folder):
        while left := [i for i in range(len(texts)) if i not in images]:
            rows = [i for i in left if wanted[i] == wanted[left[0]]]  # a call draws one size
            made = pipeline(
                [texts[i] for i in rows], seed, config, **wanted[left[0]], sizes=sizes, images_per_prompt=count,
                negative_prompts=negative_prompt, truncate=truncate, **options,
            )  # fmt: skip
            images |= {i: made[n * count : (n + 1) * count] for n, i in enumerate(rows)}
    jobs = [(text, seed + n, images[i][n]) for i, text in enumerate(texts) for n in range(count)]
    settings = {"sampler": config.sampler, "steps": config.steps, "guidance": config.guidance}
    if negative_prompt is not None:
        settings["negative_prompt"] = negative_prompt
    with _writing(folder):
        return _write_pictures(folder, jobs, settings)


def _write_pictures(folder: Path, jobs: list[tuple[str, int, Image.Image]], settings: dict[str, Any]) -> list[Path]:
    """A PNG of each prompt, seed and picture, and all of them on the contact sheet → the PNGs."""
    paths = []
    for i, (text, seed, image) in enumerate(jobs):
        info = PngInfo()
        for key, value in {"prompt": text, "seed": seed, **settings}.items():
            info.add_itxt(key, str(value))
        words = re.sub(r"[^\w]+", "-", text).strip("-")[:40]
        paths.append(folder / f"{i:03d}_{words}_seed{seed}.png")
        image.save(paths[-1], pnginfo=info)
    contact_sheet([[image] for *_, image in jobs], [text for text, *_ in jobs]).save(folder / "contact_sheet.png")
    return paths


@contextmanager
def _results_in(folder: Path) -> Iterator[None]:
    """A folder made and tried before the work that fills it; gone again if that fails."""
    with _writing(folder):
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    try:
        yield
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
