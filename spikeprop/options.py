"""The options of the command ``spikeprop``, each declared once, with the help that a newcomer reads."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args

import spikeprop
from spikeprop import catalogue
from spikeprop.backends.parity import ENGINES as PARITY_ENGINES
from spikeprop.data_files import READERS
from spikeprop.differentiable import ResetGradient
from spikeprop.encoding import ENCODERS
from spikeprop.errors import InputError
from spikeprop.neuron import LIF
from spikeprop.runs import ENGINES

_NEURON: Any = LIF()
DEFAULTS: dict[str, Any] = {  # of a training; None: from the data
    "data": "digits",
    "data_root": None,
    "full_train": False,
    "encoder": None,
    "num_steps": None,
    "delay_line": [],
    "model": "mlp:256,256",
    "recurrent": False,
    "beta": _NEURON.beta,
    "threshold": _NEURON.threshold,
    "rule": "sigprop-membrane",
    **dict.fromkeys(catalogue.OPTIONS),  # the rule's own
    "noise": 0.0,
    "shift": 0,
    "flip": False,
    "drop": 0.0,
    "delay": 0,
    "weight_bits": None,
    "start_from": None,
    "epochs": 20,
    "batch_size": None,
    "chunk": None,
    "seed": 0,
}
COMPARED: dict[str, Any] = {  # of a comparison of rules
    **{
        name: DEFAULTS[name]
        for name in ("data", "data_root", "encoder", "num_steps", "recurrent", "beta", "threshold", "batch_size")
    },
    "model": "mlp:32,32",
    "epochs": 10,
    "homeostasis": "own",
}
EXPORTS = {
    "loihi": "fixed point, an .npz of integers",
    "lava": "a folder that runs in Lava by itself",
    "net": "lava-dl's HDF5",
    "nir": "the Neuromorphic Intermediate Representation, floats",
}
DEFAULT_STEPS = 8  # T for data without a time axis


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake as every other bad input: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _steps(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of steps, 0 or more")
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


def parser(commands: Mapping[str, Callable[..., Any]]) -> argparse.ArgumentParser:
    """The whole command line; ``commands`` are the functions that its subcommands call."""
    whole = _Parser(
        prog="spikeprop",
        description="Train spiking neural networks without a backward pass, look inside, and run them on Loihi's integers.",
        epilog="start with:\n  spikeprop demo\nhelp on a command:\n  spikeprop train --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"spikeprop {spikeprop.__version__}")
    subparsers = whole.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  spikeprop {name} {example}".rstrip() for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--json", action="store_true", help="print the result as one JSON object, in one line")
        made.set_defaults(command=commands[name])
        return made

    made = command(
        "train",
        "train a network by any of the rules, and keep everything in a run folder",
        "--data digits --epochs 20 --out runs/digits",
        "--data mnist --data-root ~/data --model mlp:512,512 --rule sigprop-surrogate --epochs 6 --out runs/mnist",
        "--resume --out runs/mnist",
    )
    _training(made)

    made = command(
        "compare",
        "train the same network by several rules on equal terms: accuracy, dead neurons, alignment, time, memory",
        "--data digits --rules all --seeds 3",
        "--rules sigprop-membrane,bptt,shallow --model mlp:64,64 --epochs 20 --json",
    )
    _comparison(made)

    made = command(
        "evaluate", "measure accuracy by every prediction option", "runs/digits", "runs/digits --split validation --json"
    )
    _run_folder(made)
    _data_root(made)
    _split(made)

    made = command(
        "diagnose",
        "show which neurons never spike, why, and what to change; which hardly or always spike",
        "runs/digits",
        "runs/digits --split train --out diagnosis",
        "runs/mnist --data fashion-mnist",
    )
    _run_folder(made)
    _other_data(made)
    _data_root(made)
    _split(made)
    made.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for diagnosis.json and diagnosis.html (default: the run's folder)"
    )

    made = command(
        "export",
        "write a network for a chip or for another library",
        "runs/digits --to loihi -o digits-loihi.npz",
        "runs/digits --to lava -o digits-lava    # a folder that needs only lava-nc: python digits-lava/run.py --check",
        "runs/digits --to net -o digits.net      # lava-dl's netx",
        "runs/digits --to nir -o digits.nir",
    )
    _run_folder(made)
    _data_root(made)
    formats = "; ".join(f"{name}: {what}" for name, what in EXPORTS.items())
    made.add_argument("--to", choices=tuple(EXPORTS), required=True, help=formats)
    made.add_argument("-o", "--output", type=Path, required=True, metavar="PATH", help="the file or folder to write")
    made.add_argument("--samples", type=_count, default=10, metavar="N", help="test samples stored with lava (default: 10)")
    made.add_argument("--dt", type=_positive, default=1e-3, metavar="S", help="seconds per step, for nir (default: 0.001)")
    _weight_bits(made)

    made = command(
        "simulate",
        "run a network by one engine and count, layer by layer, the spikes that differ from another",
        "runs/digits --engine integer --against lava --samples 100",
        "runs/digits --engine float --against integer --samples 1000    # what quantising changed",
    )
    _run_folder(made)
    _data_root(made)
    engines = "float: as trained; integer: Loihi's arithmetic; lava: Intel's Lava, fixed point"
    made.add_argument("--engine", choices=ENGINES, default="integer", help=f"{engines} (default: integer)")
    made.add_argument("--against", choices=(*ENGINES, "none"), default="float", help="compare with this (default: float)")
    made.add_argument("--samples", type=_count, default=100, metavar="N", help="the first N of the test split (default: 100)")
    made.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="end Lava after S seconds (default: 600)")
    _weight_bits(made)

    made = command(
        "parity",
        "compare a network as trained, in integers, in Lava, and from NIR in snnTorch and Norse, spike by spike",
        "runs/digits --samples 100",
        "runs/digits --engines integer lava --weight-bits 4 --json",
    )
    _run_folder(made)
    _other_data(made)
    _data_root(made)
    made.add_argument("--engines", nargs="+", choices=PARITY_ENGINES, default=PARITY_ENGINES, help="default: all there are")
    made.add_argument("--samples", type=_count, default=100, metavar="N", help="the first N of the test split (default: 100)")
    made.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="end Lava after S seconds (default: 600)")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="for parity.json and parity.html (default: the run's folder)")
    _weight_bits(made)

    made = command("demo", "do the whole job on scikit-learn's digits and write a report", "", "--out runs/demo --json")
    out = Path("runs/demo")
    made.add_argument("--out", type=Path, default=out, metavar="FOLDER", help=f"for the report and two runs (default: {out})")
    made.add_argument("--epochs", type=_count, default=20, metavar="N", help="passes over the training data (default: 20)")
    made.add_argument("--samples", type=_count, metavar="N", help="the first N test samples in Lava (default: all)")
    made.add_argument("--picture", type=Path, metavar="PATH", help="also write the main figures as one PNG")
    return whole


def _run_folder(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run (the --out of spikeprop train)")


def _data_root(made: argparse.ArgumentParser) -> None:
    made.add_argument("--data-root", metavar="FOLDER", help="where the data files are, if they have moved since training")


def _other_data(made: argparse.ArgumentParser) -> None:
    made.add_argument("--data", choices=tuple(READERS), help="another data set of the same shape (default: the run's own)")


def _split(made: argparse.ArgumentParser) -> None:
    splits = ("train", "validation", "test")
    made.add_argument("--split", choices=splits, default="test", help="part of the data (default: test)")


def _weight_bits(made: argparse.ArgumentParser) -> None:
    bits = range(2, 9)
    shown = "2 to 8, signed (default: what the run was trained with, else 8)"
    made.add_argument("--weight-bits", type=int, choices=bits, metavar="N", help=shown)


def _comparison(made: argparse.ArgumentParser) -> None:
    def option(flag: str, text: str, **how: Any) -> None:
        default = COMPARED[flag[2:].replace("-", "_")]
        shown = "" if default is None or default is False else f" (default: {default})"
        made.add_argument(flag, help=text + shown, **how)

    names = f"all, or some of these with commas between: {', '.join(catalogue.RULES)} (default: all)"
    made.add_argument("--rules", default="all", metavar="NAMES", help=names)
    made.add_argument("--seeds", type=_count, default=3, metavar="N", help="runs of each rule, seeds 0 to N - 1 (default: 3)")
    option("--data", f"the data set: {', '.join(READERS)}", metavar="NAME")
    option("--data-root", "where its files are, or set SPIKEPROP_DATA; digits need none", metavar="FOLDER")
    option("--model", "mlp:32,32 (neurons per layer) or conv:20,40-128 (channels, then dense)", metavar="MODEL")
    option("--recurrent", "give every layer synapses from its own spikes, one step late", action="store_const", const=True)
    option("--beta", "share of the membrane that a neuron keeps per step, 0 to 1", type=float, metavar="X")
    option("--threshold", "membrane above which a neuron spikes", type=_positive, metavar="X")
    option("--encoder", f"{', '.join(ENCODERS)}; with settings: poisson:rate=0.5 (default: from the data)", metavar="NAME")
    option("--num-steps", f"time steps per sample, T (default: the data's own, or {DEFAULT_STEPS})", type=_count, metavar="T")
    option("--epochs", "passes over the training data", type=_count, metavar="N")
    option("--batch-size", "samples per update (default: 128, fewer for small data)", type=_count, metavar="N")
    option("--homeostasis", "own: on for SigProp, off for the others; or the same for all", choices=("own", "on", "off"))
    made.add_argument("--jobs", type=_count, default=2, metavar="N", help="processes at a time, one thread each (default: 2)")
    limit = "leave out a rule that is estimated to need more (default: 4096)"
    made.add_argument("--memory-limit", type=_positive, default=4096.0, metavar="MIB", help=limit)
    made.add_argument("--out", type=Path, metavar="FOLDER", help="for compare.json, .csv, .html (default: runs/compare-DATA)")


def _training(made: argparse.ArgumentParser) -> None:
    def option(flag: str, text: str, **how: Any) -> None:
        default = DEFAULTS[flag[2:].replace("-", "_")]
        shown = "" if default is None or default is False or default == [] else f" (default: {default})"
        made.add_argument(flag, help=text + shown, **how)

    option("--data", f"the data set: {', '.join(READERS)}", metavar="NAME")
    option("--data-root", "where its files are, or set SPIKEPROP_DATA; digits need none", metavar="FOLDER")
    option("--full-train", "train on the validation part, too", action="store_const", const=True)
    option("--model", "mlp:256,256 (neurons per layer) or conv:20,40-128 (channels, then dense)", metavar="MODEL")
    option("--recurrent", "give every layer synapses from its own spikes, one step late", action="store_const", const=True)
    option("--beta", "share of the membrane that a neuron keeps per step, 0 to 1", type=float, metavar="X")
    option("--threshold", "membrane above which a neuron spikes", type=_positive, metavar="X")
    option("--rule", f"how to learn: {', '.join(catalogue.RULES)}", metavar="NAME")
    option("--encoder", f"{', '.join(ENCODERS)}; with settings: poisson:rate=0.5 (default: from the data)", metavar="NAME")
    option("--num-steps", f"time steps per sample, T (default: the data's own, or {DEFAULT_STEPS})", type=_count, metavar="T")
    line = "for recordings: every input once per delay, so many steps late, for example 0 8 16 24 (default: as it is)"
    option("--delay-line", line, nargs="+", type=_steps, metavar="N")
    option("--epochs", "passes over the training data", type=_count, metavar="N")
    option("--batch-size", "samples per update (default: 128, fewer for small data)", type=_count, metavar="N")
    option("--learning-rate", "of the Adam optimiser, at the start (default: the rule's own)", type=_positive, metavar="X")
    option("--temperature", "of SigProp's local loss: smaller is sharper (default: 0.07)", type=_positive, metavar="X")
    traces = "shared (one per input, online) or exact (a spike wipes its neuron's) (default: the rule's own)"
    option("--trace", traces, choices=("shared", "exact"))
    option("--homeostasis", "hold every neuron's rate in a band (default: on for SigProp)", choices=("on", "off"))
    option("--truncate", "BPTT: cut the graph, and update, every K time steps (default: never)", type=_count, metavar="K")
    resets = "BPTT, forward-mode, uoro: whether a gradient flows through the reset (default: detached)"
    option("--reset-gradient", resets, choices=get_args(ResetGradient))
    option("--broadcast", "e-prop: the error's weights (default: random)", choices=("symmetric", "random"))
    option("--noise", "standard deviation of noise on the training inputs, for small data", type=_positive, metavar="X")
    option("--shift", "move training pictures by up to N pixels, anew each time", type=_count, metavar="N")
    option("--flip", "mirror training pictures left to right, half the times", action="store_const", const=True)
    option("--drop", "lose each entry of the training inputs with probability P", type=_positive, metavar="P")
    option("--delay", "move training recordings by up to N steps in time", type=_count, metavar="N")
    option("--update-every", "time steps between weight updates (default: once per sample)", type=_count, metavar="K")
    option("--read-every", "SigProp: time steps between readings of the membrane by the local loss", type=_count, metavar="K")
    option("--chunk", "time steps encoded and learned at a time, for long recordings (default: all)", type=_count, metavar="K")
    bits = range(2, 9)
    option("--weight-bits", "train with Loihi's weights of 2 to 8 bits, and its decays", type=int, choices=bits, metavar="N")
    option("--start-from", "a finished run whose trained network to start from; its model is taken over", metavar="RUN")
    option("--seed", "fixes weights, order and random encoders", type=_seed, metavar="N")
    limit = "refuse a rule that is estimated to need more (default: this machine's memory)"
    made.add_argument("--memory-limit", type=_positive, metavar="MIB", help=limit)
    made.add_argument("--out", type=Path, metavar="FOLDER", help="the run folder (default: runs/DATA-RULE)")
    made.add_argument(
        "--parallel",
        choices=("data", "layers"),
        help="spread the training over the processes that torchrun started, by the rows of each batch or by layers: "
        "torchrun --nproc-per-node 2 --no-python spikeprop train --parallel layers ...",
    )
    made.add_argument("--resume", action="store_true", help="continue the run in --out after its last whole epoch")
    made.add_argument("--overwrite", action="store_true", help="replace the run in --out")
