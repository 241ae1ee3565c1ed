"""The folder that runs in Lava by itself: on this Python, and on a fresh Python 3.10 that has only lava-nc."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikeprop.backends import lava, loihi
from spikeprop.backends.lava.bundle import write_bundle
from spikeprop.errors import CheckpointError, InputError
from spikeprop.models import conv
from spikeprop.neuron import LIF

needs_lava = pytest.mark.skipif(not lava.available(), reason=f"Lava is not installed: {lava.install_command()}")
CANDIDATES = (
    "python3.10",
    "~/.pyenv/versions/3.10*/bin/python",
    "~/.local/share/uv/python/*3.10*/bin/python3.10",
    "/usr/bin/python3",
)


@pytest.fixture(scope="module")
def network() -> Any:
    model = conv((1, 6, 6), [3], 4, kernel_size=3, stride=1, pool=2, hidden=[7], neuron=LIF(0.9, 0.5), seed=0)
    model.input_mean += 0.4
    model.readout.weight += torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def bundle(network: Any, tmp_path: Path) -> Path:
    chip = loihi.quantize(network)
    x = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "new" / "bundle"
    write_bundle(chip, folder, loihi.encode(chip, x, 6), network.readout.weight, network.readout.bias)
    return folder


def run(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """From elsewhere, isolated from this repository's modules and environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [python, str(folder / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=240, check=False)


@needs_lava
def test_bundle_runs_on_this_python(bundle: Path, network: Any, tmp_path: Path) -> None:
    checked = run(bundle, "--check")
    assert checked.returncode == 0, checked.stderr
    assert [line.split(", ")[1] for line in checked.stdout.splitlines()] == ["0 differ", "0 differ"]
    assert not any(line.split(": ")[1].startswith("0 ") for line in checked.stdout.splitlines())

    chip = loihi.load(bundle / "network.npz")
    messages = loihi.encode(chip, torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(2)), 5)
    np.savez(tmp_path / "x.npz", messages=messages)
    ran = run(bundle, "--input", str(tmp_path / "x.npz"), "--output", str(tmp_path / "y.npz"))
    assert ran.returncode == 0, ran.stderr
    expected = loihi.simulate(chip, messages, record="all")
    with np.load(tmp_path / "y.npz") as found:
        for number in (1, 2):
            np.testing.assert_array_equal(found[f"spikes{number}"], expected.spikes[number - 1])
            np.testing.assert_array_equal(found[f"membranes{number}"], expected.membranes_after_reset[number - 1])
        np.testing.assert_array_equal(found["counts"], expected.counts[1])
        outputs = network.readout(torch.from_numpy(expected.counts[1]) / 5)
        np.testing.assert_allclose(found["outputs"], outputs, atol=1e-5)
        np.testing.assert_array_equal(found["predictions"], outputs.argmax(1))


@needs_lava
def test_check_goes_red(bundle: Path) -> None:
    with np.load(bundle / "sample.npz") as stored:
        arrays = dict(stored)
    arrays["spikes2"][0, 0, 0] ^= 1
    np.savez(bundle / "sample.npz", **arrays)
    checked = run(bundle, "--check")
    assert checked.returncode == 1 and "layer 2" in checked.stdout and "1 differ" in checked.stdout


@pytest.fixture(scope="session")
def python_3_10(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fresh Python 3.10 environment with lava-nc 0.10.0 and what it asks for. A name proves nothing: candidates are run."""
    found = []
    for pattern in CANDIDATES:
        expanded = os.path.expanduser(pattern)
        paths = sorted(Path("/").glob(expanded.lstrip("/"))) if "*" in expanded else [shutil.which(expanded)]
        for path in filter(None, paths):
            probe = [str(path), "-c", "import sys, ensurepip, venv; print(*sys.version_info[:2])"]
            ran = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
            found.append(f"{path}: {(ran.stdout or ran.stderr).strip().splitlines()[:1]}")
            if ran.stdout.strip() != "3 10":
                continue
            folder = tmp_path_factory.mktemp("python310") / "venv"
            subprocess.run([str(path), "-m", "venv", str(folder)], check=True, timeout=120, capture_output=True)
            install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "lava-nc==0.10.0"]
            installed = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
            if installed.returncode != 0:
                pytest.skip(f"lava-nc 0.10.0 could not be installed under {path}: {installed.stderr.strip()[-300:]}")
            return str(folder / "bin" / "python")
    pytest.skip(f"no Python 3.10 that works was found; tried {found or CANDIDATES}")


def test_bundle_runs_on_a_fresh_python_3_10(bundle: Path, python_3_10: str) -> None:
    modules = "import importlib.util as u; print(*(u.find_spec(name) is None for name in ('torch', 'spikeprop', 'lava')))"
    alone = subprocess.run([python_3_10, "-c", modules], capture_output=True, text=True, cwd="/", timeout=60, check=True)
    assert alone.stdout.split() == ["True", "True", "False"]
    checked = run(bundle, "--check", python=python_3_10)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(" 0 differ") == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"messages": np.zeros((7, 1, 36), int)}, "a sample of 7 steps is longer than the run of 6 steps .*--num-steps 7"),
        ({"messages": np.zeros((5, 36), int)}, r"shape \(5, 36\), expected \[T, B, 36\]"),
        ({"messages": np.zeros((5, 1, 36))}, "messages are float64, expected integers; README.txt says"),
        ({"messages": np.full((5, 1, 36), 999)}, "messages reach from 999 to 999, expected 0 to "),
        ({"x": np.zeros(3)}, "holds x, but no array called messages"),
        (None, "the input .*x.npz does not exist"),
        (b"PK", "is no .npz file of plain arrays, or damaged"),
        (
            b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (), }" + b" " * 60 + b"\n" + b"\0" * 8,
            "no .npz",
        ),
    ],
)
def test_bundle_refuses(bundle: Path, tmp_path: Path, arrays: Any, message: str) -> None:
    path = tmp_path / "x.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays is not None:
        np.savez(path, **arrays)
    ran = run(bundle, "--input", str(path), "--output", str(tmp_path / "y.npz"))
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1
    assert re.search(message, ran.stderr)
    assert not (tmp_path / "y.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "/no/such/folder/y.npz"], "cannot be written: name a file in a folder that exists"),
        (["--output", "/"], "cannot be written: name a file"),
        (["--output", "/tmp/y.npz", "--timeout", "-1"], "--timeout: invalid"),
        (["--output", "/tmp/y.npz", "--num-steps", "0"], "--num-steps: invalid"),
        ([], "give --input and --output, or --check"),
    ],
)
def test_bundle_refuses_before_it_runs(bundle: Path, arguments: list[str], message: str) -> None:
    (bundle / "worker.py").unlink()
    ran = run(bundle, "--input", str(bundle / "sample.npz"), *arguments)
    assert ran.returncode == 2 and message in ran.stderr and "Traceback" not in ran.stderr


@needs_lava
def test_a_hanging_lava_is_ended(bundle: Path) -> None:
    worker = bundle / "worker.py"
    worker.write_text("import time\nprint('building', flush=True)\ntime.sleep(600)\n")
    ran = run(bundle, "--check", "--timeout", "2")
    assert ran.returncode == 1
    assert "did not finish within 2 seconds" in ran.stderr and "building" in ran.stderr


def test_writing_is_all_or_nothing(network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = loihi.quantize(network)
    messages = np.zeros((4, 2, 36), int)
    readout = (network.readout.weight, network.readout.bias)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("x")
    with pytest.raises(InputError, match="taken exists and is not an empty folder; choose another"):
        write_bundle(chip, taken, messages, *readout)
    assert os.listdir(taken) == ["precious"]
    with pytest.raises(InputError, match=r"messages have shape \(4, 2, 3\)"):
        write_bundle(chip, tmp_path / "new", messages[..., :3], *readout)
    with pytest.raises(CheckpointError, match="could not be written"):
        write_bundle(chip, taken / "precious" / "new", messages, *readout)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match=r"new could not be written \(No space left on device\)"):
        write_bundle(chip, tmp_path / "new", messages, *readout)
    assert os.listdir(tmp_path) == ["taken"]


def test_the_readme_says_how_inputs_become_messages(bundle: Path) -> None:
    text = (bundle / "README.txt").read_text()
    facts = json.loads((bundle / "bundle.json").read_text())
    assert f"round((x - 0) / 1 * {facts['message_limit']})" in text
    assert "1 x 6 x 6" in text and "lava-nc==0.10.0" in text and facts["num_steps"] == 6
