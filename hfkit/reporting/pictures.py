"""Pictures: a run's curves, what attention heads look at, the trials of a search.

matplotlib is imported only when something is drawn: it takes longer than all else that a run needs at its end.
"""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from hfkit.console import printable
from hfkit.reporting.summaries import compared_by, ranked

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = list[tuple[int, float]]

_LABELLED = 48  # tokens along an axis that get a name; of more, every second, third, ...
_PITCH = 0.11  # inches that a name needs
_WIDTH, _LARGEST = 7.5, 64.0  # inches: of one layer's heads, and of any picture
# matplotlib's own font has no Chinese, Japanese or Korean. One of these is installed where people read them.
_FONTS = (
    "Noto Sans CJK SC,Noto Sans CJK JP,Noto Sans SC,WenQuanYi Zen Hei,WenQuanYi Micro Hei,Droid Sans Fallback,"
    "PingFang SC,Hiragino Sans,Microsoft YaHei,Arial Unicode MS"
).split(",")
_INK = "#010203"  # replaced in an SVG by the colour of the page's text


def points(history: Sequence[dict[str, Any]], name: str) -> Curve:
    """Step and value of what Trainer logged under `name`."""
    return [(int(entry["step"]), float(entry[name])) for entry in history if entry.get(name) is not None]


def smooth(curve: Curve) -> Curve:
    """A running mean over a thirtieth of the points."""
    window = max(1, len(curve) // 30)
    sums = np.cumsum([0.0, *(value for _, value in curve)])
    starts = [max(0, end - window) for end in range(1, len(curve) + 1)]
    return [
        (step, float((sums[end] - sums[start]) / (end - start)))
        for end, (start, (step, _)) in enumerate(zip(starts, curve, strict=True), 1)
    ]


def _plot(axes: "Axes", curve: Curve, **style: Any) -> None:
    if curve:
        axes.plot([step for step, _ in curve], [value for _, value in curve], **style)


def plot_loss(axes: "Axes", history: Sequence[dict[str, Any]]) -> None:
    """Both losses of a run; the training loss as it is, faint, and smoothed."""
    training, held_out = points(history, "loss"), points(history, "eval_loss")
    _plot(axes, training, color="C0", alpha=0.25, linewidth=0.8)
    _plot(axes, smooth(training), color="C0", label="training")
    _plot(axes, held_out, color="C1", marker="o", label="held out")
    if training or held_out:
        _add_legend(axes)


def draw_curves(history: Sequence[dict[str, Any]], unit: str) -> "Figure":
    """The losses of a run, and below them its learning rate, from Trainer's log."""
    figure, (losses, rates) = _start(2, 1, size=(6.4, 5.2), sharex=True, height_ratios=(3, 1))
    plot_loss(losses, history)
    _plot(rates, points(history, "learning_rate"), color="C0")
    losses.set(ylabel=f"loss ({unit})")
    rates.set(xlabel="step", ylabel="learning rate")
    _use_whole_numbers(rates)
    return figure


def draw_measure(curves: dict[str, Curve], label: str) -> "Figure":
    """One measure of several runs, by name, over their steps."""
    figure, (axes,) = _start(1, 1, size=(6.4, 3.4))
    for number, (name, curve) in enumerate(curves.items()):
        marker = "o" if len(curve) < 30 else ""
        _plot(axes, curve, color=f"C{number}", marker=marker, label=name.replace("$", r"\$"))
    axes.set(xlabel="step", ylabel=label)
    _use_whole_numbers(axes)
    _add_legend(axes)
    return figure


def draw_attention(attention: "torch.Tensor", words: Sequence[str], layer: int | None) -> bytes:
    """How much each head looks from each token (row) at each earlier one (column), as PNG.

    attention: (layers, heads, length, length). words: the tokens. layer: only this one, large; None for all, small.
    The colours follow the square root of the weights: most weights are small, and would all be black.
    """
    from matplotlib import font_manager
    from matplotlib.colors import PowerNorm

    layers, heads = list(range(len(attention))) if layer is None else [layer], attention.shape[1]
    drawn = [(each, head) for each in layers for head in range(heads)]
    side = max(1.6, _PITCH * min(len(words), _LABELLED))
    columns = heads if layer is None else min(heads, int(_WIDTH // side))
    rows = -(-len(drawn) // columns)
    side = min(side, _LARGEST / max(rows, columns))
    step = -(-len(words) // int(side / _PITCH))
    places, names = range(0, len(words), step), [printable(word) for word in words[::step]]
    fonts = ["monospace", *set(font_manager.get_font_names()).intersection(_FONTS)]
    style: dict[str, Any] = {"fontsize": 7, "family": fonts, "parse_math": False}
    figure, grid = _start(rows, columns, size=(columns * side + 1.2, rows * (side + 0.3) + 1.0))
    for place, ((each, head), axes) in enumerate(zip(drawn, grid, strict=False)):
        norm = PowerNorm(0.5, vmin=0, vmax=1)
        image = axes.imshow(attention[each, head].numpy(), cmap="viridis", norm=norm)
        axes.set_title(f"layer {each}, head {head}", fontsize=8)
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        if place % columns == 0:
            axes.set_yticks(places, names, **style)
        if place + columns >= len(drawn):
            axes.set_xticks(places, names, rotation=90, **style)
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=list(grid), label="attention from the row's token to the column's", shrink=0.6)
    return to_png(figure)


def plot_trials(trials: Sequence[dict[str, Any]], importances: dict[str, float]) -> "Figure":
    """Scores of a search's trials in order and against each option's values, and what the options are worth.

    The best trial is marked in every chart.
    """
    measure = compared_by(trials)
    scored = [trial for trial in trials if trial["loss"] is not None]
    scores = [trial[measure] for trial in scored]
    best = ranked(scored)[0]
    names = list(dict.fromkeys([*importances, *(name for trial in scored for name in trial["params"])]))
    charts = 1 + bool(importances) + len(names)
    figure, (order, *rest) = _start(-(-charts // 3), 3, size=(10.8, 3.0 * -(-charts // 3)))

    def scatter(axes: "Axes", label: str, values: list[Any]) -> None:
        known = [(value, score) for value, score in zip(values, scores, strict=True) if value is not None]
        axes.plot(*zip(*known, strict=True), "o", color="C0", alpha=0.7)
        if (star := values[scored.index(best)]) is not None:
            axes.plot([star], [best[measure]], "*", color="C3", markersize=14, label="best")
        axes.set(xlabel=label, ylabel=f"held-out {measure}")

    numbers = [trial["number"] for trial in scored]
    so_far = (np.maximum if measure == "accuracy" else np.minimum).accumulate(scores)
    scatter(order, "trial", numbers)
    order.plot(numbers, so_far, drawstyle="steps-post", color="C1", label="best so far")
    _add_legend(order)
    _use_whole_numbers(order)
    if importances:
        bars = rest.pop(0)
        bars.barh(range(len(importances)), list(importances.values()), color="C0", alpha=0.4)
        for place, name in enumerate(importances):
            bars.text(0.01, place, name, va="center", fontsize=9, color=_INK)
        bars.invert_yaxis()
        bars.set(xlabel=f"share of the differences in {measure}", xlim=(0, 1), yticks=[])
    for axes, name in zip(rest, names, strict=False):
        values = [trial["params"].get(name) for trial in scored]
        known = [value for value in values if value is not None]
        if not all(isinstance(value, int | float) for value in known):
            values = [None if value is None else str(value) for value in values]
        scatter(axes, name, values)
        if all(isinstance(value, float) and value > 0 for value in known) and max(known) > 20 * min(known):
            axes.set_xscale("log")
    for axes in rest[len(names) :]:
        axes.set_visible(False)
    return figure


def _start(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple["Figure", list["Axes"]]:
    """A figure without background and its axes, row by row."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {name: _INK for name in ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    with rc_context({**style, "axes.facecolor": "none", "font.size": 11}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def _add_legend(axes: "Axes") -> None:
    axes.legend(labelcolor=_INK, framealpha=0)


def _use_whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def to_png(figure: "Figure", dpi: int = 110) -> bytes:
    """The figure on white."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that no font has is drawn as a box
        # "tight" makes room for titles and labels that the layout would cut off.
        figure.savefig(picture, format="png", dpi=dpi, bbox_inches="tight")
    return picture.getvalue()


def to_svg(figure: "Figure") -> Markup:
    """The figure as an element of a page, without background, in the colour of the page's text."""
    from matplotlib import rc_context

    picture = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings(), rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(picture, format="svg", metadata=nothing, transparent=True, bbox_inches="tight")
    svg = picture.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(_INK, "currentColor"))  # noqa: S704, matplotlib escapes text
