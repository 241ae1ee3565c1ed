"""Runs this folder's network in Intel's Lava, in the chip's integers. Needs lava-nc 0.10.0 and numpy, nothing else.

    python run.py --input x.npz --output y.npz      x: messages [T, B, features]; y: what every layer did
    python run.py --check                           run the stored sample and compare every spike

README.txt beside this file says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import guard  # type: ignore[import-not-found]  # noqa: E402  (stands beside this file in a bundle)


class Refusal(Exception):
    """Bad input: one line, exit status 2."""


def read(path: Path, what: str) -> dict[str, Any]:
    """All arrays of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError:
        raise Refusal(f"{what} {path} does not exist") from None
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise Refusal(f"{what} {path} is no .npz file of plain arrays, or damaged ({error})") from None


def check(messages: Any, facts: dict[str, Any], num_steps: int) -> Any:
    """The messages, if this network can take them."""
    features, limit = facts["features"], facts["message_limit"]
    if messages.ndim != 3 or messages.shape[2] != features or 0 in messages.shape:
        raise Refusal(f"messages have shape {messages.shape}, expected [T, B, {features}] with at least one step and sample")
    if messages.dtype.kind not in "biu":
        raise Refusal(f"messages are {messages.dtype}, expected integers; README.txt says how to make them from real inputs")
    if messages.min() < 0 or messages.max() > limit:
        raise Refusal(f"messages reach from {messages.min()} to {messages.max()}, expected 0 to {limit}")
    if len(messages) > num_steps:
        raise Refusal(
            f"a sample of {len(messages)} steps is longer than the run of {num_steps} steps that this network was made for; "
            f"cut it, or allow it with --num-steps {len(messages)}"
        )
    return messages.astype(np.int32)


def run(messages: Any, timeout: float) -> dict[str, Any]:
    """Every layer's spikes, and what the host's readout makes of the last layer's counts."""
    with tempfile.TemporaryDirectory(prefix="lava-bundle-") as name:
        folder = Path(name)
        np.savez(folder / "messages.npz", messages=messages, membranes=np.array(True))
        guard.run_worker(HERE / "worker.py", folder, HERE / "network.npz", timeout)
        found = read(folder / "out.npz", "the result")
    readout, layers = read(HERE / "readout.npz", "the readout"), sum(name.startswith("spikes") for name in found)
    counts = found[f"spikes{layers}"].sum(0, dtype=np.int64)
    outputs = counts / len(messages) @ readout["weight"].T + readout["bias"]
    return {**found, "counts": counts, "outputs": outputs, "predictions": outputs.argmax(1)}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> int:
    """Print, layer by layer, how many spikes differ from the stored ones. Returns how many do."""
    total = 0
    for number in range(1, 1 + sum(name.startswith("spikes") for name in expected)):
        stored = expected[f"spikes{number}"]
        differing = int((found[f"spikes{number}"] != stored).sum())
        print(f"layer {number}: {int(stored.sum())} spikes, {differing} differ")
        total += differing
    return total


def positive(text: str) -> float:
    """A command-line number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def whole(text: str) -> int:
    """A command-line number of at least 1."""
    return int(positive(text if text.isdecimal() else "no number"))


def write(path: Path, arrays: dict[str, Any]) -> None:
    """An .npz file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise Refusal(f"{path} could not be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    """Run the input, or the stored sample; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, metavar="X.npz", help="holds messages [T, B, features], integers")
    parser.add_argument("--output", type=Path, metavar="Y.npz", help="gets spikes, membranes, counts, outputs, predictions")
    parser.add_argument("--check", action="store_true", help="run the stored sample and compare every spike")
    parser.add_argument(
        "--num-steps",
        type=whole,
        metavar="T",
        help="the longest sample to allow (default: as in training)",
    )
    parser.add_argument("--timeout", type=positive, default=600.0, metavar="S", help="end Lava after S seconds (default: 600)")
    arguments = parser.parse_args()
    if arguments.check == (arguments.input is not None) or (arguments.input is None) != (arguments.output is None):
        parser.error("give --input and --output, or --check")
    try:
        facts = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
        path = HERE / "sample.npz" if arguments.check else arguments.input
        arrays = read(path, "the input")
        if "messages" not in arrays:
            raise Refusal(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, but no array called messages")
        if arguments.output is not None and (arguments.output.is_dir() or not arguments.output.resolve().parent.is_dir()):
            raise Refusal(f"{arguments.output} cannot be written: name a file in a folder that exists")
        messages = check(arrays["messages"], facts, arguments.num_steps or facts["num_steps"])
        found = run(messages, arguments.timeout)
        if arguments.check:
            return 1 if compare(found, arrays) else 0
        write(arguments.output, found)
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except guard.WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
