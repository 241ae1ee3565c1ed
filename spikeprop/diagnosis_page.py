"""What ``spikeprop diagnose`` keeps and shows: the diagnosis as one JSON object, and as one HTML page with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from spikeprop.diagnosis import CAUSES, Diagnosis, LayerDiagnosis, advise
from spikeprop.evaluation import Health, changes, total_change
from spikeprop.homeostasis import Homeostasis
from spikeprop.report import svg
from spikeprop.report_page import COLOURS, style, table

Content = dict[str, Any]

LOWEST, HIGHEST, BARS = -3.0, 5.0, 40  # of the histogram of membranes, in thresholds; what lies outside joins the last bars
POINTS = 200  # of a rate profile
SHADES = {  # of a cause: colour and opacity
    "no input": ("muted", 0.55),
    "bias": ("ink", 0.9),
    "threshold": ("blue", 1.0),
    "inhibition": ("red", 1.0),
    "centring": ("blue", 0.45),
    "competition": ("red", 0.45),
    "chance": ("muted", 1.0),
    "several": ("ink", 0.45),
}


def content(found: Diagnosis, homeostasis: Homeostasis | None, before: Health | None, epochs: Sequence[Content]) -> Content:
    """Everything that the page shows, as JSON holds it.

    Args:
        homeostasis: that of the training.
        before: over the same data, the network that training started from, if it is known.
        epochs: the history of the training.
    """
    shown = found.to_dict()
    for described, layer in zip(shown["layers"], found.layers, strict=True):
        described |= {"membranes": _histogram(layer), "rates": _profile(layer, found.samples * found.num_steps)}
    compared = None if before is None else changes(before, found.health)
    return {
        **shown,
        "before_training": None if before is None else before.to_dict(),
        "changes": None if compared is None else [change.to_dict() for change in compared],
        "total_change": None if before is None else total_change(before, found.health).to_dict(),
        "epochs": [{name: epoch[name] for name in ("epoch", "dead", "rate")} for epoch in epochs],
        "band": None if homeostasis is None else [homeostasis.lowest, homeostasis.highest],
        "advice": advise(found, homeostasis),
    }


def _histogram(layer: LayerDiagnosis) -> Content:
    """How many neurons have which largest membrane, in thresholds; the threshold is an edge."""
    peak, dead = layer.peak.double().numpy(), (layer.health.spike_counts == 0).flatten().numpy()
    low, high = np.clip([peak.min(), peak.max()], LOWEST, HIGHEST)
    width = max(high - low, 0.5) / BARS
    first, last = np.floor((min(low, 1.0) - 1.0) / width), np.ceil((max(high, 1.0) - 1.0) / width)
    edges = 1.0 + width * np.arange(first, max(last, first + 1) + 1)
    # A membrane at the threshold has not spiked: bars hold their upper edge.
    place = np.clip(np.ceil((peak - edges[0]) / width).astype(int) - 1, 0, max(0, len(edges) - 2))
    counts = {
        name: np.bincount(place[which], minlength=len(edges) - 1).tolist() for name, which in (("dead", dead), ("alive", ~dead))
    }
    return {"edges": edges.tolist(), **counts}


def _profile(layer: LayerDiagnosis, steps: int) -> list[float]:
    """The neurons' rates, spikes per step, highest first; of more than :data:`POINTS` neurons some, the extremes included."""
    rates = np.sort(layer.health.spike_counts.flatten().numpy() / steps)[::-1]
    chosen = np.unique(np.linspace(0, len(rates) - 1, min(POINTS, len(rates))).round().astype(int))
    return [float(rate) for rate in rates[chosen]]


def course(found: Content) -> str:
    """The dead share of every layer before training, in its epochs, and now; and what became of the neurons."""
    rows: list[tuple[str, list[Any]]] = []
    if found["before_training"] is not None:
        rows.append(("before training", [layer["dead"] for layer in found["before_training"]["layers"]]))
    some = sorted({round(place) for place in np.linspace(0, len(found["epochs"]) - 1, 6)}) if found["epochs"] else []
    rows += [(f"in epoch {found['epochs'][place]['epoch']}", found["epochs"][place]["dead"]) for place in some]
    rows.append(("now", [layer["dead"] for layer in found["layers"]]))
    if found["changes"] is not None:
        rows += [(name, [change[key] for change in found["changes"]]) for key, name in CHANGES]
    numbers = range(1, len(found["layers"]) + 1)
    lines = [f"{'dead share':<22}" + "".join(f"{f'layer {number}':>10}" for number in numbers)]
    return "\n".join(lines + [f"{name:<22}" + "".join(f"{_share(share):>10}" for share in shares) for name, shares in rows])


CHANGES = (("revival", "dead ones revived"), ("death", "living ones that died"))


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


# --- The page ----------------------------------------------------------------------------------------------------------------


def page(found: Content) -> str:
    """The diagnosis as one HTML document that needs nothing else."""
    layers = found["layers"]
    caused = [cause for cause in CAUSES if any(cause in layer["causes"] for layer in layers)]
    before = found["before_training"]
    head = ["", "neurons", "dead", "nearly dead", "saturated", "spikes per neuron and step", "dead before training"]
    health = table(
        [*head, "dead ones revived", "living ones that died"],
        [
            [
                f"layer {index + 1}",
                f"{layer['neurons']:,}",
                *(_share(layer[name]) for name in ("dead", "nearly_dead", "saturated")),
                f"{layer['rate']:.4f}",
                _share(None if before is None else before["layers"][index]["dead"]),
                *(_share(None if before is None else found["changes"][index][key]) for key, _ in CHANGES),
            ]
            for index, layer in enumerate(layers)
        ],
    )
    causes = table(
        ["dead neurons", *caused, "below the threshold, in thresholds: least, median, most", "without centring alive"],
        [
            [
                f"layer {number}",
                *(f"{len(layer['causes'].get(cause, {'neurons': []})['neurons']):,}" for cause in caused),
                "-" if layer["deficits"] is None else ", ".join(f"{layer['deficits'][place]:.2g}" for place in (0, 2, 4)),
                f"{layer['uncentred']:,}",
            ]
            for number, layer in enumerate(layers, 1)
        ],
    )
    dead = sum(round(layer["dead"] * layer["neurons"]) for layer in layers)
    over = [(f"{dead:,} of {sum(layer['neurons'] for layer in layers):,}", "neurons are dead")]
    if found["total_change"] is not None:
        change = found["total_change"]
        over.append((_share(change["dead_before"]), "were dead before training"))
        over.append((_share(change["revival"]), "of the dead ones were revived"))
        over.append((_share(change["death"]), "of the living ones died"))
    shown = [_figure(_causes(found, caused), CAUSED)] if caused else []
    if found["epochs"]:
        shown += [_figure(_course(found, "dead", "Dead neurons over training", "% of the layer"), COURSE)]
        shown += [_figure(_course(found, "rate", "Firing rate over training", "spikes per neuron and step"), "")]
    return PAGE.format(
        style=style(),
        facts=escape(
            f"{found['run']}: {found['samples']:,} samples, {found['split']} split of {found['data']}, T = {found['num_steps']}"
        ),
        cards="".join(f"<div><b>{escape(figure)}</b><span>{escape(what)}</span></div>" for figure, what in over),
        advice="".join(f"<li>{escape(line)}</li>" for line in found["advice"]),
        health=health,
        causes=causes + DEFINED if caused else "<p>No neuron is dead.</p>",
        pictures="".join(shown),
        membranes="".join(_figure(_membranes(layer, number), "") for number, layer in enumerate(layers, 1)),
        rates="".join(_figure(_rates(layer, number, found["band"]), "") for number, layer in enumerate(layers, 1)),
    )


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _course(found: Content, key: str, title: str, unit: str) -> str:
    """One line per layer over the epochs; the network before training and now as points at either end."""
    factor = 100.0 if key == "dead" else 1.0
    last = found["epochs"][-1]["epoch"]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for index, layer in enumerate(found["layers"]):
            colour, line = COLOURS[("blue", "red", "ink")[index % 3]], ("-", "--", ":")[index // 3 % 3]
            values = [factor * epoch[key][index] for epoch in found["epochs"]]
            axis.plot(range(1, last + 1), values, color=colour, linestyle=line, label=f"layer {index + 1}")
            ends = [(last + 1, layer[key])]
            if found["before_training"] is not None:
                ends.insert(0, (0, found["before_training"]["layers"][index][key]))
            axis.plot([place for place, _ in ends], [factor * value for _, value in ends], "o", color=colour, markersize=4)
        top = 1.08 * max(axis.get_ylim()[1], 5.0 if key == "dead" else 0.02)
        axis.set(title=title, xlabel="epoch", ylabel=unit, xlim=(-0.4, last + 1.4), ylim=(-0.03 * top, top))
        step = -(-last // 6)  # so that no mark meets the words at the ends
        marks = [epoch for epoch in range(step, last + 1, step) if 0.13 * last <= epoch <= 0.9 * last]
        axis.set_xticks([0, *marks, last + 1], labels=["before", *map(str, marks), "now"])
        axis.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=4)  # below the lines, which fill the axis

    return svg(f"course-{key}", (5.2, 3.3), draw)


def _membranes(layer: Content, number: int) -> str:
    found = layer["membranes"]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        edges, bottom = np.array(found["edges"]), np.zeros(len(found["dead"]))
        for name, colour in (("alive", "blue"), ("dead", "red")):
            counts = np.array(found[name])
            axis.bar(edges[:-1], counts, np.diff(edges) * 0.92, bottom, color=COLOURS[colour], align="edge", label=name)
            bottom = bottom + counts
        axis.axvline(1.0, color=COLOURS["ink"], linestyle="--", linewidth=1.0, label="threshold")
        axis.set(title=f"Layer {number}: largest membrane of each neuron", xlabel="membrane (thresholds)", ylabel="neurons")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.legend()

    return svg(f"membranes{number}", (5.2, 3.0), draw)


def _rates(layer: Content, number: int, band: Sequence[float] | None) -> str:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        rates = layer["rates"]
        if band is not None:
            axis.axhspan(*band, color=COLOURS["muted"], alpha=0.22, linewidth=0, label="homeostatic band")
        place = np.linspace(1, layer["neurons"], len(rates))
        axis.plot(place, rates, color=COLOURS["blue"], label="rate")
        dead = round(layer["dead"] * layer["neurons"])
        if dead:
            axis.plot(
                [layer["neurons"] - dead + 0.5, layer["neurons"] + 0.5], [0, 0], color=COLOURS["red"], linewidth=4, label="dead"
            )
        axis.set(title=f"Layer {number}: rates, sorted", xlabel="neurons, most active first", ylabel="spikes per step")
        axis.set_xlim(0.5, layer["neurons"] + 0.5)
        axis.set_ylim(bottom=-0.03 * max(rates) - 1e-9)
        axis.grid(axis="y")
        axis.legend()

    return svg(f"rates{number}", (5.2, 3.0), draw)


def _causes(found: Content, caused: Sequence[str]) -> str:
    layers = found["layers"]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        left = np.zeros(len(layers))
        for cause in caused:
            counts = np.array([len(layer["causes"].get(cause, {"neurons": []})["neurons"]) for layer in layers])
            colour, opacity = SHADES[cause]
            shares = 100 * counts / [layer["neurons"] for layer in layers]
            axis.barh(range(len(layers)), shares, 0.6, left, color=COLOURS[colour], alpha=opacity, label=cause)
            left = left + shares
        axis.set_yticks(range(len(layers)), labels=[f"layer {number}" for number in range(1, len(layers) + 1)])
        axis.set_ylim(len(layers) - 0.4, -0.6)
        axis.set(title="Dead neurons by cause", xlabel="% of the layer")
        axis.grid(axis="x")
        figure.legend(loc="outside lower center", ncols=4)

    return svg("causes", (5.2, 1.7 + 0.4 * len(layers)), draw)


CAUSED = "Every dead neuron has one cause, by the rule below."
COURSE = "In an epoch: no spike on any training sample while the weights moved. Before and now: over the data named above."
DEFINED = """<p class="quiet">The first that holds of a neuron&rsquo;s largest membrane over all steps of all samples.
<b>Competition</b>: it exceeds the threshold, but rivals always win. <b>Chance</b>: it exceeds the threshold, but no spike was
drawn. <b>No input</b>: nothing that excites ever arrives. <b>Bias</b>: with its negative bias at 0 it would exceed it.
<b>Threshold</b>: with weights larger by the stated factor it would. <b>Inhibition</b>: without what inhibits it would.
<b>Centring</b>: without the mean that centring subtracts it would. <b>Several</b>: no single change is enough. The neurons, and
what each of them needs, are in <code>diagnosis.json</code>.</p>"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>spikeprop diagnose</title><style>{style}</style></head><body>
<h1>Which neurons are dead, and why</h1>
<p class="quiet">{facts}. A neuron is dead if it never spikes, at any step of any of these samples; nearly dead if it spikes in
less than 1 % of them (the dead included); saturated if it spikes at every step of all of them.</p>
<div class="cards">{cards}</div>
<h2>What to change</h2>
<ul>{advice}</ul>
<h2>Layer by layer</h2>
{health}
{causes}
<div class="grid">{pictures}</div>
<h2>How far from the threshold</h2>
<p>The largest membrane of every neuron, before any reset, over all steps of all samples. The outermost bars hold what lies
beyond them.</p>
<div class="grid">{membranes}</div>
<h2>How often they spike</h2>
<div class="grid">{rates}</div>
</body></html>
"""
