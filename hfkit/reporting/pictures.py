"""Pictures: a run's losses, and what attention heads look at."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure

from hfkit.console import printable

_LABELLED = 48  # tokens along an axis that get a name; of more, every second, third ...
_PITCH = 0.11  # inches that a name needs
_PAGE, _LARGEST = 7.5, 64.0  # inches: heads of one layer in a row, and of all layers
# matplotlib brings no font with Chinese, Japanese or Korean; one of these is where people read them.
_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
          "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Arial Unicode MS")  # fmt: skip


def points(history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Step and value of what Trainer logged under `name`."""
    return [(int(entry["step"]), float(entry[name])) for entry in history if entry.get(name) is not None]


def plot_loss(axes: Any, history: Sequence[dict[str, Any]], name: str = "", color: str = "C0") -> None:
    """Both losses of a run; the training's as it is, faint, and smoothed."""
    of = f" ({name})".replace("$", r"\$") if name else ""
    train, held = points(history, "loss"), points(history, "eval_loss")
    if train:
        axes.plot(*zip(*train, strict=True), color=color, alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*smooth(train), strict=True), color=color, label="training" + of)
    if held:
        style = {"color": color if name else "C1", "marker": "o", "linestyle": "--" if name else "-"}
        axes.plot(*zip(*held, strict=True), label="held out" + of, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or held:
        axes.legend()


def draw_curves(runs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> bytes:
    """Losses, and below them the learning rates, of runs, each with its name and Trainer's log; as PNG."""
    with rc_context({"font.size": 11}):  # on a phone it is half as large
        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for number, (name, history) in enumerate(runs):
            plot_loss(losses, history, name if len(runs) > 1 else "", f"C{number}")
            if planned := points(history, "learning_rate"):
                rates.plot(*zip(*planned, strict=True), color=f"C{number}")
        losses.set(xlabel="")
        rates.set(xlabel="step", ylabel="learning rate")
        rates.grid(alpha=0.3)
        return to_png(figure, 160)


def smooth(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A running mean over a thirtieth of the points."""
    window, total, found = max(1, len(curve) // 30), 0.0, []
    for at, (step, value) in enumerate(curve):
        total += value - (curve[at - window][1] if at >= window else 0.0)
        found.append((step, total / min(at + 1, window)))
    return found


def draw_attention(attention: torch.Tensor, words: Sequence[str], layer: int | None) -> bytes:
    """How much each head looks from each token (row) at each earlier one (column), as PNG.

    attention: (layers, heads, length, length). words: the tokens. layer: this one large, or None for all, small.
    """
    layers, heads = range(len(attention)) if layer is None else [layer], attention.shape[1]
    side = max(1.6, _PITCH * min(len(words), _LABELLED))
    columns = heads if layer is None else min(heads, int(_PAGE // side))
    rows = len(layers) * -(-heads // columns)
    side = min(side, _LARGEST / max(rows, columns))
    step = -(-len(words) // int(side / _PITCH))
    places, names = range(0, len(words), step), [printable(word) for word in words[::step]]
    installed = set(font_manager.get_font_names())
    style = {"fontsize": 7, "family": ["monospace", *installed.intersection(_FONTS)], "parse_math": False}
    figure = Figure(figsize=(columns * side + 1.2, rows * (side + 0.3) + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(layers) * heads :]:
        axes.set_visible(False)
    for place, axes in enumerate(grid[: len(layers) * heads]):
        head = attention[layers[place // heads], place % heads].numpy()
        image = axes.imshow(head, cmap="viridis", vmin=0, vmax=1)
        axes.set_title(f"layer {layers[place // heads]}, head {place % heads}", fontsize=8)
        axes.set(xticks=[], yticks=[])
        if place % columns == 0:
            axes.set_yticks(places, names, **style)
        if place + columns >= len(layers) * heads:
            axes.set_xticks(places, names, rotation=90, **style)
    figure.colorbar(image, ax=list(grid), label="attention from the row's token to the column's", shrink=0.6)
    return to_png(figure)


def draw_trials(trials: Sequence[dict[str, Any]], importances: dict[str, float]) -> bytes:
    """Scores of a search in their order, against each option's values, and what the options are worth, as PNG."""
    scored = [trial for trial in trials if trial["loss"] is not None]
    names = list({**importances, **{name: 0 for trial in scored for name in trial["params"]}})
    columns = 3
    rows = -(-(len(names) + 2) // columns)
    figure = Figure(figsize=(columns * 3.6, rows * 2.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    losses = [trial["loss"] for trial in scored]
    best = [min(losses[: at + 1]) for at in range(len(losses))]
    grid[0].plot([trial["number"] for trial in scored], losses, "o", label="trial")
    grid[0].plot([trial["number"] for trial in scored], best, drawstyle="steps-post", label="best so far")
    grid[0].set(xlabel="trial", ylabel="held-out loss")
    grid[0].legend()
    for at, (name, worth) in enumerate(importances.items()):
        grid[1].barh(-at, worth, color="C0", alpha=0.4)
        grid[1].text(0, -at, f" {name}", va="center", fontsize=8)
    grid[1].set(xlabel="importance", yticks=[])
    grid[1].set_visible(bool(importances))
    for axes, name in zip(grid[2:], names, strict=False):
        values = [trial["params"][name] for trial in scored]
        axes.plot(values, losses, "o")
        positive = all(isinstance(value, float) and value > 0 for value in values)
        if positive and max(values) / min(values) > 20:
            axes.set_xscale("log")
        axes.set(xlabel=name, ylabel="held-out loss")
    for axes in grid[2 + len(names) :]:
        axes.set_visible(False)
    return to_png(figure)


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a sign that no font has is drawn as a box
        figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()
