"""Writes docs/rules.md, "Which rule should I use?", from the measured results.

    python benchmarks/rules_page.py

Every figure of the page comes from ``compare-digits.json``, ``memory-rules.json`` and the BPTT cells of accuracy.py, all in
``benchmarks/results/``; what each rule needs comes from the rules themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, read_json

from spikeprop.catalogue import RULES
from spikeprop.comparison_page import describe, ranked
from spikeprop.comparison_page import memory as memory_of

PAGE = ROOT / "docs" / "rules.md"
BASELINES = ("bptt-mnist", "bptt-mnist-without-homeostasis", "bptt-fashion-mnist")
NOTES = {
    "bptt": "the baseline; `--truncate k` cuts the graph every k steps; the reset's gradient is detached by default",
    "bptt-hard": "dS/dU is 1 where the neuron spiked, else 0: a silent neuron never learns",
    "shallow": "only the readout learns: the floor",
    "sigprop-surrogate": "the local loss reads f(U)",
    "sigprop-membrane": "the local loss reads U in a window around the threshold; the default",
    "sigprop-raw-membrane": "the local loss reads U itself, no surrogate of any kind",
    "sigprop-hebbian": "Hebb's product in place of the gradient of a loss",
    "error-forward": "the error enters at the front and travels forward; the contrast of two passes. Weak in deep networks",
    "forward-forward": "lively on right labels, quiet on wrong ones; three passes",
    "feedback-alignment": "BPTT with every transposed weight replaced by a fixed random one",
    "direct-feedback-alignment": "the error goes straight to every layer through a fixed random matrix",
    "kolen-pollack": "feedback alignment whose feedback learns; W and B become equal",
    "local-classifier": "DECOLLE: a fixed random readout per layer, an error at every step",
    "e-prop": "eligibility per synapse, a broadcast error; one update per sequence is direct feedback alignment's, "
    "found forward in time; `--broadcast symmetric` for the other form",
    "forward-mode": "RTRL: the exact gradient of BPTT, carried forward; small networks only",
    "uoro": "RTRL's derivatives as a random outer product, unbiased",
    "weight-perturbation": "moves all weights at random and keeps what helps",
    "node-perturbation": "noise on every neuron's drive, kept where it helps",
    "lra-diff": "each layer descends a saturating loss towards a target from the layer above, by its derivative",
    "lra-fdbk": "the same with targets through fixed random error weights",
    "target-propagation": "targets come down through learned inverses",
    "decoupled-interfaces": "each layer learns from its own guess of its gradient",
    "contrastive-hebbian": "a free phase and one with the output clamped; Hebb's product in the one minus that in the other",
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def percents(shares: Sequence[float]) -> str:
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def layers(values: Sequence[float | None], form: str = ".2f") -> str:
    return " / ".join("-" if value is None else f"{value:{form}}" for value in values)


def accuracy(row: dict[str, Any]) -> str:
    return f"{row['accuracy']['mean']:.3f} ± {row['accuracy']['std']:.3f}"


def slope(row: dict[str, Any]) -> str:
    """Growth of memory with T; below what the measurement resolves it is flat."""
    return "flat" if abs(row["kib_per_step"]) < 1.0 else f"{row['kib_per_step']:.0f} KiB"


def page() -> str:
    """The whole page."""
    found, memory = read_json(RESULTS / "compare-digits.json"), read_json(RESULTS / "memory-rules.json")
    assert found is not None
    assert memory is not None
    rows, grown = {row["rule"]: row for row in ranked(found)}, memory["rules"]

    def of(name: str) -> str:
        return f"{rows[name]['accuracy']['mean']:.3f}"

    def grows(name: str) -> str:
        return slope(grown[name]) if slope(grown[name]) == "flat" else f"grows by {slope(grown[name])} per step"

    guide = markdown(
        ["you want", "take", "because"],
        [
            [
                "to train without a backward pass, for a chip",
                "`sigprop-membrane`",
                f"{of('sigprop-membrane')}; nothing travels backwards, memory {grows('sigprop-membrane')}, rates held",
            ],
            ["the baseline of the field", "`bptt`", f"{of('bptt')}; memory {grows('bptt')}, and two passes through all layers"],
            [
                "local learning without a label stream",
                "`local-classifier`",
                f"{of('local-classifier')}; one fixed random matrix per layer, memory {grows('local-classifier')}",
            ],
            [
                "an error broadcast from the output, online",
                "`e-prop`",
                f"{of('e-prop')}; a trace per synapse and row, memory {grows('e-prop')}",
            ],
            [
                "an error from the output, without weight transport",
                "`direct-feedback-alignment`, `kolen-pollack`",
                f"{of('direct-feedback-alignment')}, {of('kolen-pollack')}; Kolen-Pollack's feedback becomes the transpose",
            ],
            [
                "no derivative at all, hardware in the loop",
                "`node-perturbation`",
                f"{of('node-perturbation')}; nothing but losses, in "
                f"{_times(rows, 'node-perturbation', 'shallow')} times the time of `shallow`",
            ],
            ["the exact gradient, online, of a small network", "`forward-mode`", f"{of('forward-mode')}; memory O(B n w)"],
            ["to know whether a rule learns anything", "`shallow`", f"{of('shallow')}; random features, a trained readout"],
        ],
    )
    measured = markdown(
        [
            "rule",
            "accuracy",
            "dead %",
            "nearly dead %",
            "saturated %",
            "rate",
            "aligned with BPTT",
            "learning rate",
            "s / epoch",
            "MiB",
        ],
        [
            [
                f"`{name}`",
                accuracy(row),
                *(percents(row[key]) for key in ("dead", "nearly_dead", "saturated")),
                layers(row["firing_rate"]),
                layers(row["alignment"]),
                f"{row['learning_rate']:g}",
                f"{row['seconds_per_epoch']:.2f}",
                memory_of(row),
            ]
            for name, row in rows.items()
        ],
    )
    needs = markdown(
        [
            "rule",
            "travels backwards",
            "symmetric weights",
            "history of a window",
            "error from the output",
            "weights of its own",
            "autograd",
        ],
        [
            [
                f"`{name}`",
                rule.facts.backward,
                *(
                    "yes" if need else "no"
                    for need in (rule.facts.symmetric_weights, rule.facts.stored_history, rule.facts.global_error)
                ),
                rule.facts.extra_weights,
                "yes" if rule.facts.autograd else "no",
            ]
            for name, rule in RULES.items()
        ],
    )
    costs = markdown(
        [
            "rule",
            "time",
            "memory",
            *(f"T = {steps} [MiB]" for steps in next(iter(grown.values()))["num_steps"]),
            "per step",
            "seen",
        ],
        [
            [
                f"`{name}`",
                rule.facts.time,
                rule.facts.memory,
                *(f"{peak:.1f}" for peak in grown[name]["peak_mib"]),
                slope(grown[name]),
                {"whole": "as one window", "stream": "step by step"}[grown[name]["mode"]],
            ]
            for name, rule in RULES.items()
        ],
    )
    sources = markdown(
        ["rule", "what it is", "source", "cannot train"],
        [[f"`{name}`", NOTES[name], rule.facts.paper, ", ".join(rule.facts.refuses) or "-"] for name, rule in RULES.items()],
    )
    below = [
        name
        for name, row in rows.items()
        if row["accuracy"]["mean"] <= rows["shallow"]["accuracy"]["mean"] and name != "shallow"
    ]
    verdict = f"All but {', '.join(below)} beat the floor." if below else "Every rule beats the floor, `shallow`."
    settings, compared = memory["settings"], rows["bptt"]
    return TEXT.format(
        guide=guide,
        measured=measured,
        needs=needs,
        costs=costs,
        sources=sources,
        settings=describe(found["settings"]),
        seeds=len(compared["accuracy"]["seeds"]),
        samples=compared["samples"],
        verdict=verdict,
        rules=len(rows),
        rates=", ".join(f"{rate:g}" for rate in found["grid"]),
        minutes=f"{found['seconds'] / 60:.0f}",
        jobs=found["jobs"],
        batch=settings["batch_size"],
        hidden=", ".join(map(str, settings["hidden"])),
        inputs=settings["inputs"],
        baselines="\n".join(_baseline(file) for file in BASELINES),
    )


def _times(rows: dict[str, Any], name: str, other: str) -> str:
    return f"{rows[name]['seconds_per_epoch'] / rows[other]['seconds_per_epoch']:.0f}"


def _baseline(file: str) -> str:
    results = read_json(RESULTS / f"{file}.json")
    assert results is not None
    found, settings = results["summary"]["bptt"], results["settings"]
    network = f"`mlp:{','.join(map(str, settings['hidden']))}`, T = {settings['num_steps']}, {settings['epochs']} epochs"
    held = "without" if "homeostasis=None" in results["cells"][0]["settings"]["rule"] else "with"
    return (
        f"- `bptt`, {settings['data']}, {network}, {held} homeostasis: {found['mean']['readout']:.4f} ± "
        f"{found['std']['readout']:.4f} on the test part, "
        f"{found['worst']['dead']:.1%} dead, rate {found['worst']['rate']:.2f} in the worst layer."
    )


TEXT = """# Which rule should I use?

Accuracies are those of the table below: a small network on scikit-learn's digits, the same for every rule.

{guide}

[Write your own rule](write-your-own-rule.md) in a dozen lines, or learn what these do from the [tutorial](tutorial.md).

## Measured

`spikeprop compare --data digits --rules all --seeds {seeds}`: {settings}; mean and standard deviation of {seeds} seeds on
{samples} test samples. The same network, data, encoder, epochs and batch for every rule; each rule's learning rate was chosen
from the same {rates} on the validation part, with one seed. {verdict} All {rules} rules took {minutes} minutes in {jobs}
processes, the search of learning rates not counted.

{measured}

Figures with slashes are per layer, first to last. Dead: never spikes on the test part. Nearly dead: spikes in less than 1 %
of the samples. Saturated: spikes at every step. Rate: spikes per neuron and step. Aligned: cosine of the rule's update with
the gradient of BPTT (reset detached) on the same 128 training samples, after the last epoch; over training in `compare.html`.
MiB: peak memory of three updates in a fresh process, above what it held before. Seconds are those of two processes at a time
on two shared cores. Homeostasis is on for SigProp, off for the others, as each has it by default (`--homeostasis on` or `off`
for all). Rules whose means differ by less than a standard deviation are not told apart here. A rule's other settings (gains,
thresholds, noise) are its defaults; those of error-forward, forward-forward, contrastive-hebbian and the perturbations were
chosen on this validation part, SigProp's on digits and MNIST.

A small network flatters what does not scale: perturbations (their variance grows with the number of neurons or weights),
error-forward (each layer blurs the error once more), forward-forward and exact forward-mode. The baseline at size:

{baselines}

## What each rule needs

{needs}

*Travels backwards*: what moves against the direction of the spikes at an update. *One layer*: targets or errors step down a
layer at a time, through weights of their own or those of the neighbour. *History of a window*: activity of past steps kept
until the update; all rules but those stream with flat memory, and those do if the window is short (`--update-every`,
`--truncate`). *Autograd*: whether the implementation records a graph; all others run with it disabled.

## Cost in time and memory

B rows, k steps of a window, n neurons, w weights; beyond the forward pass and the weights. Measured: peak above the imports,
in fresh processes, `mlp` {inputs}-{hidden} with {batch} rows, Poisson input (`benchmarks/memory_rules.py`).

{costs}

## Where they come from

The papers' rules are for rate neurons unless they name spikes; the spiking form, where it is ours, is described in the rule's
own file, and the published form is tested, too.

{sources}
"""


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
