"""Evaluation protocols by name: the prompts, the number and size of images, the reference, and the files to write.

No protocol downloads anything; missing files are reported before anything is drawn.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pixart.errors import InputError
from pixart.evaluate.image_metric import Item
from pixart.evaluate.reference import Fit
from pixart.files import read_lines, write_file, write_png

COCO_IMAGES, ADM_IMAGES = 30_000, 50_000
GENEVAL_EACH = DPG_EACH = 4


@dataclass(frozen=True)
class Ready:
    """What is to be drawn and scored."""

    items: list[Item]
    metrics: tuple[str, ...] = ()  # in addition to those that the user names
    size: tuple[int, int] | None = None  # (height, width); None: the model's native size
    reference: Path | None = None
    fit: Fit = "exact"
    keep: Callable[[int], Path] | None = None  # number of an image → where it is written
    begin: Callable[[Path], None] | None = None  # writes files that accompany the images
    finish: Callable[[Path], str] | None = None  # called when all images exist; returns a line for the user


def _need(path: Path, protocol: str, what: str) -> Path:
    if not path.exists():
        raise InputError(f"protocol {protocol}: there is no {path}; expected {what}")
    return path


def coco30k(data: Path, seed: int) -> Ready:
    """FID-30K, reported in the PixArt-α paper: 30,000 captions of COCO 2014 validation at 256 px."""
    file = _need(
        data / "annotations" / "captions_val2014.json",
        "coco30k",
        "COCO's annotations_trainval2014.zip and val2014.zip unpacked in --data, from cocodataset.org",
    )
    images = _need(data / "val2014", "coco30k", "the 40,504 images of COCO's val2014.zip, from cocodataset.org")
    rows = sorted(json.loads(file.read_text(encoding="utf-8"))["annotations"], key=lambda row: row["id"])
    if len(rows) < COCO_IMAGES:
        raise InputError(f"protocol coco30k: {file} has {len(rows)} captions, expected at least {COCO_IMAGES}")
    chosen = np.sort(np.random.default_rng(0).choice(len(rows), COCO_IMAGES, replace=False))
    items = [Item(" ".join(rows[i]["caption"].split()), seed + n, n) for n, i in enumerate(chosen)]
    return Ready(items, ("fid",), (256, 256), images, "crop")


def mjhq30k(data: Path, seed: int) -> Ready:
    """FID on MJHQ-30K: 10 categories of 3,000 prompts with their images."""
    file = _need(data / "meta_data.json", "mjhq30k", "meta_data.json of playgroundai/MJHQ-30K on the Hub, in --data")
    images = _need(data / "mjhq30k_imgs", "mjhq30k", "mjhq30k_imgs.zip of playgroundai/MJHQ-30K, unpacked in --data")
    rows = json.loads(file.read_text(encoding="utf-8"))
    items = [Item(rows[key]["prompt"], seed + n, n) for n, key in enumerate(sorted(rows))]
    return Ready(items, ("fid",), None, images, "crop")


def geneval(data: Path, seed: int) -> Ready:
    """The folder that GenEval's detector reads: 4 images per prompt."""
    file = data if data.is_file() else data / "evaluation_metadata.jsonl"
    _need(file, "geneval", "prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval, as --data")
    rows = [row for _, row in read_lines(file)]
    items = [Item(row["prompt"], seed + n, i) for i, row in enumerate(rows) for n in range(GENEVAL_EACH)]

    def keep(number: int) -> Path:
        return Path(f"{number // GENEVAL_EACH:05d}") / "samples" / f"{number % GENEVAL_EACH:04d}.png"

    def begin(folder: Path) -> None:
        for i, row in enumerate(rows):
            (folder / f"{i:05d}").mkdir(parents=True, exist_ok=True)
            (folder / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")

    def finish(folder: Path) -> str:
        return f"{folder}: for GenEval's evaluation/evaluate_images.py"

    return Ready(items, keep=keep, begin=begin, finish=finish)


def dpg(data: Path, seed: int) -> Ready:
    """The folder that DPG-Bench reads: a 2 × 2 grid per prompt, named like the prompt's file."""
    folder = data / "prompts" if (data / "prompts").is_dir() else data
    files = sorted(_need(folder, "dpg", "dpg_bench/prompts of github.com/TencentQQGYLab/ELLA, as --data").glob("*.txt"))
    if not files:
        raise InputError(f"protocol dpg: there are no .txt in {folder}; expected a file for each prompt")
    prompts = [" ".join(file.read_text(encoding="utf-8").split()) for file in files]
    items = [Item(prompt, seed + n, i) for i, prompt in enumerate(prompts) for n in range(DPG_EACH)]

    def keep(number: int) -> Path:
        return Path("images") / f"{number:06d}.png"

    def finish(out: Path) -> str:
        (out / "grids").mkdir(exist_ok=True)
        for i, file in enumerate(files):
            four = [np.asarray(Image.open(out / keep(DPG_EACH * i + n)).convert("RGB")) for n in range(DPG_EACH)]
            grid = Image.fromarray(np.vstack([np.hstack(four[:2]), np.hstack(four[2:])]))
            write_png(out / "grids" / f"{file.stem}.png", grid)
        side = four[0].shape[1]
        return (
            f"{out / 'grids'}: for DPG-Bench's compute_dpg_bench.py, with --resolution {side} and --pic-num {DPG_EACH}"
        )

    return Ready(items, keep=keep, finish=finish)


def adm_npz(data: Path, seed: int) -> Ready:
    """50,000 images in the file that ADM's evaluator reads (`arr_0`), cycling through the prompts in --data."""
    _need(data, "adm-npz", "a file of prompts, one for each class, as --data")
    lines = [line.strip() for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise InputError(f"protocol adm-npz: {data} is empty; expected one prompt for each class")
    items = [Item(lines[n % len(lines)], seed + n, n) for n in range(ADM_IMAGES)]

    def keep(number: int) -> Path:
        return Path("images") / f"{number:06d}.png"

    return Ready(items, keep=keep, finish=lambda out: pack_npz(out, len(items), keep))


def pack_npz(out: Path, count: int, keep: Callable[[int], Path]) -> str:
    """Write all images to one `.npz`, one image at a time, because 50,000 images of 256 px are 10 GB."""
    import zipfile

    with Image.open(out / keep(0)) as first:
        width, height = first.size
    target = out / "samples.npz"

    def write(partial: Path) -> None:
        with (
            zipfile.ZipFile(partial, "w", allowZip64=True) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for number in range(count):
                with Image.open(out / keep(number)) as image:
                    member.write(np.asarray(image.convert("RGB")).tobytes())

    write_file(target, write)
    return f"{target}: for ADM's evaluations/evaluator.py"


PROTOCOLS: dict[str, Callable[[Path, int], Ready]] = {
    "coco30k": coco30k,
    "mjhq30k": mjhq30k,
    "geneval": geneval,
    "dpg": dpg,
    "adm-npz": adm_npz,
}
