"""Figures show the numbers that were counted, measured or computed."""

import pytest
import torch
from PIL import Image

from miniclip.bench import Row
from miniclip.bench.drawing import draw_bench
from miniclip.evaluation.classification import BINS, Evaluation
from miniclip.exhibits import Exhibit, Heat
from miniclip.figures.confusion import draw_confusion
from miniclip.figures.curves import draw_curves
from miniclip.figures.demo import draw_demo
from miniclip.figures.explanations import draw_text_maps
from miniclip.lens.heat import overlay
from miniclip.parity import Difference, Report
from miniclip.parity.drawing import draw_parity
from miniclip.zeroshot.classifier import Score


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Call a drawing function, and return matplotlib's figure without rendering it."""
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *_, **options: figures.append(figure)
    )

    def drawn(function, *arguments):
        function(*arguments, tmp_path / "picture.png")
        return figures.pop()

    return drawn


def bins():
    """Two of four images with confidence 1/4 are right, and three of four with confidence 7/8."""
    found = torch.zeros(BINS, 3)
    found[3], found[13] = torch.tensor([4, 1, 2]), torch.tensor([4, 3.5, 3])
    return found


def texts(axes):
    return [text.get_text() for text in axes.texts]


def names(axes, side="y"):
    return [label.get_text() for label in getattr(axes, f"get_{side}ticklabels")()]


def widths(axes):
    return [bar.get_width() for bar in axes.patches]


def test_each_row_of_a_confusion_matrix_shows_the_percentages_of_one_true_class(drawn):
    confusion = torch.tensor([[6, 1, 3], [2, 2, 0], [0, 0, 0]])
    result = Evaluation(["cat", "dog", "a ship " * 9], confusion, confusion.diagonal(), [], bins())
    figure = drawn(draw_confusion, result)
    left, right, below = figure.axes
    shares = [[0.6, 0.1, 0.3], [0.5, 0.5, 0], [0, 0, 0]]
    shown = torch.tensor(left.images[0].get_array().data)
    torch.testing.assert_close(shown, torch.tensor(shares, dtype=torch.float64))
    cells = {text.get_position(): text.get_text() for text in left.texts}  # (column, row)
    assert cells == {(0, 0): "60", (1, 0): "10", (2, 0): "30", (0, 1): "50", (1, 1): "50"}
    assert (left.get_xlabel(), left.get_ylabel()) == ("predicted class", "true class")
    assert names(left) == names(left, "x") == ["cat", "dog", "a ship a ship a ship a …"]
    # The first name is the bottom bar. The top bar is the most frequent confusion.
    assert names(right) == ["cat → dog", "dog → cat", "cat → a ship a ship a ship a …"]
    assert widths(right) == [1, 2, 3] and texts(right) == ["1", "2", "3"]
    assert figure.get_suptitle() == "top-1 57.1% of 14 images"
    _, line = below.lines  # the first line is the diagonal
    assert line.get_xydata().tolist() == [[0.25, 0.5], [0.875, 0.75]]
    assert [bar.get_height() for bar in below.patches] == [0.5, 0.5]
    assert "calibration error 18.8%" in below.get_title(loc="left")


def test_a_confusion_matrix_of_many_classes_has_a_dot_for_each_confusion(drawn):
    confusion = torch.eye(50, dtype=torch.int64)
    confusion[3, 40], confusion[7, 9] = 4, 1
    result = Evaluation(["a"] * 50, confusion, confusion.diagonal(), [], bins())
    left, right, _ = drawn(draw_confusion, result).axes
    (dots,) = left.collections
    assert dots.get_offsets().tolist() == [[40, 3], [9, 7]]  # (predicted, true)
    assert dots.get_sizes().tolist() == [60, 15]  # the dots' areas are proportional to the counts
    assert left.get_ylim() == (50, -1) and widths(right) == [1, 4]


def test_curves_show_the_metrics_of_a_run(drawn):
    rows = [{"step": 10 * i, "loss": 3 - i, "logit_scale": 14 + i, "lr": 0.1 * i} for i in range(3)]
    panels = drawn(draw_curves, rows).axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "loss", "exp(logit scale)", "learning rate"
    ]  # fmt: skip
    for axes, name in zip(panels, ("loss", "logit_scale", "lr"), strict=True):
        (line,) = axes.lines
        assert [*line.get_xdata()] == [0, 10, 20]
        assert [*line.get_ydata()] == [row[name] for row in rows]


def test_curves_show_the_best_score_and_the_throughput_and_the_memory(drawn):
    rows = [
        {"step": i, "loss": 1.0, "pairs_per_second": 10.0 + i, "peak_gib": 2.0 + i}
        for i in range(4)
    ]
    for i, score in ((1, 0.25), (2, 0.5), (3, 0.5)):
        rows[i] |= {"val_accuracy": score, "val_mean_per_class": 0.1}
    loss, held_out, throughput, memory = drawn(draw_curves, rows).axes
    assert held_out.get_title(loc="left") == "held-out data" and texts(held_out) == ["50.0%"]
    accuracy, mean, best = held_out.lines
    assert accuracy.get_xydata().tolist() == [[1, 0.25], [2, 0.5], [3, 0.5]]
    assert best.get_xydata().tolist() == [[2, 0.5]]  # the first step with the best score
    named = [text.get_text() for text in held_out.get_legend().get_texts()]
    assert named == ["accuracy", "mean per class"]
    assert [*throughput.lines[0].get_ydata()] == [10, 11, 12, 13]
    assert [*memory.lines[0].get_ydata()] == [2, 3, 4, 5]
    assert throughput.get_ylim()[0] == memory.get_ylim()[0] == 0


def test_the_demo_draws_bars_for_probabilities_and_draws_heat_maps_over_grey_images(drawn):
    picture = Image.new("RGB", (8, 8), "red")
    scores = [Score(f"label {i}", 3 - i, share) for i, share in enumerate((0.5, 0.3, 0.2))]
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4, 2:4] = True
    heat = Heat("a star", torch.tensor([[-1.0, 0.5], [1.0, 2.0]]), mask)
    scene, cat = Exhibit("a drawn scene", picture, scores), Exhibit("cat", picture, scores)
    figure = drawn(draw_demo, scene, [heat], [cat])
    above, photograph, shown, bars, hot, *_ = figure.axes
    assert above.get_title(loc="left") == "cat"
    assert shown.get_title(loc="left") == "a drawn scene"
    assert widths(bars) == widths(photograph) == [0.2, 0.3, 0.5]  # the first bar is at the bottom
    assert texts(bars) == ["20%", "30%", "50%", "label 2", "label 1", "label 0"]
    assert texts(photograph) == texts(bars)
    assert hot.get_title(loc="left") == "a star"
    warmth = hot.images[0].get_array()[[0, 0, -1, -1], [0, -1, 0, -1]].sum(1)  # at the corners
    assert warmth[0] < warmth[1] < warmth[2] < warmth[3] and hot.collections  # the outline


@pytest.mark.parametrize(
    ("method", "note"),
    [
        ("attention", "up to 0.75 of the attention; the same for every text"),
        ("rollout", "up to 0.75 of the attention; the same for every text"),
        ("relevance", "up to 0.75"),
        ("gradcam", "up to 0.75, a weighted sum of channels"),
        ("tokens", "up to 0.75 added to the cosine"),
        ("occlusion", "up to 0.75 subtracted from the cosine"),
    ],
)
def test_a_heat_map_states_the_value_of_its_warmest_patch(drawn, method, note):
    heats = torch.tensor([[[0.25, 0.75], [-1, 0]], [[-1, -2], [-3, 0]]])
    figure = drawn(
        draw_text_maps, Image.new("RGB", (8, 8)), ["a $cat$", "dog"], [0.25, 0.5], {method: heats}
    )
    picture, cat, dog, _ = figure.axes
    titles = [axes.get_title(loc="left") for axes in (picture, cat, dog)]
    assert titles == [f"by {method}", "a $cat$ (cosine 0.25)", "dog (cosine 0.50)"]
    assert " ".join(texts(cat)[0].split()) == note and texts(dog) == ["nowhere"]


def test_a_row_of_the_figure_has_an_image_and_up_to_four_heat_maps(drawn):
    picture, texts = Image.new("RGB", (8, 8)), [f"text {i}" for i in range(6)]
    shown = [f"{text} (cosine 0.50)" for text in texts]
    maps = {"tokens": torch.rand(6, 2, 2)}
    one = drawn(draw_text_maps, picture, texts, [0.5] * 6, maps).axes[:-1]
    titles = [axes.get_title(loc="left") for axes in one]
    assert titles == ["by tokens", *shown[:4], "by tokens", *shown[4:], "", ""]
    maps = {method: torch.rand(2, 2, 2) for method in ("tokens", "rollout")}
    two = drawn(draw_text_maps, picture, texts[:2], [0.5, 0.5], maps).axes[:-1]
    titles = [axes.get_title(loc="left") for axes in two]
    assert titles == [shown[0], "tokens", "rollout", shown[1], "tokens", "rollout"]


def test_all_heat_maps_of_one_method_have_the_same_colour_scale(drawn):
    """The patch's score is 1 for the first text and 0.5 for the second, so its colours differ."""
    heats = torch.tensor([[[1.0]], [[0.5]]])
    picture = Image.new("RGB", (8, 8))
    axes = drawn(draw_text_maps, picture, ["a", "b"], [0.5, 0.5], {"tokens": heats}).axes
    full, half = (axes[i].get_images()[0].get_array()[4, 4].tolist() for i in (1, 2))
    assert full == list(overlay(picture, heats[0]).getpixel((4, 4)))
    assert half == list(overlay(picture, heats[1], warmest=1.0).getpixel((4, 4))) != full


def test_the_bench_figure_draws_ratios_as_bars_from_one_and_shows_quartiles(drawn):
    def row(contender, difference, ratio):
        return Row("vision", "2 images", 2, "images", contender, difference, (1, 1, 1), ratio)

    rows = [
        row("miniclip", 0.0, (1, 1, 1)),
        row("transformers", 0.0, (1.5, 2.0, 3.0)),
        row("matrix products alone", None, (0.4, 0.5, 0.6)),
        row("another", 1.0, None),
    ]
    (axes,) = drawn(draw_bench, rows).axes
    bars = [bar for bar in axes.patches if bar.get_height() == pytest.approx(0.6)]
    reach = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars]
    assert reach == [(1, 1), (1, 2.0), (1, 0.5)]
    whiskers = [line.get_segments()[0][:, 0].tolist() for line in axes.collections]
    assert whiskers == [[1, 1], [1.5, 3.0], [0.4, 0.6]]
    assert texts(axes) == ["vision: 2 images", "1.00", "2.00", "0.50"]
    assert names(axes) == ["", "miniclip", "transformers", "matrix products alone"]
    assert axes.get_xscale() == "log"
    colours = [bar.get_facecolor()[:3] for bar in bars]
    assert len(set(colours)) == 3 and len(set(colours[2])) == 1  # grey, because it is not a library


def test_the_parity_figure_draws_each_difference_at_the_depth_of_its_site(drawn):
    sites = ["vision.blocks.0.resid_pre", "vision.blocks.0.q", "text.blocks.0.resid_pre", "logits"]
    rows = [
        Difference(site, 10.0**-i, 0.5, 10.0 ** -(i + 4), 10.0 ** -(i + 8), 0.0, i != 1)
        for i, site in enumerate(sites, 1)
    ]
    figure = drawn(draw_parity, Report(rows, sites[0], "a cause"))
    vision, text = figure.axes
    shown = {line.get_label(): [*line.get_ydata()] for line in vision.lines}
    assert shown["difference"] == [0.1, 0.01, 0.0001]
    assert shown["difference in float64"] == pytest.approx([1e-5, 1e-6, 1e-8])
    assert shown["error of model"] == pytest.approx([1e-9, 1e-10, 1e-12])
    assert shown["error of other"] == [1e-17] * 3  # an error of 0 is drawn at 1e-17
    assert [*text.lines[0].get_ydata()] == [0.001, 0.0001]
    assert names(vision, "x") == ["0", "logits"] and texts(vision) == [f" {sites[0]}"]
    assert "first at vision.blocks.0.resid_pre; likely cause: a cause" in figure.get_suptitle()
