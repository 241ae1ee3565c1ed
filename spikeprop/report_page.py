"""The text of the demo's report: one HTML document, with its tables, around figures that come as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Content = dict[str, Any]

# Blue, vermillion and green of Okabe and Ito (2008), told apart under every common colour blindness; lighter on a dark page.
COLOURS = {"ink": "#1c2024", "muted": "#8b8d98", "line": "#dcdce1", "blue": "#0072b2", "red": "#d55e00"}
DARK = {"ink": "#edeef0", "muted": "#868a93", "line": "#3a3d43", "blue": "#56b4e9", "red": "#ff8d3f"}


def page(content: Content, figures: Mapping[str, str]) -> str:
    """The report as one HTML document; ``figures`` are those of :func:`spikeprop.report.figures`."""
    config, data, trainings, hardware = (content[key] for key in ("config", "data", "trainings", "hardware"))
    names, layers = [training["rule"] for training in trainings], range(len(trainings[0]["layers"]))

    def figure(name: str, caption: str) -> str:
        return f"<figure>{figures[name]}<figcaption>{escape(caption)}</figcaption></figure>"

    options = [option for option in ("readout", "nearest", "tree") if option in trainings[0]["accuracy"]]
    explained = {"readout": "trained classifier layer", "nearest": "nearest class response", "tree": "adaptive tree search"}
    accuracy = table(
        ["test accuracy by", *names],
        [[f"{option} ({explained[option]})", *(_percent(t["accuracy"][option]) for t in trainings)] for option in options]
        + [["class responses that the tree compares", *(_comparisons(training) for training in trainings)]],
    )
    states = [("before training", trainings[0]["layers_before"]), *((f"after {t['rule']}", t["layers"]) for t in trainings)]
    health = table(
        ["", "dead", "nearly dead", "saturated", "spikes per neuron and step"],
        [
            [
                f"layer {index + 1}, {name}",
                *(_count(state[index], share) for share in ("dead", "nearly_dead", "saturated")),
                f"{state[index]['rate']:.3f}",
            ]
            for index in layers
            for name, state in states
        ],
    )
    cost = table(
        ["cost", *names],
        [
            ["training time", *(f"{t['seconds']:.1f} s" for t in trainings)],
            ["peak memory of the process", *(f"{t['peak_memory_mib']:.0f} MiB" for t in trainings)],
            ["of it before training started", *(f"{t['memory_before_training_mib']:.0f} MiB" for t in trainings)],
        ],
    )
    facts = (
        f"{data['train']} training, {data['validation']} validation and {data['test']} test images; network {config['model']}; "
    )
    facts += f"T = {config['num_steps']} time steps; {config['epochs']} epochs; seed {config['seed']}"
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return PAGE.format(
        style=style(),
        facts=escape(facts),
        cards=cards(content),
        curves=figure("accuracy", "Share of the images that the readout predicts rightly.")
        + figure("loss", "Each layer learns from its own loss alone."),
        accuracy=accuracy,
        dead=figure("dead", "Solid: never spikes. Pale: spikes on less than 1 % of the images."),
        health=health,
        rule=escape(content["activity"]["rule"]),
        pictures=figure("input", "A constant current per pixel.")
        + "".join(figure(f"raster{n + 1}", "Every spike. A spike fills its time step.") for n in layers),
        membranes="".join(figure(f"membranes{n + 1}", MEMBRANES) for n in layers),
        parity=parity_table(hardware),
        parity_note=escape(_parity_note(hardware)),
        quantisation=quantisation_table(hardware["report"]),
        inputs=escape(_inputs(hardware["report"])),
        cost=cost,
        foot=escape(f"{content['created']}; {versions}; the whole demo took {content['seconds']:.0f} s."),
    )


def cards(content: Content) -> str:
    """The figures to remember."""
    hardware, trainings = content["hardware"], content["trainings"]
    shown = [(_percent(t["accuracy"]["readout"]), f"test accuracy, {t['rule']}") for t in trainings]
    worst = max(trainings, key=lambda t: max(layer["dead"] for layer in t["layers"]))
    dead = sum(round(layer["dead"] * layer["neurons"]) for layer in worst["layers"])
    shown.append((f"{dead} of {sum(layer['neurons'] for layer in worst['layers'])}", "dead neurons after training"))
    if hardware["lava"]:
        spikes, differing = (sum(layer[key] for layer in hardware["lava"]["layers"]) for key in ("spikes", "differing"))
        shown.append((f"{differing} of {spikes:,}", "spikes differ between our integer simulator and Intel's Lava"))
    else:
        shown.append(("not run", "the comparison with Intel's Lava"))
    return "".join(f"<div><b>{escape(figure)}</b><span>{escape(text)}</span></div>" for figure, text in shown)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows."""
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{escape(row[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def parity_table(hardware: Content) -> str:
    """Spikes per layer, and how many differ between the engines."""
    real, rows = hardware["lava"], []
    for index, layer in enumerate(hardware["integer"]["layers"]):
        cells = [f"{real['layers'][index][key]:,}" for key in ("spikes", "differing")] if real else ["not run", "not run"]
        rows.append([f"layer {index + 1}", *cells, f"{layer['spikes']:,}", f"{layer['differing']:,}"])
    few, many = (f"spikes in {part['samples']} images" if part else "spikes" for part in (real, hardware["integer"]))
    return table(["", few, "differing in Lava", many, "differing from the floats"], rows)


def quantisation_table(report: Content) -> str:
    """What rounding to the chip's registers chose and cost, layer by layer."""
    head = ["layer", "scale", "weight bits", "weight exponent", "threshold register"]
    head += ["weights off (rms)", "threshold off", "bias off", "current register in use"]
    rows = [
        [
            str(number),
            f"{layer['scale']:.1f}",
            str(layer["weight_bits"]),
            str(layer["weight_exp"]),
            str(layer["threshold_register"]),
            f"{layer['weight_error']:.2%}",
            f"{layer['threshold_error']:.3%}",
            f"{layer['bias_error']:.3%} of a threshold",
            f"{layer['current_use']:.0%} at worst",
        ]
        for number, layer in enumerate(report["layers"], 1)
    ]
    return table(head, rows)


def _comparisons(training: Content) -> str:
    return f"{training['comparisons']['tree']:.1f} of {training['comparisons']['nearest']:.0f}"


def _parity_note(hardware: Content) -> str:
    engines = {"float": "as trained", "integer": "integer simulator", "lava": "Lava"}
    note = "Accuracy: " + ", ".join(f"{engines[name]} {_percent(share)}" for name, share in hardware["accuracy"].items()) + ". "
    if hardware["lava"]:
        few = hardware["lava"]
        if few["samples"] < hardware["integer"]["samples"]:
            note += f"On the {few['samples']} images that Lava ran, the simulator has {_percent(few['accuracy_integer'])}. "
    else:
        note += f"Lava did not run: {hardware['lava_not_run']}. "
    return note + "Against the floats, spikes differ because weights, thresholds and biases are rounded; against Lava none may."


def _inputs(report: Content) -> str:
    if report["inputs"] == "spikes":
        return "Inputs enter as spikes, 0 or 1."
    low, high = report["input_range"]
    return f"Inputs from {low:g} to {high:g} enter as graded messages of {report['num_message_bits']} bits."


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _count(layer: Content, name: str) -> str:
    return f"{round(layer[name] * layer['neurons'])} of {layer['neurons']}"


def style() -> str:
    """The style sheet of every page: the layout, and the colours of figures in light and dark."""
    return CSS + _variables(COLOURS) + "@media (prefers-color-scheme: dark) {" + _variables(DARK) + "}"


def _variables(colours: dict[str, str]) -> str:
    return ":root{" + "".join(f"--{name}:{value};" for name, value in colours.items()) + "}"


MEMBRANES = (
    "Three neurons: one that spikes often, one that spikes once, one that stays silent. A spike resets the membrane to zero. "
    "The integers are scaled back to thresholds."
)

CSS = """
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1.5rem 1.1rem 3rem;background:Canvas;color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:1.9rem;line-height:1.2;margin:.6rem 0 .3rem;letter-spacing:-.015em}
h2{font-size:1.25rem;margin:2.6rem 0 .4rem;padding-top:1.1rem;border-top:1px solid var(--line);letter-spacing:-.01em}
p{max-width:46rem;margin:.4rem 0 .9rem}
.quiet,figcaption,footer{color:color-mix(in srgb,var(--ink) 68%,transparent);font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.8rem;margin:1.3rem 0}
.cards div{border:1px solid var(--line);border-radius:.6rem;padding:.8rem 1rem}
.cards b{display:block;font-size:1.55rem;line-height:1.25;letter-spacing:-.02em}
.cards span{font-size:.88rem;opacity:.8}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem 1.6rem}
.sample{display:grid;grid-template-columns:minmax(9rem,.55fr) 1fr 1fr;gap:1rem 1.4rem;align-items:end}
@media (max-width:48rem){.sample{grid-template-columns:1fr}.sample figure:first-child{max-width:12rem}}
figure{margin:.6rem 0;max-width:46rem}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit}
.scroll{overflow-x:auto;margin:.6rem 0 1rem}
table{border-collapse:collapse;font-size:.93rem}
th,td{padding:.38rem .9rem .38rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left}
thead th{font-weight:600;vertical-align:bottom;white-space:normal;min-width:5.5rem}
tbody th{font-weight:400}
@media (max-width:48rem){tbody th{white-space:normal}th,td{padding-right:.6rem}table{font-size:.86rem}}
code{font-size:.92em}
footer{margin-top:2.6rem;padding-top:1rem;border-top:1px solid var(--line)}
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>spikeprop demo: handwritten digits</title><style>{style}</style></head><body>
<h1>A spiking network, trained forward only and run on Loihi&rsquo;s integers</h1>
<p class="quiet">Handwritten digits (scikit-learn): {facts}.</p>
<div class="cards">{cards}</div>
<h2>Learning without a backward pass</h2>
<p>Labels travel forward through the network beside the images, and every layer learns from the two meeting in its own
membranes. The two options differ in what the local loss reads: a smooth function of the membrane, or the membrane itself within
a window around the threshold.</p>
<div class="grid">{curves}</div>
{accuracy}
<h2>Which neurons live</h2>
<p>A neuron is dead if it never spikes, at any step of any of the test images; nearly dead if it spikes on less than 1 % of
them; saturated if it spikes at every step of all of them.</p>
{dead}
{health}
<h2>Inside the network: one image</h2>
<p>What the network trained by {rule} does with the first test image.</p>
<div class="sample">{pictures}</div>
<div class="grid">{membranes}</div>
<h2>The same network in Lava</h2>
<p>The trained network in Loihi&rsquo;s fixed-point arithmetic. Our integer simulator and Intel&rsquo;s Lava receive the
identical integers.</p>
{parity}
<p>{parity_note}</p>
<p>What quantising chose and cost. {inputs}</p>
{quantisation}
<h2>What it cost</h2>
{cost}
<p class="quiet">Training time is without validation, on one thread. Memory is the resident set, Python and torch included; each
training ran in a process of its own. All figures of this page are in <code>report.json</code>; look closer with <code>spikeprop
diagnose</code> on the run folders beside it.</p>
<footer>{foot}</footer>
</body></html>
"""
