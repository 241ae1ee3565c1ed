"""The integer simulator against Lava on random networks: not one spike, not one membrane may differ.

    python benchmarks/loihi_parity.py

Networks of 1 to 5 layers, dense and convolutional, with registers drawn over their whole ranges: several decays, biases,
currents that wrap, membranes that saturate, silence and constant spiking; several samples in one run, apart by LIFReset. Each
goes through the compiled simulator, its plain reference and Lava's fixed-point models. A mismatch is shrunk to the smallest
network that still shows it, which is printed, and nothing is written. Each Lava run takes about two seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, header, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spikeprop.backends import lava
from spikeprop.backends.loihi import Convolution, LoihiLayer, LoihiNetwork, Simulation, simulate
from spikeprop.backends.loihi.network import ALIGNMENT_SHIFT, DECAY_LIMIT, REGISTER_LIMIT

Case = tuple[LoihiNetwork, Any]


@st.composite
def cases(draw: st.DrawFn, *, most_layers: int = 5, most_steps: int = 60) -> Case:
    """A network and its messages ``[T, B, features]``; structure is drawn so that it shrinks, numbers come from a seed."""
    graded = draw(st.booleans())
    shape: tuple[int, ...] = (draw(st.integers(2, 40)),)
    if draw(st.booleans()):
        shape = (draw(st.sampled_from([1, 2, 4])), draw(st.integers(3, 9)), draw(st.integers(3, 9)))
    first, layers = shape, []
    for _ in range(draw(st.integers(1, most_layers))):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        layer = (
            _convolution(draw, rng, shape)
            if len(shape) == 3 and draw(st.sampled_from([True, True, False]))
            else _dense(draw, rng, shape)
        )
        layers.append(layer)
        shape = layer.output_shape
    network = LoihiNetwork(tuple(layers), first, "graded" if graded else "spikes", 8 if graded else 0)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = (draw(st.integers(1, most_steps)), draw(st.integers(1, 4)), math.prod(first))
    active = rng.random(size) < draw(st.sampled_from([1.0, 0.5, 0.1]))
    return network, rng.integers(0, network.message_limit + 1, size) * active


def _dense(draw: st.DrawFn, rng: np.random.Generator, shape: tuple[int, ...]) -> LoihiLayer:
    outputs, bits = draw(st.integers(1, 40)), draw(st.sampled_from([8, 4, 2]))
    weight = _weights(draw, rng, (outputs, math.prod(shape)), bits)
    exponent = draw(st.sampled_from([0, -3, 4]))
    return LoihiLayer.build(weight, weight_bits=bits, weight_exp=exponent, **_neurons(draw, rng, outputs))


def _convolution(draw: st.DrawFn, rng: np.random.Generator, shape: tuple[int, ...]) -> LoihiLayer:
    channels, height, width = shape
    groups = draw(st.sampled_from([group for group in (1, 2, channels) if channels % group == 0]))
    kernel = (draw(st.integers(1, min(3, height))), draw(st.integers(1, min(3, width))))
    stride, padding = ((draw(st.integers(low, 2)), draw(st.integers(low, 2))) for low in (1, 0))
    convolution = Convolution((channels, height, width), stride, padding, groups)
    weight = _weights(draw, rng, (groups * draw(st.integers(1, 3)), channels // groups, *kernel), 8)
    neurons = math.prod(convolution.output_shape(weight.shape))
    return LoihiLayer.build(weight, convolution=convolution, **_neurons(draw, rng, neurons))


def _weights(draw: st.DrawFn, rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> Any:
    """On the grid of ``bits``; sometimes without a negative one, which Lava must not take for unsigned."""
    step = 2 ** (9 - bits)
    return rng.integers(0 if draw(st.booleans()) else -256 // step, 256 // step, shape) * step


def _neurons(draw: st.DrawFn, rng: np.random.Generator, count: int) -> dict[str, Any]:
    """Registers, one for all neurons or one each."""
    size = draw(st.sampled_from([None, count]))
    return {
        "du": rng.integers(0, DECAY_LIMIT, size) if draw(st.booleans()) else DECAY_LIMIT,
        "dv": rng.integers(0, draw(st.sampled_from([1, 500, 4096])), size),
        "vth": rng.integers(0, draw(st.sampled_from([200, 20_000, 131_072])), size),
        "bias_mant": rng.integers(-4096, 4096, count),
        "bias_exp": rng.integers(0, draw(st.sampled_from([1, 4, 8])), count),
    }


def check(case: Case) -> tuple[Simulation, list[str]]:
    """Run a case three ways. Raises AssertionError at the first difference; returns the result and what it exercised."""
    network, messages = case
    ours = simulate(network, messages, record="all")
    plain = simulate(network, messages, record="all", engine="reference")
    theirs = lava.run(network, messages, membranes=True, timeout=180)
    for index in range(len(network.layers)):
        for name in ("spikes", "membranes", "currents", "counts"):
            np.testing.assert_array_equal(getattr(ours, name)[index], getattr(plain, name)[index], f"{name}, layer {index + 1}")
        np.testing.assert_array_equal(ours.spikes[index], theirs.spikes[index], f"spikes in Lava, layer {index + 1}")
        after = ours.membranes_after_reset[index]
        np.testing.assert_array_equal(after, theirs.membranes[index], f"membranes in Lava, layer {index + 1}")
    return ours, features(case, ours)


def features(case: Case, result: Simulation) -> list[str]:
    """What a case exercises, for the count that says the random networks are not all harmless."""
    network, messages = case
    found = ["graded inputs" if network.inputs == "graded" else "spikes as inputs", f"{len(network.layers)} layers"]
    found += ["several samples"] * (messages.shape[1] > 1)
    for name, layers in (
        ("convolution", [layer.convolution is not None for layer in network.layers]),
        ("groups", [layer.convolution is not None and layer.convolution.groups > 1 for layer in network.layers]),
        ("synaptic memory", [bool(np.any(layer.du != DECAY_LIMIT)) for layer in network.layers]),
        ("saturated membrane", [bool((np.abs(values) == REGISTER_LIMIT - 1).any()) for values in result.membranes]),
        ("rate above 0.5", [bool(spikes.mean() > 0.5) for spikes in result.spikes]),
        ("spikes in the last layer", [bool(result.spikes[-1].any())]),
        ("current that could wrap", [_could_wrap(layer) for layer in network.layers]),
    ):
        found += [name] * any(layers)
    return found


def _could_wrap(layer: LoihiLayer) -> bool:
    largest = np.abs(layer.weight).reshape(len(layer.weight), -1).sum(1).max() * 2.0**layer.weight_exp
    return bool(largest * 2**ALIGNMENT_SHIFT * 4096 / (np.min(layer.du) + 1) > REGISTER_LIMIT)


def search(count: int, record: Callable[[Case, list[str]], None]) -> None:
    """Check ``count`` cases, the same ones every time; a failure is shrunk and raised."""

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(cases())
    def one(case: Case) -> None:
        record(case, check(case)[1])

    one()


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS / "loihi-parity.json")
    arguments = parser.parse_args(argv)
    if not lava.available():
        parser.error(f"Lava is not installed: {lava.install_command()}")
    seen: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    started = time.perf_counter()

    def record(case: Case, found: list[str]) -> None:
        network, messages = case
        seen.update(found)
        numbers = messages.shape[0] * messages.shape[1] * sum(layer.outputs for layer in network.layers)
        totals.update({"networks": 1, "layers": len(network.layers), "compared_spikes": numbers, "compared_membranes": numbers})
        print(f"\r{totals['networks']} networks", end="", flush=True, file=sys.stderr)

    search(arguments.networks, record)
    summary = {**totals, "differing_spikes": 0, "differing_membranes": 0, "exercised": dict(sorted(seen.items()))}
    write_json(arguments.out, header("loihi_parity", argv) | {"summary": summary, "seconds": time.perf_counter() - started})
    print(f"\n{totals['networks']} networks, {totals['compared_spikes']} spikes and as many membranes: none differs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
