"""The demo's report: one HTML file that needs nothing else, its figures as JSON, and one picture of them.

Everything is drawn from plain data (what :func:`spikeprop.demo.run` collects), by functions that take a matplotlib axis. In the
page the drawings are inline SVG whose colours are CSS variables, so that they follow the reader's light or dark setting.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from spikeprop.errors import BackendError
from spikeprop.report_page import COLOURS, page
from spikeprop.storage import atomic_write, write_text

HTML, JSON = "report.html", "report.json"
Content = dict[str, Any]

OF_RULE = ("red", "blue")  # first and second training
STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "svg.fonttype": "none",
}


def require_matplotlib() -> None:
    """Raise BackendError, with the remedy, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BackendError('the report needs matplotlib, which is not installed; pip install "spikeprop[report]"') from None


def write(content: Content, folder: Path) -> None:
    """Write ``report.json`` and ``report.html``, each whole or not at all."""
    write_text(folder / JSON, json.dumps(content, indent=1) + "\n")
    write_text(folder / HTML, page(content, figures(content)))


# --- Drawing -----------------------------------------------------------------------------------------------------------------


def draw_accuracy(axis: Any, content: Content) -> None:
    """Accuracy over epochs: validation solid, training dotted."""
    for training, colour in zip(content["trainings"], OF_RULE, strict=True):
        epochs = [epoch["epoch"] for epoch in training["epochs"]]
        validation = [100 * epoch["validation_accuracy"] for epoch in training["epochs"]]
        axis.plot(epochs, validation, color=COLOURS[colour], label=f"{training['rule']}, validation", marker="o", markersize=3)
        seen = [100 * epoch["train_accuracy"] for epoch in training["epochs"]]
        axis.plot(epochs, seen, color=COLOURS[colour], linestyle=":", label=f"{training['rule']}, training")
    lowest = min(epoch["validation_accuracy"] for training in content["trainings"] for epoch in training["epochs"])
    axis.set(title="Accuracy while learning", xlabel="epoch", ylabel="accuracy (%)")
    axis.set_ylim(max(-1.0, 100 * lowest - 5.0), 100.5)
    _finish_curves(axis, "lower right")


def draw_loss(axis: Any, content: Content) -> None:
    """Each layer's own loss over epochs."""
    for training, colour in zip(content["trainings"], OF_RULE, strict=True):
        epochs = [epoch["epoch"] for epoch in training["epochs"]]
        for layer, line in enumerate(zip(*(epoch["loss"] for epoch in training["epochs"]), strict=True)):
            label = f"{training['rule']}, layer {layer + 1}"
            axis.plot(epochs, line, color=COLOURS[colour], linestyle=("-", "--", "-.", ":")[layer % 4], label=label)
    axis.set(title="Local loss of every layer", xlabel="epoch", ylabel="cross-entropy (nats)")
    _finish_curves(axis, "upper right")


def _finish_curves(axis: Any, place: str) -> None:
    axis.grid(axis="y")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc=place)


def draw_picture(axis: Any, content: Content) -> None:
    """The input of the sample that the next figures show."""
    activity = content["activity"]
    axis.imshow(activity["picture"], cmap="gray_r", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(f"Input: a {activity['label']}")
    for spine in axis.spines.values():
        spine.set_visible(True)


def draw_raster(axis: Any, content: Content, index: int) -> None:
    """Every spike of one layer."""
    layer, steps = content["activity"]["layers"][index], content["activity"]["steps"]
    times, neurons = zip(*layer["spikes"], strict=True) if layer["spikes"] else ((), ())
    # A dash as wide as most of its step: a spike fills a step, it has no finer time.
    axis.hlines(neurons, [t + 0.6 for t in times], [t + 1.4 for t in times], color=COLOURS["blue"], linewidth=1.4)
    axis.set(xlim=(0.4, steps + 0.6), ylim=(-2, layer["neurons"] + 1), xlabel="time step", ylabel="neuron")
    axis.set_xticks(range(1, steps + 1) if steps <= 16 else range(0, steps + 1, steps // 8))
    axis.set_title(f"Layer {index + 1}: {len(times)} spikes")


def draw_membranes(axes: Sequence[Any], content: Content, index: int) -> None:
    """Membranes of a few neurons against their thresholds, one axis each: floats as a line, the chip's integers as rings."""
    from matplotlib.transforms import ScaledTranslation

    layer, steps = content["activity"]["layers"][index], content["activity"]["steps"]
    for axis in axes[len(layer["traces"]) :]:
        axis.set_visible(False)
    for place, (axis, trace) in enumerate(zip(axes, layer["traces"], strict=False)):
        threshold, times, line = trace["threshold"], [0.0], [0.0]
        for step, (membrane, spike) in enumerate(zip(trace["membrane"], trace["spikes"], strict=True), 1):
            times += [step, step] if spike else [step]
            line += [membrane / threshold, 0.0] if spike else [membrane / threshold]
        rings = [value / threshold for value in trace["integer"]]
        axis.axhline(1.0, color=COLOURS["ink"], linestyle="--", linewidth=1.0, label="threshold")
        axis.plot(times, line, color=COLOURS["blue"], label="as trained")
        axis.plot(range(1, steps + 1), rings, "o", color=COLOURS["red"], fillstyle="none", label="on Loihi's integers")
        low, high = min(*line, *rings, 0.0), max(*line, *rings, 1.0)
        axis.set(xlim=(0, steps + 0.4), ylim=(low - 0.15 * (high - low), high + 0.15 * (high - low)))
        axis.set_xticks(range(0, steps + 1, max(1, steps // 8)))
        axis.grid(axis="y")
        count = sum(trace["spikes"])
        text = f"neuron {trace['neuron']}: {count} spike{'s' * (count != 1)}"
        axis.text(1.0, 1.02, text, transform=axis.transAxes, ha="right", va="bottom", fontsize=8.5)
        if place == len(layer["traces"]) - 1:
            axis.set_xlabel("time step")
        else:
            axis.tick_params(labelbottom=False)
    axes[len(layer["traces"]) // 2].set_ylabel("membrane (thresholds)")
    axes[0].set_title(f"Layer {index + 1}: membranes", pad=32)
    # Raised by points, not by a share of the axis, whose height differs from page to picture.
    above = axes[0].transAxes + ScaledTranslation(0, 17 / 72, axes[0].figure.dpi_scale_trans)
    anchor = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "bbox_transform": above, "borderpad": 0, "borderaxespad": 0}
    axes[0].legend(ncols=3, columnspacing=1.0, handlelength=1.5, **anchor)


def draw_dead(axis: Any, content: Content) -> None:
    """Neurons that never spike (solid) and that spike in less than 1 % of the samples (pale), before and after training."""
    trainings = content["trainings"]
    groups = [("before training", "muted", trainings[0]["layers_before"])]
    groups += [(f"after {t['rule']}", colour, t["layers"]) for t, colour in zip(trainings, OF_RULE, strict=True)]
    height, largest = 0.27, 0
    for place, (name, colour, layers) in enumerate(groups):
        for index, layer in enumerate(layers):
            y = index + (place - 1) * height
            dead, nearly = round(layer["dead"] * layer["neurons"]), round(layer["nearly_dead"] * layer["neurons"])
            largest = max(largest, nearly)
            axis.barh(y, nearly, height * 0.85, color=COLOURS[colour], alpha=0.35)
            axis.barh(y, dead, height * 0.85, color=COLOURS[colour])
            axis.plot(0, y, "|", color=COLOURS[colour], markersize=11, markeredgewidth=3, clip_on=False)  # also where none is
            text = f"{dead} dead" + (f", {nearly - dead} nearly" if nearly > dead else "") + f" {name}"
            axis.annotate(text, (nearly, y), (6, 0), textcoords="offset points", va="center", fontsize=8.5)
    axis.set_yticks(range(len(groups[0][2])))
    axis.set_yticklabels([f"layer {number}\n({layer['neurons']})" for number, layer in enumerate(groups[0][2], 1)])
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(0, max(4.0, largest * 2.2)), ylim=(len(groups[0][2]) - 0.5, -0.5))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(title="Dead neurons (test set)", xlabel="number of neurons")


# --- Figures -----------------------------------------------------------------------------------------------------------------


def figures(content: Content) -> dict[str, str]:
    """Every figure of the page as SVG, by name; ``raster1`` and ``membranes1`` belong to layer 1, and so on."""

    def single(draw: Callable[..., None], *more: Any) -> Callable[[Any], None]:
        return lambda figure: draw(figure.subplots(), content, *more)

    made = {
        "accuracy": svg("accuracy", (5.2, 3.3), single(draw_accuracy)),
        "loss": svg("loss", (5.2, 3.3), single(draw_loss)),
        "dead": svg("dead", (7.2, 2.7), single(draw_dead)),
        "input": svg("input", (2.1, 2.4), single(draw_picture)),
    }
    for index in range(len(content["activity"]["layers"])):
        made[f"raster{index + 1}"] = svg(f"raster{index + 1}", (3.9, 3.3), single(draw_raster, index))

        def membranes(figure: Any, index: int = index) -> None:
            draw_membranes(figure.subplots(3, 1, sharex=True), content, index)

        made[f"membranes{index + 1}"] = svg(f"membranes{index + 1}", (5.2, 4.2), membranes)
    return made


def svg(name: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """What ``draw(figure)`` draws, as SVG to stand inside HTML: no fixed size, no fixed colours, no address outside."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):  # the salt keeps the names that drawings refer to apart
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    head, rest = buffer.getvalue().split("<svg", 1)[1].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'<g id="[^"]*">', "<g>", rest).replace("xlink:href", "href")
    rest = re.sub(r"font-family:[^;\"]*;?|(?<=px) 'DejaVu Sans'[^;\"]*", "", rest)  # the page's font
    for colour, value in COLOURS.items():
        rest = rest.replace(value, f"var(--{colour})")
    return f'<svg {box.group()} role="img" aria-label="{escape(name)}">{rest.strip()}'


def write_picture(content: Content, path: Path) -> None:
    """Raster, membranes, learning curves and dead neurons of a demo as one PNG, 1200 pixels wide."""
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure: Any = Figure(figsize=(12, 7.6), dpi=100, facecolor="white", layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
        left, middle, right = top.subfigures(1, 3, width_ratios=[0.55, 1.9, 1.55])
        draw_picture(left.subplots(), content)
        layers = len(content["activity"]["layers"])
        for index, axis in enumerate(middle.subplots(1, layers)):
            draw_raster(axis, content, index)
        draw_membranes(right.subplots(3, 1, sharex=True), content, layers - 1)
        accuracy, loss, dead = bottom.subplots(1, 3)
        draw_accuracy(accuracy, content)
        draw_loss(loss, content)
        draw_dead(dead, content)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")
