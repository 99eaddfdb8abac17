"""What all figures share: colours, fonts and writing the file.

The colours are Okabe and Ito's, or run from light to dark: the colour-blind tell them apart, and so
does a grey printer. This file imports matplotlib, which the `demo` extra brings.
"""

import textwrap
import warnings
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike

from matplotlib import font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from miniclip.figures.exhibits import Exhibit
from miniclip.zeroshot.classifier import Score

KINDS = [f".{kind}" for kind in FigureCanvasBase.filetypes]  # that a picture's name may end in


BLUE = "#0072b2"


ORANGE = "#d55e00"


def shorten(label: str, width: int = 24) -> str:
    """The label, cut to `width` characters if it is longer."""
    return label if len(label) <= width else label[: width - 1] + "…"


def save(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a picture in the format that its name ends in. ValueError where that cannot be."""
    texts = figure.findobj(Text)
    families = [*rcParams["font.family"], *fonts_beside("".join(t.get_text() for t in texts))]
    for text in texts:
        text.set_fontfamily(families)
    try:
        with (
            warnings.catch_warnings()
        ):  # of characters that no font here has, and are drawn as boxes
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(path, dpi=120)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def fonts_beside(text: str) -> dict[str, str]:
    """Installed fonts that have what matplotlib's own lacks of a text, the one that has most first:
    by family, the file.

    >>> list(fonts_beside("plain, or naïve, or по-русски"))
    []
    """
    has = font_manager.get_font(usual_font()).get_charmap().keys()
    lacking = set(map(ord, text)) - has - {ord("\n")}
    covers = []
    for font in font_manager.fontManager.ttflist if lacking else []:
        with suppress(RuntimeError):  # a font of bitmaps
            has = font_manager.get_font(font.fname).get_charmap().keys()
            if lacking & has and "Last Resort" not in font.name:  # which has boxes for everything
                covers.append((lacking & has, font))
    found = {}
    covers.sort(key=lambda row: (-len(row[0]), row[1].style != "normal", row[1].weight != 400))
    for covered, font in covers:
        if lacking & covered:
            found[font.name] = font.fname
            lacking -= covered
    return found


def usual_font() -> str:
    """The file of matplotlib's own font."""
    return font_manager.findfont(font_manager.FontProperties(family=rcParams["font.family"]))


def font_file(text: str) -> str:
    """The font for a text that may have one only."""
    return next(iter(fonts_beside(text).values()), usual_font())


def show_picture(axes: Axes, exhibit: Exhibit) -> None:
    """A picture under its name."""
    axes.imshow(exhibit.picture)
    axes.set_title(exhibit.name, loc="left", fontsize=11)
    axes.set_axis_off()


def draw_bars(axes: Axes, scores: Sequence[Score], inside: bool = False) -> None:
    """A bar for each label, best on top; long labels stand above their bars."""
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
    """The text in at most three lines."""
    return textwrap.wrap(text, 28, max_lines=3, placeholder=" …")


def show_panel(axes: Axes, picture: Image.Image, title: str, below: str = "") -> None:
    """A picture with a title above and a note below, both wrapped."""
    axes.imshow(picture)
    # As text, for a $ would begin a formula.
    axes.set_title("\n".join(title_of(title)), loc="left", fontsize=11, parse_math=False)
    lines = textwrap.wrap(below, 36)
    axes.text(0, -0.03, "\n".join(lines), transform=axes.transAxes, fontsize=9, va="top")
