"""Draw search results as one image."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from miniclip.errors import ImageError
from miniclip.retrieval.index import Hit, Index
from miniclip.transform import to_rgb

TILE = 240  # the longer side of an image on a sheet, in pixels
SHEETS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf")


def draw_sheet(
    index: Index, hits: Sequence[Hit], title: str, path: str | PathLike[str]
) -> list[str]:
    """Draw the images that a search found, the best first, with their scores.

    Args:
        index: the index that was searched.
        hits: the results of `Index.search`.
        title: the first line.
        path: the file to write. Its ending must be in SHEETS.

    Returns:
        A line for each image that can no longer be read. The sheet shows a note for such an image.

    Raises:
        ValueError: the file cannot be written.
    """
    columns = min(len(hits), 4)
    gap, line = 16, 22
    step_x, step_y = TILE + gap, TILE + 2 * line + gap
    rows = -(-len(hits) // columns)
    sheet = Image.new("RGB", (columns * step_x + gap, rows * step_y + 3 * gap + line), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(20), ImageFont.load_default(15)
    font = font_for(title, 20)
    draw.text((gap, gap), fitting(title, font, sheet.width - 2 * gap), "black", font)
    lost = []
    for i, hit in enumerate(hits):
        x, y = gap + i % columns * step_x, 2 * gap + line + i // columns * step_y
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), "#eeeeee")
        try:
            picture = ImageOps.contain(to_rgb(index.open(hit.path)), (TILE, TILE))
            left, top = (TILE - picture.width) // 2, (TILE - picture.height) // 2
            sheet.paste(picture, (x + left, y + top))
        except ImageError as error:
            lost.append(str(error))
            draw.text((x + gap, y + gap), "cannot be read", "black", small)
        draw.text((x, y + TILE + 4), f"{i + 1}   {hit.score:.3f}", "#0072b2", large)
        font = font_for(hit.path, 15)
        name = fitting(hit.path, font, TILE, keep_end=True)
        draw.text((x, y + TILE + 4 + line), name, "black", font)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be written: {error}") from None
    return lost


def font_for(text: str, size: int) -> Any:
    """Return Pillow's font for an ASCII text. For other texts, return a font that matplotlib finds.

    Without matplotlib, return Pillow's font for all texts.
    """
    if text.isascii():
        return ImageFont.load_default(size)
    try:
        from miniclip.figures.style import font_file
    except ValueError:  # matplotlib is not installed
        return ImageFont.load_default(size)
    return ImageFont.truetype(font_file(text), size)


def fitting(text: str, font: Any, width: int, keep_end: bool = False) -> str:
    """Shorten a text to `width` pixels. Cut off the end, or the beginning if `keep_end`."""
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    shown = text
    while shown and font.getlength(shown) > width:
        text = text[1:] if keep_end else text[:-1]
        shown = f"…{text}" if keep_end else f"{text}…"
    return shown
