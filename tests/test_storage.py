"""Files: round trips, and what happens to damaged, foreign, truncated ones and full disks."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import spikeprop as sp
from spikeprop.errors import CheckpointError
from spikeprop.models import conv, mlp
from spikeprop.storage import atomic_write, write_text


def trained() -> sp.Network:
    network = conv(
        (1, 8, 8),
        [3],
        10,
        kernel_size=3,
        stride=1,
        pool=2,
        hidden=[12],
        neuron=sp.LIF(0.8, 0.7, alpha=0.2, reset_mechanism="subtract"),
    )
    data = sp.data.load("digits")
    sp.fit(network, sp.SigProp(), data, num_steps=3, epochs=1, progress=False)
    return network


def test_a_saved_network_comes_back_the_same(tmp_path: Path) -> None:
    network = trained()
    sp.save(network, tmp_path / "network.safetensors")
    again = sp.load(str(tmp_path / "network.safetensors"))
    assert network.state_dict().keys() == again.state_dict().keys()
    test = sp.data.load("digits").test
    assert sp.evaluate(network, test, 3) == sp.evaluate(again, test, 3)
    assert repr(network) == repr(again)


def test_a_network_in_double_precision_stays_so(tmp_path: Path) -> None:
    sp.save(mlp((4,), [3], 2).double(), tmp_path / "network.safetensors")
    assert sp.load(tmp_path / "network.safetensors").readout.weight.dtype == torch.float64


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        sp.load(path)
    with pytest.raises(CheckpointError, match="is not a file"):
        sp.load(tmp_path)
    sp.save(mlp((4,), [3], 2), path)
    whole = path.read_bytes()
    for cut in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"network.safetensors is damaged or not a safetensors file"):
            sp.load(path)
    path.write_bytes(b"\x80\x04" + bytes(500))  # a pickle is not even looked into
    with pytest.raises(CheckpointError, match="damaged or not a safetensors"):
        sp.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="spikeprop did not write"):
        sp.load(path)
    save_file({"weight": torch.zeros(3)}, path, {"spikeprop": '{"format": 99}'})
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1"):
        sp.load(path)
    for header in ("not json", "[]", '{"format": 1}', '{"format": 1, "network": {"layers": 3}}'):
        save_file({"weight": torch.zeros(3)}, path, {"spikeprop": header})
        with pytest.raises(CheckpointError, match=r"network\.safetensors"):
            sp.load(path)


def test_tensors_that_do_not_fit_the_header_are_refused(tmp_path: Path) -> None:
    from spikeprop.storage import write_tensors

    network = mlp((4,), [3], 2)
    tensors = network.state_dict()
    del tensors["layers.0.bias"]
    write_tensors(tmp_path / "network.safetensors", tensors, {"network": network.config()})
    with pytest.raises(CheckpointError, match=r"do not fit the architecture.*layers\.0\.bias"):
        sp.load(tmp_path / "network.safetensors")


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "network.safetensors"
    sp.save(mlp((4,), [3], 2, seed=1), path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        CheckpointError, match=r"could not be written \(No space left on device\); what stood there is unchanged"
    ):
        sp.save(mlp((4,), [3], 2, seed=2), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        write_text(tmp_path / "file" / "below.json", "{}")


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    script = textwrap.dedent(f"""
        import spikeprop as sp
        from spikeprop.models import mlp
        network = mlp((300,), [300], 2)
        while True:
            sp.save(network, {str(path)!r})
            print(flush=True)
    """)
    for delay in (0.0, 0.02):
        writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait(10)
        writer.stdout.close()
        assert sp.load(path).outputs == 2


def test_an_exception_in_the_block_changes_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")

    def fail() -> None:
        with atomic_write(tmp_path / "a.json") as temporary:
            temporary.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / "a.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]
