"""The pictures of the notebooks: grids with captions, loss curves, the labels table, heat maps.

Takes plain values (images, lists, DataFrames), never a model. Used by all notebooks.
"""

import warnings
from pathlib import Path
from textwrap import fill

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.figure import Figure

# Fonts with Chinese and Japanese characters, where one of them is installed.
_CJK_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "Hiragino Sans",
    "PingFang SC", "Yu Gothic", "Microsoft YaHei", "SimHei", "MS Gothic", "Arial Unicode MS",
)  # fmt: skip
LOSS_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
COLOURS = {"ok": "#2a9d8f", "bad": "#e76f51", "quiet": "#bfbfbf", "mark": "#264653"}


def cjk_font() -> str | None:
    """The name of an installed font that has Chinese and Japanese characters, or None."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in _CJK_FONTS if name in installed), None)


def use_fonts() -> str | None:
    """Let matplotlib fall back to that font, and return its name; without one it draws boxes."""
    name = cjk_font()
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a line a character
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *([name] if name else [])]
    return name


def save_figure(figure: Figure, path) -> str:
    """Write the figure (PNG, 100 dpi) and return the path as text."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    return str(path)


def show_images(images, titles=None, columns: int = 6, side: float = 1.6) -> Figure:
    """A grid of pictures with a short text above each; `side` in inches."""
    rows = max(1, -(-len(images) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(side * columns, side * 1.25 * rows), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    width = int(side * 15)  # characters of 7 points on that many inches
    for i, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        axis.imshow(image)
        axis.set_title(fill(titles[i], width) if titles else "", fontsize=7)
    figure.tight_layout()
    return figure


def show_counts(table: pd.DataFrame, label: str, count: str, good=("downloaded",)) -> Figure:
    """One horizontal bar a row of the table, its count written beside it (logarithmic axis)."""
    table = table.iloc[::-1]
    colours = [COLOURS["ok" if name in good else "bad"] for name in table[label]]
    figure, axis = plt.subplots(figsize=(6, 0.3 * len(table) + 0.8))
    axis.barh(table[label].str.slice(0, 60), table[count], color=colours)
    axis.set(xscale="log", xlabel=f"{count} (log scale)", xlim=(0.5, table[count].max() * 4))
    for y, value in enumerate(table[count]):
        axis.text(value * 1.1, y, f"{value:,}", va="center", fontsize=8)
    return figure


def show_lengths(lengths: dict[str, list[int]], unit: str) -> Figure:
    """One histogram a name (a language, say) of whole-number lengths."""
    figure, axis = plt.subplots(figsize=(5, 2.6))
    top = max(max(values) for values in lengths.values())
    for name, values in lengths.items():
        axis.hist(values, bins=np.arange(0.5, top + 1.5), alpha=0.55, label=name)
    axis.set(xlabel=f"caption length ({unit})", ylabel="captions")
    axis.legend()
    return figure


def show_labels(inputs: list[str], labels: list[str], eos: str, limit: int = 24) -> Figure:
    """The labels table: each input token over the token it must predict.

    inputs, labels: one text a position; an ignored label is "" (grey); the label `eos` is red.
    """
    inputs, labels = inputs[:limit], labels[:limit]
    figure, axis = plt.subplots(figsize=(0.62 * len(inputs) + 0.8, 1.1))
    colour = {"": COLOURS["quiet"], eos: COLOURS["bad"]}
    cells = [["#ffffff"] * len(inputs)]
    cells.append([colour.get(text, COLOURS["ok"]) for text in labels])
    table = axis.table(
        [inputs, [text or "ignored" for text in labels]],
        cellColours=cells,
        rowLabels=["input", "label"],
        cellLoc="center",
        loc="center",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    table.scale(1, 1.5)
    axis.axis("off")
    return figure


def show_losses(history: list[dict], smooth: int = 5) -> Figure:
    """Training loss (thin: as logged; thick: mean of `smooth` logs) and validation loss by step."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    train = pd.DataFrame(
        [(h["step"], h["loss"]) for h in history if "loss" in h], columns=["s", "l"]
    )
    val = [(h["step"], h["eval_loss"]) for h in history if "eval_loss" in h]
    axis.plot(train.s, train.l, color=COLOURS["quiet"], linewidth=0.8)
    axis.plot(train.s, train.l.rolling(smooth, 1).mean(), color=COLOURS["ok"], label="train")
    if val:
        axis.plot(*zip(*val, strict=True), "o-", color=COLOURS["bad"], markersize=3, label="val")
    axis.set(xlabel="step", ylabel="loss (nats a token)", yscale="log")
    axis.set_yticks([value for value in LOSS_TICKS if axis.get_ylim()[0] < value])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()
    return figure


def show_truth_curve(curve: pd.DataFrame) -> Figure:
    """Share of true captions by training step, one line a language (columns of the table)."""
    figure, axis = plt.subplots(figsize=(5, 2.6))
    for lang in curve.columns:
        axis.plot(curve.index, curve[lang], "o-", markersize=3, label=lang)
    axis.set(xlabel="step", ylabel="true captions", ylim=(0, 1))
    axis.legend()
    return figure


def show_heat_maps(image, words: list[str], maps: np.ndarray, columns: int = 10) -> Figure:
    """The picture, then one copy a word with where the decoder looked laid over it.

    image: PIL, RGB; maps: float [words, H, W], on the encoder's grid.
    """
    columns = min(columns, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.55 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    axes.flat[0].imshow(image)
    box = (0, image.width, image.height, 0)
    for axis, word, heat in zip(list(axes.flat)[1:], words, maps, strict=False):
        axis.imshow(image.convert("L"), cmap="gray", extent=box, alpha=0.6)
        axis.imshow(heat, cmap="inferno", alpha=0.65, extent=box, interpolation="bilinear")
        axis.set_title(word, fontsize=9)
    figure.tight_layout()
    return figure
