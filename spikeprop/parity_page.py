"""What ``spikeprop parity`` shows: the comparison of engines as text for the terminal and as one HTML page with pictures."""

from __future__ import annotations

from html import escape
from typing import Any

from spikeprop.report import svg
from spikeprop.report_page import COLOURS, quantisation_table, style, table

Content = dict[str, Any]

NAMES = {
    "float": "as trained",
    "integer": "integer simulator",
    "lava": "Intel Lava",
    "nir": "read back from NIR",
    "snntorch": "NIR in snnTorch",
    "norse": "NIR in Norse",
}
HARDWARE = (
    ("neurons", "neurons", "{:,}"),
    ("synapses", "synapses", "{:,}"),
    ("weight_memory_bits", "weight memory, bits", "{:,}"),
    ("spikes", "spikes", "{:,.1f}"),
    ("synaptic_operations", "synaptic operations", "{:,.0f}"),
    ("dense_macs", "dense MACs, one pass", "{:,}"),
    ("dense_macs_all_steps", "dense MACs, all steps", "{:,}"),
)


def text(found: Content) -> str:
    """The whole comparison for a terminal."""
    lines = [f"{found['samples']} samples of {found['data']}, T = {found['num_steps']}", "", f"{'accuracy':<24}"]
    lines[-1] = "accuracy  " + "  ".join(f"{NAMES[name]} {engine['accuracy']:.4f}" for name, engine in found["engines"].items())
    rounding = found["input_rounding"]
    lines.append(f"          with the inputs rounded to the chip's messages and nothing else {rounding['accuracy']:.4f}")
    lines += [f"not run   {NAMES[name]}: {reason}" for name, reason in found["not_run"].items()]
    for pair in found["comparisons"]:
        lines += ["", f"{_pair(pair)}: predictions agree on {pair['prediction_agreement']:.2%}"]
        for number, layer in enumerate(pair["layers"], 1):
            lines.append(f"  layer {number}: {layer['spikes']:>9,} spikes, {_difference(layer)}")
    hardware = found["hardware"]
    lines += ["", "on the chip, per inference"]
    for key, name, form in HARDWARE:
        cells = [form.format(layer[key]) for layer in hardware["layers"]]
        cells.append("  total " + form.format(hardware["total"][key]))
        lines.append(f"  {name:<22}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _pair(pair: Content) -> str:
    return f"{NAMES[pair['reference']]} and {NAMES[pair['other']]}"


def _difference(layer: Content) -> str:
    apart = f"membranes at most {layer['largest_membrane_difference']:.3g} apart"
    if not layer["differing"]:
        return f"0 differ; {apart}"
    share = layer["differing"] / max(1, layer["spikes"])
    return f"{layer['differing']:,} differ ({share:.2%}), first at step {layer['first_differing_step']}; {apart}"


# --- The page ----------------------------------------------------------------------------------------------------------------


def page(found: Content) -> str:
    """The comparison as one HTML document that needs nothing else."""
    rows = [
        [
            f"{_pair(pair)}, layer {number}",
            f"{layer['spikes']:,}",
            f"{layer['differing']:,}",
            "none" if layer["first_differing_step"] is None else str(layer["first_differing_step"]),
            f"{layer['largest_membrane_difference']:.3g}",
            f"{pair['prediction_agreement']:.2%}",
        ]
        for pair in found["comparisons"]
        for number, layer in enumerate(pair["layers"], 1)
    ]
    head = ["", "spikes", "differing", "first differing step", "membranes apart, at most (units of U)", "predictions agree"]
    accuracies = [[NAMES[name], f"{engine['accuracy']:.4f}"] for name, engine in found["engines"].items()]
    accuracies.insert(1, ["as trained, inputs rounded to messages", f"{found['input_rounding']['accuracy']:.4f}"])
    accuracies += [[NAMES[name], f"not run: {reason}"] for name, reason in found["not_run"].items()]
    layers = range(1, 1 + len(found["sample"]["layers"]))
    hardware = found["hardware"]
    return PAGE.format(
        style=style(),
        facts=escape(f"{found['run']}: {found['samples']} samples of {found['data']}, T = {found['num_steps']}"),
        comparisons=table(head, rows),
        accuracies=table(["engine", "accuracy"], accuracies),
        pictures=_figure(_differing(found), "Spikes that only one of the floats and the integer simulator has.")
        + _figure(_apart(found), "Largest distance of a membrane from its float value, in units of U, after the reset."),
        sample="".join(_figure(_raster(found, number), RASTER) for number in layers),
        hardware=table(
            ["per inference", *(f"layer {number}" for number in layers), "total"],
            [
                [name, *(form.format(layer[key]) for layer in hardware["layers"]), form.format(hardware["total"][key])]
                for key, name, form in HARDWARE
            ]
            + [
                [f"{what}, mean (largest)", *(_fan(layer[key]) for layer in hardware["layers"]), ""]
                for key, what in (("fan_in", "fan-in"), ("fan_out", "fan-out"))
            ],
        ),
        quantisation=quantisation_table(found["quantisation"]),
    )


def _fan(fan: Content) -> str:
    return f"{fan['mean']:,.1f} ({fan['largest']:,})"


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _curves(found: Content, key: str, title: str, unit: str) -> str:
    """One line per layer over time, of the float network against the integers."""
    pair = found["comparisons"][0]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for index, layer in enumerate(pair["layers"]):
            steps = range(1, len(layer[key]) + 1)
            colour, line = COLOURS[("blue", "red")[index % 2]], ("-", "--", ":")[index // 2 % 3]
            axis.plot(steps, layer[key], color=colour, linestyle=line, marker="o", markersize=3, label=f"layer {index + 1}")
        axis.set(title=title, xlabel="time step", ylabel=unit)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="upper left")

    return svg(key, (5.2, 3.3), draw)


def _differing(found: Content) -> str:
    return _curves(found, "differing_per_step", "Spikes that rounding moved", "spikes that differ")


def _apart(found: Content) -> str:
    return _curves(found, "membrane_difference_per_step", "How far rounding moves a membrane", "units of U")


def _raster(found: Content, number: int) -> str:
    layer, steps = found["sample"]["layers"][number - 1], found["num_steps"]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for key, colour in (("both", "ink"), ("only_float", "blue"), ("only_integer", "red")):
            times, neurons = zip(*layer[key], strict=True) if layer[key] else ((), ())
            axis.hlines(neurons, [t + 0.6 for t in times], [t + 1.4 for t in times], color=COLOURS[colour], linewidth=1.4)
        axis.set(xlim=(0.4, steps + 0.6), ylim=(-2, layer["neurons"] + 1), xlabel="time step", ylabel="neuron")
        axis.set_title(f"Layer {number}, the first sample")

    return svg(f"raster{number}", (5.2, 3.6), draw)


RASTER = "Black: in both. Blue: only as trained. Red: only in integers."

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>spikeprop parity</title><style>{style}</style></head><body>
<h1>One network, several engines, spike by spike</h1>
<p class="quiet">{facts}.</p>
<h2>Spikes that differ</h2>
<p>The integer simulator and Lava receive the identical integers and must agree in every spike. The floats differ from both by
rounding. NIR files are written and read back; snnTorch and Norse read them through their own importers.</p>
{comparisons}
<h2>Accuracy</h2>
{accuracies}
<h2>What rounding does</h2>
<div class="grid">{pictures}</div>
<div class="grid">{sample}</div>
<h2>What the chip needs</h2>
<p>Measured on these samples. A synaptic operation is one event reaching one synapse whose weight is not zero; dense MACs are
those of the same layers with continuous activations.</p>
{hardware}
<h2>What quantising chose and cost</h2>
{quantisation}
</body></html>
"""
