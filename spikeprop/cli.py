"""The command ``spikeprop``: train, compare, evaluate, diagnose, export, simulate, parity, demo.

Each subcommand is one function from its arguments to an :class:`Outcome`: a text for people or, under ``--json``, one line with
a JSON object on standard output. Everything else, progress above all, goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import spikeprop
from spikeprop import catalogue, comparison, comparison_page, diagnosis, diagnosis_page, parallel, parity_page, report, runs
from spikeprop import demo as demonstration
from spikeprop.augmentation import Augmentation
from spikeprop.backends import loihi, netx, nir, parity
from spikeprop.backends.lava.bundle import write_bundle
from spikeprop.data import Data, Split
from spikeprop.encoding import Encoder, default_encoder, from_config
from spikeprop.errors import CheckpointError, InputError, SpikepropError
from spikeprop.evaluation import Health, dead_neurons, evaluate
from spikeprop.network import network_from_config
from spikeprop.neuron import LIF
from spikeprop.options import COMPARED, DEFAULT_STEPS, DEFAULTS, parser
from spikeprop.rules.base import Rule
from spikeprop.storage import read_tensors, save_network, write_text
from spikeprop.training import CHECKPOINT, check_rule, check_training, default_batch_size, fit


class Outcome(NamedTuple):
    """What a subcommand hands back: a text, the object for ``--json``, and the exit status.

    ``text`` None: another process says it.
    """

    text: str | None
    data: dict[str, Any]
    status: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 2 after one line about bad input; 130 after Ctrl-C; other errors keep their traceback."""
    args = argparse.Namespace(json=False)
    try:
        args = parser(COMMANDS).parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr):  # so that nothing but the outcome reaches standard output
            outcome: Outcome = args.command(args)
    except SpikepropError as error:
        print("spikeprop: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spikeprop:", _after_interrupt(args), file=sys.stderr)
        return 130
    if outcome.text is not None:
        print(json.dumps(outcome.data) if args.json else outcome.text, flush=True)
    return outcome.status


# --- Subcommands -------------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> Outcome:
    """Train a network and leave a run folder; of several processes, the first does what one of them must do."""
    with contextlib.nullcontext(True) if args.parallel is None else parallel.start() as first:
        return _train(args, first)


def _train(args: argparse.Namespace, first: bool) -> Outcome:
    config, data = _configure(args)
    encoder, out = from_config(config["encoder"]), args.out
    settings = {"num_steps": config["num_steps"], "encoder": encoder, "seed": config["seed"]}
    augment = Augmentation(**{name: config[name] for name in ("noise", "shift", "flip", "drop", "delay")})

    network, rule, test = _network(config, data, args.resume, out), _rule(config), _split(data, "test")
    if not args.resume and first:  # whatever may be refused is refused before an earlier run is replaced
        check_training(network, data, config["epochs"], encoder, augment)
        samples, size, steps = len(data.train.labels), config["batch_size"], config["num_steps"]
        check_rule(rule, network, samples, size, steps)
        runs.check_memory(
            rule.memory(network, size, steps) / 2**20, args.memory_limit, f"{config['rule']} on {config['model']}"
        )
        rule.initial_state(copy.deepcopy(network))
        parallel.crew(args.parallel, network, rule)
        untrained = runs.health_before_training(copy.deepcopy(network), data, test, **settings)
        config["health_before_training"] = untrained.to_dict()
        runs.clear(out)
        runs.write_json(out / runs.CONFIG, config)
    before = runs.peak_memory_mib()
    limits = {"epochs": config["epochs"], "batch_size": config["batch_size"], "augment": augment, "parallel": args.parallel}
    settings["chunk"] = config["chunk"]
    history = fit(network, rule, data, folder=out, resume=args.resume, **limits, **settings)
    peak = runs.peak_memory_mib()
    if not first:
        return Outcome(None, {})

    found, health = evaluate(network, test, **settings), dead_neurons(network, test, **settings)
    result = {
        "accuracy": found.accuracy,
        **{key: health.share(name) for key, name in comparison.SHARES.items()},
        "seconds": sum(history.series("seconds")),
        "peak_memory_mib": peak,
        "run": str(out),
    }
    more = {
        "memory_before_training_mib": before,
        "evaluation": found.to_dict(),
        "health": health.to_dict(),
        "health_before_training": config["health_before_training"],
    }
    runs.write_json(out / runs.HISTORY, history.to_dict())
    save_network(network, out / runs.NETWORK)
    runs.write_json(out / runs.RESULT, {**result, **more})  # last: a run that has it is whole
    text = (
        f"test {found}\n{health}\n"
        f"{result['seconds']:.1f} s of training, peak memory {peak:.0f} MiB ({before:.0f} MiB before training)\n"
        f"the run is in {out}; look closer with: spikeprop diagnose {_quoted(out)}"
    )
    return Outcome(text, result)


def compare_rules(args: argparse.Namespace) -> Outcome:
    """Train the same network by several rules, and say how they fare."""
    report.require_matplotlib()
    names = (
        list(catalogue.RULES) if args.rules == "all" else list(dict.fromkeys(name.strip() for name in args.rules.split(",")))
    )
    for name in names:
        catalogue.find(name)
    given = {name: getattr(args, name) for name in COMPARED if getattr(args, name) is not None}
    config = {**COMPARED, **given, "full_train": False}
    if args.encoder is not None:
        config["encoder"] = _encoder(args.encoder).config()
    data = runs.load_data(config)
    config = _suited(config, data)
    _split(data, "validation"), _split(data, "test")
    out = args.out or Path("runs") / f"compare-{config['data']}"
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder")
    say = functools.partial(print, file=sys.stderr, flush=True)
    limits = {"jobs": args.jobs, "memory_limit": args.memory_limit}
    found = comparison.compare(config, names, range(args.seeds), out, say=say, **limits)
    write_text(out / "compare.csv", comparison_page.as_csv(found))
    write_text(out / "compare.html", comparison_page.page(found))
    return Outcome(f"{comparison_page.text(found)}\n\nsee {out / 'compare.html'}", found)


def evaluate_run(args: argparse.Namespace) -> Outcome:
    """Accuracy of a run by each prediction option."""
    run = runs.load_run(args.run)
    split = _split(run.data(args.data_root), args.split)
    found = evaluate(run.network, split, **run.settings(), chunk=run.config["chunk"])
    return Outcome(f"{args.split} {found}", {"run": str(args.run), "split": args.split, **found.to_dict()})


def diagnose(args: argparse.Namespace) -> Outcome:
    """Which neurons of a run live, and why the others do not."""
    report.require_matplotlib()
    run = runs.load_run(args.run)
    config = run.config if args.data is None else {**run.config, "data": args.data}
    split = _split(runs.load_data(config, args.data_root), args.split)
    rule: Any = _rule(run.config, weight_bits=None)
    after = diagnosis.diagnose(run.network, split, **run.settings())
    before = _before_training(run, split, args.data_root if args.data is None else None)
    found = {
        "run": str(args.run),
        "data": config["data"],
        "split": args.split,
        **diagnosis_page.content(after, rule.homeostasis, before, run.history.epochs),
    }
    out = args.out or args.run
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder")
    runs.write_json(out / "diagnosis.json", found)
    write_text(out / "diagnosis.html", diagnosis_page.page(found))
    text = f"{args.split} split of {config['data']}, {after}\n\n{diagnosis_page.course(found)}\n\nadvice\n" + "\n".join(
        found["advice"]
    )
    return Outcome(f"{text}\n\nsee {out / 'diagnosis.html'}", {**found, "html": str(out / "diagnosis.html")})


def _before_training(run: runs.Run, split: Split, data_root: str | None) -> Health | None:
    """The health over ``split`` of the network that the run started from, built anew; None where that has gone missing."""
    try:
        data = run.data(data_root)
        return runs.health_before_training(_network(run.config, data, False, run.path), data, split, **run.settings())
    except SpikepropError as error:
        print(f"the network before training cannot be built anew: {error}", file=sys.stderr)
        return None


def export(args: argparse.Namespace) -> Outcome:
    """Write a run's network in a chip's own numbers."""
    run = runs.load_run(args.run)
    data = {"run": str(args.run), "to": args.to, "path": str(args.output)}
    if args.to == "nir":
        nir.write(run.network, args.output, args.dt)
        text = f"wrote {args.output}: {len(run.network.layers)} layers in float64, {args.dt:g} s per step"
        return Outcome(text, {**data, "dt": args.dt})
    chip = run.quantize(args.weight_bits, "netx" if args.to == "net" else "lava")
    if args.to == "lava":
        inputs = _split(run.data(args.data_root), "test").inputs[: args.samples]
        messages = loihi.encode(chip, run.encoded(inputs))
        readout = run.network.readout
        write_bundle(chip, args.output, messages, readout.weight, readout.bias)
    elif args.to == "net":
        netx.write(chip, args.output)
    else:
        loihi.save(chip, args.output)
    bits = chip.layers[0].weight_bits
    lines = [f"wrote {args.output}: {len(chip.layers)} layers, {bits}-bit weights", _describe_inputs(chip.report)]
    for number, layer in enumerate(chip.report["layers"], 1):
        lines.append(
            f"layer {number}: scale {layer['scale']:.1f}, threshold register {layer['threshold_register']}, "
            f"weights off by {layer['weight_error']:.2%} (rms), threshold by {layer['threshold_error']:.3%}, "
            f"bias by {layer['bias_error']:.3%} of the threshold"
        )
    if args.to == "lava":
        lines.append(f"where lava-nc is installed: python {_quoted(args.output / 'run.py')} --check")
    return Outcome("\n".join(lines), {**data, "report": chip.report})


def simulate(args: argparse.Namespace) -> Outcome:
    """Run a network by one engine, and by another, and count the spikes that differ."""
    run = runs.load_run(args.run)
    test = _split(run.data(args.data_root), "test")
    inputs, labels = test.inputs[: args.samples], test.labels[: args.samples]
    chip = run.quantize(args.weight_bits)
    wanted = [engine for engine in runs.ENGINES if engine in ("float", args.engine, args.against)]
    spikes = {engine: runs.spike_trains(run, engine, inputs, chip, args.timeout) for engine in wanted}
    accuracy = {engine: runs.accuracy_of(run.network, trains, labels) for engine, trains in spikes.items()}
    reference = spikes[args.engine]
    layers: list[dict[str, Any]] = [{"spikes": int(layer.sum()), "differing": None} for layer in reference]
    differing = None
    if args.against != "none":
        layers = [dict(layer) for layer in parity.compare(reference, spikes[args.against])]
        differing = sum(layer["differing"] for layer in layers)
    lines = [f"the first {len(labels)} test samples, T = {run.config['num_steps']}: {args.engine} against {args.against}"]
    for number, layer in enumerate(layers, 1):
        compared = "" if differing is None else f", {layer['differing']} differ"
        lines.append(f"layer {number}: {layer['spikes']} spikes{compared}")
    lines.append("accuracy " + "  ".join(f"{engine} {share:.4f}" for engine, share in accuracy.items()))
    return Outcome(
        "\n".join(lines), {"samples": len(labels), "layers": layers, "differing_spikes": differing, "accuracy": accuracy}
    )


def compare_engines(args: argparse.Namespace) -> Outcome:
    """Run a network by every engine there is, and say where they differ."""
    report.require_matplotlib()
    run = runs.load_run(args.run)
    config = run.config if args.data is None else {**run.config, "data": args.data}
    split = _split(runs.load_data(config, args.data_root), "test")
    inputs, labels = split.inputs[: args.samples], split.labels[: args.samples]
    chip = run.quantize(args.weight_bits)
    found = parity.report(run.network, chip, run.encoded(inputs), labels, engines=args.engines, timeout=args.timeout)
    found = {"run": str(args.run), "data": config["data"], **found, "quantisation": chip.report}
    out = args.out or args.run
    runs.write_json(out / "parity.json", found)
    write_text(out / "parity.html", parity_page.page(found))
    exact = [pair["differing_spikes"] for pair in found["comparisons"] if pair["other"] == "lava"]
    text = f"{parity_page.text(found)}\n\nsee {out / 'parity.html'}"
    return Outcome(text, {**found, "html": str(out / "parity.html")}, 1 if any(exact) else 0)


def demo(args: argparse.Namespace) -> Outcome:
    """The whole job on scikit-learn's digits."""
    shown = demonstration.run(args.out, epochs=args.epochs, samples=args.samples, picture=args.picture)
    return Outcome(shown.text, shown.summary, shown.status)


COMMANDS = {
    "train": train,
    "compare": compare_rules,
    "evaluate": evaluate_run,
    "diagnose": diagnose,
    "export": export,
    "simulate": simulate,
    "parity": compare_engines,
    "demo": demo,
}


# --- What they share ---------------------------------------------------------------------------------------------------------


def _network(config: dict[str, Any], data: Data, resume: bool, out: Path) -> spikeprop.Network:
    """What training starts from: fresh weights, another run's network, or, to resume, the network of the checkpoint."""
    if resume:  # its neurons may be those of a run that it started from, with other decays than the options say
        return network_from_config(read_tensors(out / CHECKPOINT)[1]["network"])
    if config["start_from"] is not None:
        return runs.load_run(config["start_from"]).network
    neuron = LIF(config["beta"], config["threshold"])
    return runs.build_model(config["model"], data, neuron=neuron, recurrent=config["recurrent"], seed=config["seed"])


def _configure(args: argparse.Namespace) -> tuple[dict[str, Any], Data]:
    """A run's configuration, from the options or, with --resume, from the run itself; and its data."""
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    if "encoder" in given:
        given["encoder"] = _encoder(given["encoder"]).config()
    if "start_from" in given:
        given["start_from"] = str(Path(given["start_from"]).resolve())
    if args.out is None:
        args.out = Path("runs") / f"{given.get('data', DEFAULTS['data'])}-{given.get('rule', DEFAULTS['rule'])}"
    if args.resume:
        config = runs.read_config(args.out)
        if not (args.out / CHECKPOINT).exists():
            raise CheckpointError(f"{args.out} holds no {CHECKPOINT}: no epoch was finished; leave --resume out to start")
        for name, value in given.items():
            if name != "data_root" and value != config.get(name):
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} {value}: {args.out} was started with {config.get(name)}; leave the option out")
        return config, runs.load_data(config, args.data_root)
    if not args.overwrite:
        runs.refuse_loss(args.out)
    config = {**DEFAULTS, **given}
    if config["start_from"] is not None:
        config |= _inherit(given)
    chosen: Any = _rule(config, weight_bits=None)
    config |= catalogue.settings_of(chosen)
    band = chosen.homeostasis
    config["rate_band"] = None if band is None else [band.lowest, band.highest, band.strength]
    data = runs.load_data(config)
    config = _suited(config, data)
    config |= {"input_coding": runs.input_coding(from_config(config["encoder"]), data), "versions": runs.versions()}
    return config, data


def _suited(config: dict[str, Any], data: Data) -> dict[str, Any]:
    """A configuration with encoder, T and batch size filled in from the data where they were left open."""
    encoder = from_config(config["encoder"]) if config["encoder"] else default_encoder(data.temporal)
    if encoder.temporal != data.temporal:
        has = "carry their own time, use events" if data.temporal else "have no time axis, use current, poisson or latency"
        raise InputError(f"the {encoder.name} encoder does not suit the data set {data.name}, whose inputs {has}")
    num_steps = config["num_steps"] or data.num_steps or DEFAULT_STEPS
    batch_size = config["batch_size"] or default_batch_size(len(data.train.labels))
    return {**config, "encoder": encoder.config(), "num_steps": num_steps, "batch_size": batch_size}


def _inherit(given: dict[str, Any]) -> dict[str, Any]:
    """What a run that starts from another takes over: what the network is, and how its inputs are coded."""
    path = Path(given["start_from"])
    before = runs.load_run(path).config
    taken_over = (
        "data",
        "data_root",
        "full_train",
        "encoder",
        "model",
        "recurrent",
        "beta",
        "threshold",
        "num_steps",
        "delay_line",
    )
    kept = {name: before[name] for name in taken_over}
    for name in ("model", "recurrent", "beta", "threshold"):
        if name in given and given[name] != kept[name]:
            raise InputError(f"--{name} {given[name]}: the network of {path} has {kept[name]}; leave the option out")
    return {**kept, **{name: value for name, value in given.items() if name in kept}}


def _rule(config: dict[str, Any], **changed: Any) -> Rule:
    config = config | changed
    rule: Any = catalogue.configure(config["rule"], config)
    if rule.homeostasis is not None and config.get("rate_band"):  # of a run made with other defaults
        lowest, highest, strength = config["rate_band"]
        rule = replace(rule, homeostasis=replace(rule.homeostasis, lowest=lowest, highest=highest, strength=strength))
    return rule if config["weight_bits"] is None else loihi.QuantizationAware(rule, config["weight_bits"])


def _encoder(text: str) -> Encoder:
    """An encoder from ``poisson`` or ``poisson:rate=0.5``."""
    name, _, settings = text.partition(":")
    try:
        pairs = [setting.split("=") for setting in settings.split(",") if setting]
        return from_config({"name": name, **{key: float(value) for key, value in pairs}})
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"encoder {text!r} is not understood; write a name or, for example, poisson:rate=0.5") from None


def _split(data: Data, name: str) -> Split:
    split: Split | None = getattr(data, name)
    if split is None:
        raise InputError(f"the data set {data.name} has no {name} part here (--full-train gives it to the training part)")
    return split


def _describe_inputs(report: dict[str, Any]) -> str:
    if report["inputs"] == "spikes":
        return "inputs: spikes, 0 or 1"
    low, high = report["input_range"]
    return f"inputs: graded messages of {report['num_message_bits']} bits for {low:g} to {high:g}"


def _after_interrupt(args: argparse.Namespace) -> str:
    out = getattr(args, "out", None)
    if getattr(args, "command", None) is not train or out is None:
        return "interrupted"
    if not (out / CHECKPOINT).exists():
        return "interrupted before the first epoch was finished: nothing to resume, run the same command again"
    go_on = f"spikeprop train --resume --out {_quoted(out)}"
    return f"interrupted; {out / CHECKPOINT} holds the finished epochs, go on with: {go_on}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


if __name__ == "__main__":
    sys.exit(main())
