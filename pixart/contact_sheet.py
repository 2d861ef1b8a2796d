"""Contact sheets: grids of labelled images."""

import textwrap
import unicodedata
from collections.abc import Collection, Sequence

from PIL import Image, ImageDraw, ImageFont

LABEL_LINES, LINE = 2, 12


def contact_sheet(
    cells: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    *,
    columns: int | None = None,
    side: int | None = None,
    red: Collection[int] = (),
) -> Image.Image:
    """A sheet with one cell per label: its images one above the other, the label below.

    Args:
        columns: by default as many as make the sheet roughly square.
        side: width of a cell in pixels; by default the images' own, but at least 96. Images are enlarged without
            smoothing, so that a small model's pixels are shown as they are.
        red: the indices of cells whose label is red.
    """
    side = side or max(96, max(image.width for cell in cells for image in cell))
    stack = max(len(cell) for cell in cells)
    heights = [
        max(round(cell[i].height * side / cell[i].width) for cell in cells if i < len(cell)) for i in range(stack)
    ]
    height = sum(heights) + LABEL_LINES * LINE + 6
    columns = columns or max(1, min(len(cells), round((len(cells) * height / side) ** 0.5)))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (side + 4) + 4, rows * (height + 4) + 4), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for i, (cell, label) in enumerate(zip(cells, labels, strict=True)):
        left, top = 4 + i % columns * (side + 4), 4 + i // columns * (height + 4)
        for image, room in zip(cell, heights, strict=False):
            size = (side, round(image.height * side / image.width))
            enlarge = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            sheet.paste(image.resize(size, enlarge), (left, top))
            top += room
        lines = textwrap.wrap(_plain(label), width=max(side // 6, 4), max_lines=LABEL_LINES, placeholder="…")
        for line in lines:
            draw.text((left + 1, top + 1), line, fill="red" if i in red else "black", font=font)
            top += LINE
    return sheet


def _plain(text: str) -> str:
    """Remove accents, which Pillow's default font does not have."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
