"""The command ``spikeprop``: train, evaluate, diagnose, export, simulate, demo.

Each subcommand is one function from its arguments to an :class:`Outcome`: a text for people and, under ``--json``, one JSON object
as the last line of standard output. Everything else, progress above all, goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

import spikeprop
from spikeprop import demo as demonstration
from spikeprop import runs
from spikeprop.backends import loihi, parity
from spikeprop.data import Data, Split
from spikeprop.data_files import READERS
from spikeprop.encoding import ENCODERS, default_encoder, from_config
from spikeprop.errors import CheckpointError, InputError, SpikepropError
from spikeprop.evaluation import Health, dead_neurons, evaluate
from spikeprop.losses import SimilarityCrossEntropy
from spikeprop.neuron import LIF
from spikeprop.rules.sigprop import SigProp
from spikeprop.storage import save_network
from spikeprop.surrogate import ATan, LearnOn, Membrane
from spikeprop.training import CHECKPOINT, default_batch_size, fit

RULES: dict[str, LearnOn] = {
    "sigprop-surrogate": ATan(),
    "sigprop-membrane": Membrane(),
    "sigprop-raw-membrane": Membrane(clip=None),
}
DEFAULTS: dict[str, Any] = {  # None: from the data. The others equal the library's own, which a test holds
    "data": "digits",
    "data_root": None,
    "full_train": False,
    "encoder": None,
    "num_steps": None,
    "model": "mlp:256,256",
    "beta": 0.9,
    "threshold": 1.0,
    "rule": "sigprop-membrane",
    "learning_rate": 4e-3,
    "temperature": 0.1,
    "update_every": None,
    "epochs": 20,
    "batch_size": None,
    "seed": 0,
}
DEFAULT_STEPS = 8  # T for data without a time axis


class Outcome(NamedTuple):
    """What a subcommand hands back: a text, the object for ``--json``, and the exit status."""

    text: str
    data: dict[str, Any]
    status: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 2 after one line about bad input; 130 after Ctrl-C; other errors keep their traceback."""
    args = argparse.Namespace(json=False)
    try:
        args = _parser().parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr):  # so that nothing but the outcome reaches standard output
            outcome: Outcome = args.command(args)
    except SpikepropError as error:
        print("spikeprop: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spikeprop:", _after_interrupt(args), file=sys.stderr)
        return 130
    print(json.dumps(outcome.data) if args.json else outcome.text, flush=True)
    return outcome.status


# --- Subcommands -------------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> Outcome:
    """Train a network and leave a run folder."""
    config, data = _configure(args)
    encoder, out = from_config(config["encoder"]), args.out
    settings = {"num_steps": config["num_steps"], "encoder": encoder, "seed": config["seed"]}

    def fresh() -> spikeprop.Network:
        neuron = LIF(config["beta"], config["threshold"])
        return runs.build_model(config["model"], data, neuron=neuron, seed=config["seed"])

    network, rule = fresh(), _rule(config)
    if not args.resume:
        runs.clear(out)
        runs.write_json(out / runs.CONFIG, config)
    before = runs.peak_memory_mib()
    history = fit(
        network, rule, data, epochs=config["epochs"], batch_size=config["batch_size"], folder=out, resume=args.resume, **settings
    )
    peak = runs.peak_memory_mib()

    test = _split(data, "test")
    found, health = evaluate(network, test, **settings), dead_neurons(network, test, **settings)
    result = {
        "accuracy": found.accuracy,
        **{key: health.share(name) for key, name in _SHARES.items()},
        "seconds": sum(history.series("seconds")),
        "peak_memory_mib": peak,
        "run": str(out),
    }
    more = {
        "memory_before_training_mib": before,
        "evaluation": found.to_dict(),
        "health": health.to_dict(),
        "health_before_training": runs.health_before_training(fresh(), data, test, **settings).to_dict(),
    }
    runs.write_json(out / runs.HISTORY, history.to_dict())
    save_network(network, out / runs.NETWORK)
    runs.write_json(out / runs.RESULT, {**result, **more})  # last: a run that has it is whole
    text = (
        f"test {found}\n{health}\n{result['seconds']:.1f} s of training, peak memory {peak:.0f} MiB ({before:.0f} MiB before training)\n"
        f"the run is in {out}; look closer with: spikeprop diagnose {_quoted(out)}"
    )
    return Outcome(text, result)


def evaluate_run(args: argparse.Namespace) -> Outcome:
    """Accuracy of a run by each prediction option."""
    run = runs.load_run(args.run)
    found = evaluate(run.network, _split(run.data(args.data_root), args.split), **run.settings())
    return Outcome(f"{args.split} {found}", {"run": str(args.run), "split": args.split, **found.to_dict()})


def diagnose(args: argparse.Namespace) -> Outcome:
    """Which neurons of a run live."""
    run = runs.load_run(args.run)
    health = dead_neurons(run.network, _split(run.data(args.data_root), args.split), **run.settings())
    before, advice = run.result.get("health_before_training"), advise(health)
    shares = " ".join(f"{layer['dead']:.2%}" for layer in before["layers"]) if before else "not recorded"
    text = f"{args.split} split, {health}\ndead before training (test split), layer by layer: {shares}\n{advice}"
    data = {"run": str(args.run), "split": args.split, **health.to_dict(), "before_training": before, "advice": advice}
    return Outcome(text, data)


def export(args: argparse.Namespace) -> Outcome:
    """Write a run's network in a chip's own numbers."""
    run = runs.load_run(args.run)
    chip = run.quantize(args.weight_bits)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        loihi.save(chip, args.output)
    except OSError as error:
        raise CheckpointError(f"{args.output} could not be written ({error.strerror}); choose another place with -o") from None
    lines = [f"wrote {args.output}: {len(chip.layers)} layers, {args.weight_bits}-bit weights", _describe_inputs(chip.report)]
    for number, layer in enumerate(chip.report["layers"], 1):
        lines.append(
            f"layer {number}: scale {layer['scale']:.1f}, threshold register {layer['threshold_register']}, "
            f"weights off by {layer['weight_error']:.2%} (rms), threshold by {layer['threshold_error']:.3%}, "
            f"bias by {layer['bias_error']:.3%} of the threshold"
        )
    data = {"run": str(args.run), "to": args.to, "path": str(args.output), "weight_bits": args.weight_bits, "report": chip.report}
    return Outcome("\n".join(lines), data)


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
    lines = [f"the first {len(labels)} test samples, T = {run.config['num_steps']}, engine {args.engine}, against {args.against}"]
    for number, layer in enumerate(layers, 1):
        lines.append(f"layer {number}: {layer['spikes']} spikes" + ("" if differing is None else f", {layer['differing']} differ"))
    lines.append("accuracy " + "  ".join(f"{engine} {share:.4f}" for engine, share in accuracy.items()))
    return Outcome(
        "\n".join(lines), {"samples": len(labels), "layers": layers, "differing_spikes": differing, "accuracy": accuracy}
    )


def demo(args: argparse.Namespace) -> Outcome:
    """The whole job on scikit-learn's digits."""
    shown = demonstration.run(args.out, epochs=args.epochs, samples=args.samples, picture=args.picture)
    return Outcome(shown.text, shown.summary, shown.status)


# --- What they share ---------------------------------------------------------------------------------------------------------

_SHARES = {"dead": "dead", "nearly_dead": "nearly_dead", "saturated": "saturated", "firing_rate": "rate"}


def _configure(args: argparse.Namespace) -> tuple[dict[str, Any], Data]:
    """A run's configuration, from the options or, with --resume, from the run itself; and its data."""
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    if "encoder" in given:
        given["encoder"] = _encoder(given["encoder"]).config()
    if args.out is None:
        args.out = Path("runs") / f"{given.get('data', DEFAULTS['data'])}-{given.get('rule', DEFAULTS['rule'])}"
    if args.resume:
        config = runs.read_config(args.out)
        if not (args.out / CHECKPOINT).exists():
            raise CheckpointError(f"{args.out} holds no {CHECKPOINT}: no epoch was finished; leave --resume out to start")
        for name, value in given.items():
            if name != "data_root" and value != config.get(name):
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} {value} differs from the {config.get(name)} that {args.out} was started with; leave it out")
        return config, runs.load_data(config, args.data_root)
    if not args.overwrite:
        runs.refuse_loss(args.out)
    config = {**DEFAULTS, **given}
    _rule(config)
    data = runs.load_data(config)
    encoder = from_config(config["encoder"]) if config["encoder"] else default_encoder(data.temporal)
    if encoder.temporal != data.temporal:
        has = "carry their own time, use events" if data.temporal else "have no time axis, use current, poisson or latency"
        raise InputError(f"the {encoder.name} encoder does not suit the data set {data.name}, whose inputs {has}")
    config["num_steps"] = config["num_steps"] or data.num_steps or DEFAULT_STEPS
    config["batch_size"] = config["batch_size"] or default_batch_size(len(data.train.labels))
    config |= {"encoder": encoder.config(), "input_coding": runs.input_coding(encoder, data), "versions": runs.versions()}
    return config, data


def _rule(config: dict[str, Any]) -> SigProp:
    if config["rule"] not in RULES:
        raise InputError(f"unknown rule {config['rule']!r}; known: {', '.join(RULES)}")
    return SigProp(
        learn_on=RULES[config["rule"]],
        loss=SimilarityCrossEntropy(temperature=config["temperature"]),
        update_every=config["update_every"],
        optimizer=partial(torch.optim.Adam, lr=config["learning_rate"]),
    )


def _encoder(text: str) -> spikeprop.encoding.Encoder:
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


def advise(health: Health) -> str:
    """What to do about the neurons, in one line."""
    for number, layer in enumerate(health.layers, 1):
        if layer.dead > 0.01:
            far = "" if layer.deficit is None else f"; the typical dead one stays {-layer.deficit:.2g} below its threshold"
            return f"advice: layer {number} has {layer.dead:.1%} dead neurons{far}: lower --threshold, raise --beta, or train longer"
        if layer.saturated > 0.01:
            return f"advice: layer {number} has {layer.saturated:.1%} saturated neurons: raise --threshold or lower --beta"
        if layer.nearly_dead > 0.1:
            return f"advice: in layer {number} {layer.nearly_dead:.1%} of the neurons hardly spike: it could be narrower, or --threshold lower"
    return "advice: none needed, every layer is alive and none is saturated"


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
    return f"interrupted; {out / CHECKPOINT} holds the finished epochs, go on with: spikeprop train --resume --out {_quoted(out)}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


# --- Options -----------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake as every other bad input: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="spikeprop",
        description="Train spiking neural networks without a backward pass, look inside them, and run them on Loihi's integers.",
        epilog="Start with: spikeprop demo        Help on a command: spikeprop train --help",
    )
    parser.add_argument("--version", action="version", version=f"spikeprop {spikeprop.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], Outcome], summary: str, *examples: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  spikeprop {name} {example}".rstrip() for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--json", action="store_true", help="print the result as one JSON object, the last line of the output")
        made.set_defaults(command=run)
        return made

    _train_options(
        command(
            "train",
            train,
            "train a network, forward only, and keep everything in a run folder",
            "--data digits --epochs 20 --out runs/digits",
            "--data mnist --data-root ~/data --model mlp:512,512 --rule sigprop-surrogate --epochs 6 --out runs/mnist",
            "--resume --out runs/mnist",
        )
    )

    def on_run(made: argparse.ArgumentParser, *, split: bool) -> argparse.ArgumentParser:
        made.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run (the --out of spikeprop train)")
        made.add_argument("--data-root", metavar="FOLDER", help="where the data files are, if they have moved since training")
        if split:
            splits = ("train", "validation", "test")
            made.add_argument("--split", choices=splits, default="test", help="part of the data (default: test)")
        return made

    summary = "measure a run's accuracy by every prediction option"
    on_run(command("evaluate", evaluate_run, summary, "runs/digits", "runs/digits --split validation --json"), split=True)
    summary = "show which neurons never spike, hardly spike or always spike, layer by layer"
    on_run(command("diagnose", diagnose, summary, "runs/digits", "runs/digits --split train"), split=True)

    made = command(
        "export", export, "write a run's network in a chip's own numbers", "runs/digits --to loihi -o digits-loihi.npz"
    )
    made.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run (the --out of spikeprop train)")
    made.add_argument("--to", choices=("loihi",), required=True, help="the target: Loihi's fixed point, as an .npz of integers")
    made.add_argument("-o", "--output", type=Path, required=True, metavar="PATH", help="the file to write")
    _weight_bits(made)

    made = on_run(
        command(
            "simulate",
            simulate,
            "run the network by one engine and count, layer by layer, the spikes that differ from another",
            "runs/digits --engine integer --against lava --samples 100",
            "runs/digits --engine float --against integer --samples 1000    # what quantising changed",
        ),
        split=False,
    )
    engines = "float: as trained; integer: Loihi's arithmetic; lava: Intel's Lava, fixed point"
    made.add_argument("--engine", choices=runs.ENGINES, default="integer", help=f"{engines} (default: integer)")
    made.add_argument("--against", choices=(*runs.ENGINES, "none"), default="float", help="what to compare with (default: float)")
    made.add_argument("--samples", type=_count, default=100, metavar="N", help="the first N of the test split (default: 100)")
    made.add_argument("--timeout", type=_positive, default=600.0, metavar="SECONDS", help="end Lava after this time (default: 600)")
    _weight_bits(made)

    made = command("demo", demo, "do the whole job on scikit-learn's digits and write a report", "", "--out runs/demo --json")
    made.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="for report and runs (default: runs/demo)")
    made.add_argument("--epochs", type=_count, default=20, metavar="N", help="passes over the training data (default: 20)")
    made.add_argument("--samples", type=_count, default=100, metavar="N", help="test samples to run in Lava (default: 100)")
    made.add_argument("--picture", type=Path, metavar="PATH", help="also write the main figures as one PNG")
    return parser


def _weight_bits(made: argparse.ArgumentParser) -> None:
    bits = range(2, 9)
    made.add_argument("--weight-bits", type=int, choices=bits, default=8, metavar="N", help="2 to 8, with the sign (default: 8)")


def _train_options(made: argparse.ArgumentParser) -> None:
    def option(flag: str, text: str, **how: Any) -> None:
        default = DEFAULTS[flag[2:].replace("-", "_")]
        made.add_argument(flag, help=text + ("" if default is None or default is False else f" (default: {default})"), **how)

    option("--data", f"the data set: {', '.join(READERS)}", metavar="NAME")
    option("--data-root", "where its files are (or the environment variable SPIKEPROP_DATA); digits need none", metavar="FOLDER")
    option("--full-train", "train on the validation part, too", action="store_const", const=True)
    option("--model", "mlp:256,256 (neurons per layer) or conv:20,40-128 (channels, then dense)", metavar="MODEL")
    option("--beta", "share of the membrane that a neuron keeps per step, 0 to 1", type=float, metavar="X")
    option("--threshold", "membrane above which a neuron spikes", type=_positive, metavar="X")
    option("--rule", f"how to learn: {', '.join(RULES)}", metavar="NAME")
    option("--encoder", f"{', '.join(ENCODERS)}, or with settings poisson:rate=0.5 (default: from the data)", metavar="NAME")
    option("--num-steps", f"time steps per sample, T (default: the data's own, or {DEFAULT_STEPS})", type=_count, metavar="T")
    option("--epochs", "passes over the training data", type=_count, metavar="N")
    option("--batch-size", "samples per update (default: 128, fewer for small data)", type=_count, metavar="N")
    option("--learning-rate", "of the Adam optimiser, at the start", type=_positive, metavar="X")
    option("--temperature", "of the local loss: smaller is sharper", type=_positive, metavar="X")
    option("--update-every", "time steps between weight updates (default: once per sequence)", type=_count, metavar="K")
    option("--seed", "fixes weights, order and random encoders", type=_seed, metavar="N")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="the run folder (default: runs/DATA-RULE)")
    made.add_argument("--resume", action="store_true", help="continue the run in --out after its last whole epoch")
    made.add_argument("--overwrite", action="store_true", help="replace the run in --out")


if __name__ == "__main__":
    sys.exit(main())
