"""Against Lava itself: the same integers in, not one spike or membrane different; and no process left behind, ever."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikeprop.backends import lava
from spikeprop.backends.loihi import Convolution, LoihiLayer, LoihiNetwork, encode, quantize, simulate
from spikeprop.backends.parity import compare
from spikeprop.errors import BackendError, UnsupportedError
from spikeprop.models import mlp

needs_lava = pytest.mark.skipif(not lava.available(), reason=f"Lava is not installed: {lava.install_command()}")


def random_network(seed: int, depth: int, inputs: Any) -> LoihiNetwork:
    """Registers over their whole ranges: currents wrap, membranes saturate, layers are quiet or spike all the time."""
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(5, 40, depth + 1)]
    layers = []
    for index, (before, n) in enumerate(itertools.pairwise(sizes)):
        per_neuron = n if rng.random() < 0.5 else None
        bits = int(rng.choice([8, 8, 4]))
        step = 2 ** (9 - bits)
        # Without a negative weight in the first layer, Lava would choose another sign mode if it were not told.
        weight = rng.integers(0 if index == 0 else -256 // step, 256 // step, (n, before)) * step
        layers.append(
            LoihiLayer.build(
                weight,
                weight_bits=bits,
                weight_exp=int(rng.choice([0, -3, 4])),
                du=rng.choice([4095, rng.integers(0, 4095)], per_neuron),
                dv=rng.integers(0, 4096, per_neuron),
                vth=rng.integers(0, rng.choice([2000, 131072]), per_neuron),
                bias_mant=rng.integers(-4096, 4096, n),
                bias_exp=rng.integers(0, rng.choice([3, 8]), n),
            )
        )
    return LoihiNetwork(tuple(layers), (sizes[0],), inputs, 8 if inputs == "graded" else 0)


def assert_equal_to_lava(network: LoihiNetwork, messages: Any) -> Any:
    ours = simulate(network, messages, record="all")
    theirs = lava.run(network, messages, membranes=True, timeout=120)
    assert [layer["differing"] for layer in compare(theirs.spikes, ours.spikes)] == [0] * len(network.layers)
    for left, right in zip(theirs.membranes, ours.membranes_after_reset, strict=True):
        np.testing.assert_array_equal(left, right)
    return ours


@needs_lava
@pytest.mark.parametrize(("seed", "depth", "inputs"), [(0, 2, "spikes"), (1, 3, "graded"), (2, 4, "spikes"), (5, 4, "graded")])
def test_simulator_equals_lava(seed: int, depth: int, inputs: str) -> None:
    """100 steps, three samples in one run, each from rest."""
    network = random_network(seed, depth, inputs)
    messages = np.random.default_rng(seed).integers(0, network.message_limit + 1, (100, 3, *network.input_shape))
    ours = assert_equal_to_lava(network, messages)
    assert sum(spikes.sum() for spikes in ours.spikes) > 500
    assert inputs != "graded" or max(membrane.max() for membrane in ours.membranes) == 2**23 - 1


@needs_lava
def test_random_networks_equal_lava(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of the networks of benchmarks/loihi_parity.py, which draws hundreds: convolutions, groups, dense layers, 1 to 5."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    seen: set[str] = set()
    importlib.import_module("loihi_parity").search(8, lambda _, found: seen.update(found))
    assert {"convolution", "several samples", "spikes in the last layer"} <= seen


@needs_lava
def test_samples_of_a_single_step_stay_apart() -> None:
    """The reset of every layer falls on every step; what a deeper layer sees then is still the sample's own."""
    network = random_network(7, 3, "spikes")
    assert_equal_to_lava(network, np.random.default_rng(7).integers(0, 2, (1, 20, *network.input_shape)))


@needs_lava
def test_quantised_model_equals_lava() -> None:
    model = mlp((1, 8, 8), [64, 32], 10, seed=0)
    model.input_mean += 0.3
    chip = quantize(model)
    ours = assert_equal_to_lava(chip, encode(chip, torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 8))
    assert all(spikes.any() for spikes in ours.spikes)


@needs_lava
def test_pictures_equal_lava() -> None:
    """The axes of pictures, which Lava counts the other way round, between all kinds of layers, with registers per neuron."""
    rng = np.random.default_rng(0)
    first = Convolution((2, 7, 5), (1, 2), (2, 1), 2)
    second = Convolution(first.output_shape((4, 1, 3, 2)), (2, 1), (0, 1))
    n = math.prod(second.input_shape)
    layers = [LoihiLayer.build(rng.integers(-128, 128, (4, 1, 3, 2)) * 2, vth=rng.integers(0, 900, n), convolution=first)]
    layers.append(LoihiLayer.build(rng.integers(-128, 128, (3, 4, 3, 2)) * 2, vth=500, dv=300, convolution=second))
    third = Convolution((3, 4, 2), padding=(1, 1))
    layers.append(
        LoihiLayer.build(rng.integers(-128, 128, (24, layers[-1].outputs)) * 2, vth=600, dv=rng.integers(0, 4096, 24))
    )
    layers.append(LoihiLayer.build(rng.integers(-128, 128, (2, 3, 3, 3)) * 2, vth=100, convolution=third))
    network = LoihiNetwork(tuple(layers), (2, 7, 5), "graded", 4)
    ours = assert_equal_to_lava(network, rng.integers(0, 16, (20, 3, 70)))
    assert all(spikes.any() for spikes in ours.spikes)


NETWORK = LoihiNetwork((LoihiLayer.build([[2, 4]], vth=1),), (2,))
MESSAGES = np.zeros((3, 1, 2), int)


def stand_in(tmp_path: Path, body: str, *, real: bool = False) -> Path:
    """A script to run in the worker's place: notes its process group, starts a child (or loads the real one), then ``body``."""
    load = f"import importlib.util\nspec = importlib.util.spec_from_file_location('worker', {str(lava.WORKER)!r})\n"
    load += "worker = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(worker)\n"
    child = "import subprocess\nsubprocess.Popen(['sleep', '600'])\n"
    path = tmp_path / "stand_in.py"
    note = f"import os, sys, time\nopen({str(tmp_path / 'group')!r}, 'w').write(str(os.getpgrp()))\n"
    path.write_text(note + (load if real else child) + textwrap.dedent(body))
    return path


def living(group: int) -> list[int]:
    """Processes of the group that still run (not those that have ended and wait to be reaped)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(process_group) == group and state not in "ZX":
                found.append(int(entry.name))
    return found


def assert_nothing_left(tmp_path: Path) -> None:
    group = int((tmp_path / "group").read_text())
    deadline = time.monotonic() + 5
    while living(group):
        assert time.monotonic() < deadline, f"processes of group {group} are left: {living(group)}"
        time.sleep(0.02)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for left-over processes in /proc")


@pytest.fixture
def lava_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the runner that never reach Lava."""
    monkeypatch.setattr(lava, "available", lambda: True)


@needs_proc
@pytest.mark.usefixtures("lava_is_there")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('building', flush=True)\ntime.sleep(600)", r"did not finish within 2 seconds.*raise timeout(?s:.*)building"),
        ("raise RuntimeError('something in Lava')", r"failed with exit status 1(?s:.*)RuntimeError: something in Lava"),
        ("os.kill(os.getpid(), 9)", "the Lava run was killed by SIGKILL"),
        ("print('done')", r"ended without a result(?s:.*)done"),
        ("open('out.npz', 'wb').write(b'PK')", "ended without a result"),
    ],
    ids=["hangs", "fails", "killed", "no result", "bad result"],
)
def test_failures_are_reported_and_nothing_is_left(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        lava.run(NETWORK, MESSAGES, timeout=2, _worker=stand_in(tmp_path, body))
    assert_nothing_left(tmp_path)


@needs_proc
@pytest.mark.usefixtures("lava_is_there")
def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    # A suite started in the background inherits an ignored Ctrl-C, and Python then raises no KeyboardInterrupt.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    body = "import signal\ntime.sleep(0.5)\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(600)"
    try:
        with pytest.raises(KeyboardInterrupt):
            lava.run(NETWORK, MESSAGES, timeout=30, _worker=stand_in(tmp_path, body))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert_nothing_left(tmp_path)


BROKEN = """
    original = worker.build
    def build(*arguments):
        from lava.proc.io import source
        feed, configuration, *recordings = original(*arguments)
        class Broken(source.PySendModelFixed):
            def run_spk(self):
                if self.time_step == 2:
                    {fault}
                super().run_spk()
        configuration.exception_proc_model_map[source.RingBuffer] = Broken
        return feed, configuration, *recordings
    worker.build = build
    try:
        worker.main(*sys.argv[1:4])
    except BaseException:
        import traceback
        worker.fail(traceback.format_exc())
"""


@needs_lava
@needs_proc
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise ValueError('in a Lava process')", r"exit status 1(?s:.*)ValueError: in a Lava process"),
        ("os.kill(os.getpid(), 9)", r"exit status 1(?s:.*)ended by itself, without a traceback"),
        ("time.sleep(600)", "did not finish within 8 seconds"),
    ],
    ids=["raises", "is killed", "hangs"],
)
def test_a_process_inside_lava_fails(tmp_path: Path, fault: str, message: str) -> None:
    """Lava alone would wait for it for ever. A failure is noticed at once; only a process that hangs needs the time-out."""
    started = time.monotonic()
    worker = stand_in(tmp_path, BROKEN.replace("{fault}", fault), real=True)
    with pytest.raises(BackendError, match=message):
        lava.run(NETWORK, MESSAGES, timeout=8 if "sleep" in fault else 60, _worker=worker)
    assert time.monotonic() - started < 20
    assert_nothing_left(tmp_path)


@needs_lava
@needs_proc
def test_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    worker = stand_in(tmp_path, "worker.follow_parent()\nworker.main(*sys.argv[1:4])", real=True)
    script = f"""
        import numpy as np
        from pathlib import Path
        from spikeprop.backends import lava
        from spikeprop.backends.loihi import Convolution, LoihiLayer, LoihiNetwork
        network = LoihiNetwork((LoihiLayer.build([[2, 4]], vth=1),), (2,))
        lava.run(network, np.zeros((100, 10000, 2), int), _worker=Path({str(worker)!r}))
    """
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "TMPDIR": str(tmp_path),
    }
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "group").exists() or len(living(int((tmp_path / "group").read_text() or 0))) < 5:
            assert parent.poll() is None and time.monotonic() < deadline, "Lava did not start"
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert_nothing_left(tmp_path)


def test_missing_lava_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lava.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    with pytest.raises(
        BackendError, match=r"Lava is not installed.*\n  pip install --no-deps --ignore-requires-python lava-nc==0.10.0"
    ):
        lava.run(NETWORK, MESSAGES)
    monkeypatch.setattr(sys, "version_info", (3, 10, 14))
    assert lava.install_command() == "pip install lava-nc==0.10.0"


@pytest.mark.parametrize(
    ("convolution", "kernel", "message"),
    [
        (Convolution((1, 2, 126), padding=(0, 1)), (1, 1, 2, 2), "layer 1: its padded picture of 128 exceeds 127, the most"),
        (Convolution((128, 2, 2), groups=128), (128, 1, 2, 2), "layer 1: its number of groups of 128 exceeds 127"),
    ],
)
def test_geometry_beyond_lavas_bytes_is_refused(convolution: Convolution, kernel: tuple[int, ...], message: str) -> None:
    network = LoihiNetwork((LoihiLayer.build(np.full(kernel, 2), vth=1, convolution=convolution),), convolution.input_shape)
    with pytest.raises(UnsupportedError, match=message):
        lava.run(network, np.zeros((1, 1, math.prod(convolution.input_shape)), int))


def test_importing_the_runner_does_not_import_lava() -> None:
    code = "import sys, spikeprop.backends.lava as lava; lava.available(); print([m for m in sys.modules if m[:5] == 'lava.'])"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout == "[]\n"
