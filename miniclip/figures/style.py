"""Colours, fonts and file output, for all figures.

The colours (by Okabe and Ito) are distinct for colour-blind readers and in black-and-white print.
"""

import textwrap
import warnings
from collections.abc import Sequence
from os import PathLike

from matplotlib import font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from miniclip.zeroshot.classifier import Score

PICTURE_SUFFIXES = [f".{kind}" for kind in FigureCanvasBase.filetypes]  # of figure files
BLUE, ORANGE = "#0072b2", "#d55e00"


def save_figure(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a figure, in the format of the file's suffix. Raises ValueError if writing fails."""
    texts = figure.findobj(Text)
    families = [*rcParams["font.family"], *fonts_beside("".join(t.get_text() for t in texts))]
    for text in texts:
        text.set_fontfamily(families)
    try:
        with warnings.catch_warnings():  # a character that no font contains is drawn as a box
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(path, dpi=120)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def fonts_beside(text: str) -> dict[str, str]:
    """Return installed fonts {family: file} for characters that matplotlib's default font lacks.

    >>> fonts_beside("plain, or naïve, or по-русски")
    {}
    """
    found = {}
    lacking = {*map(ord, text)} - {ord("\n")} - characters_of(usual_font())
    for font in font_manager.fontManager.ttflist if lacking else []:
        is_plain = font.style == "normal" and font.weight == 400
        # The font "Last Resort" draws every character as a box.
        if is_plain and "Last Resort" not in font.name and lacking & characters_of(font.fname):
            found[font.name] = font.fname
            lacking -= characters_of(font.fname)
    return found


def characters_of(font: str) -> set[int]:
    """The code points in a font file. The set is empty for a bitmap font, which cannot be read."""
    try:
        return {*font_manager.get_font(font).get_charmap()}
    except RuntimeError:
        return set()


def usual_font() -> str:
    """The file of matplotlib's default font."""
    return font_manager.findfont(font_manager.FontProperties(family=rcParams["font.family"]))


def font_file(text: str) -> str:
    """The default font's file, or another font's file if the default lacks characters of `text`."""
    return next(iter(fonts_beside(text).values()), usual_font())


def draw_bars(axes: Axes, scores: Sequence[Score], inside: bool = False) -> None:
    """Draw a bar for each label, the best on top. If `inside`, the labels are inside the axes."""
    best = scores[::-1]
    bars = axes.barh(range(len(best)), [s.probability for s in best], color=BLUE, height=0.5)
    bars[-1].set_color(ORANGE)
    axes.bar_label(bars, [f"{score.probability:.0%}" for score in best], padding=3)
    if inside:
        axes.set_yticks([])
        for i, score in enumerate(best):
            axes.text(0, i + 0.32, score.label, fontsize=10, va="bottom")
        axes.set_ylim(-0.5, len(best) - 0.1)
    else:
        axes.set_yticks(range(len(best)), [score.label for score in best])
    axes.set_xlim(0, 1.2)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def title_of(text: str) -> list[str]:
    """Wrap a text to at most three lines."""
    return textwrap.wrap(text, 28, max_lines=3, placeholder=" …")


def show_picture(axes: Axes, picture: Image.Image, title: str, below: str = "") -> None:
    """Draw an image with a title above and a note below, both wrapped."""
    axes.imshow(picture)
    axes.set_axis_off()
    # Plain text, because a $ would begin a formula.
    axes.set_title("\n".join(title_of(title)), loc="left", fontsize=11, parse_math=False)
    lines = textwrap.wrap(below, 36)
    axes.text(0, -0.03, "\n".join(lines), transform=axes.transAxes, fontsize=9, va="top")
