"""Training on several processes against the same training on one."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from parallel_worker import STEPS, data_of, network_of, train

import spikeprop as sp
from spikeprop import parallel
from spikeprop.catalogue import RULES, configure
from spikeprop.errors import InputError
from spikeprop.models import mlp
from spikeprop.rules import sigprop
from spikeprop.rules.base import Answer
from spikeprop.storage import read_tensors
from spikeprop.team import Share, part_of

WORKER = Path(__file__).parent / "parallel_worker.py"


def processes(size: int, folder: Path, cases: list[dict], **more: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), json.dumps(cases)],
            env={**common, "RANK": str(rank), **more},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(running: list[subprocess.Popen], seconds: float = 240.0) -> list[str]:
    """What each said at its end."""
    try:
        return [process.communicate(timeout=seconds)[1] for process in running]
    finally:
        for process in running:
            process.kill()


CASES = [
    {"name": "data", "parallel": "data", "model": "mlp", "rule": "surrogate", "batch": 8},
    {"name": "uneven", "parallel": "data", "model": "mlp", "rule": "windows", "batch": 10},
    {"name": "maps", "parallel": "data", "model": "conv", "rule": "surrogate", "batch": 8, "random": True},
    {"name": "bptt", "parallel": "data", "model": "mlp", "rule": "bptt", "batch": 8},
    {"name": "layers", "parallel": "layers", "model": "mlp", "rule": "adam", "batch": 8},
    {"name": "windows", "parallel": "layers", "model": "mlp", "rule": "windows", "batch": 10},
    {"name": "stretches", "parallel": "layers", "model": "mlp", "rule": "windows", "batch": 10, "chunk": 3},
    {"name": "readings", "parallel": "layers", "model": "mlp", "rule": "readings", "batch": 10},
    {"name": "layers-maps", "parallel": "layers", "model": "conv", "rule": "adam", "batch": 8, "precision": "medium"},
    {"name": "begun", "parallel": "layers", "model": "mlp", "rule": "adam", "batch": 8, "folder": "run", "random": True},
]


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_find_what_one_finds(size, tmp_path) -> None:
    running = processes(size, tmp_path, CASES)
    alone = {case["name"]: train(case, None) for case in CASES}  # while they are at work
    assert ended(running) == [""] * size
    torch.set_float32_matmul_precision("highest")
    for case in CASES:
        network, history = alone[case["name"]]
        for rank in range(size):
            tensors, header = read_tensors(tmp_path / f"{case['name']}-{rank}.safetensors")
            for name, wanted in network.state_dict().items():
                if case["parallel"] == "layers":
                    assert torch.equal(tensors[name], wanted), (case, rank, name)
                else:
                    torch.testing.assert_close(tensors[name], wanted, rtol=1e-7, atol=1e-10, msg=f"{case} {rank} {name}")
            for found, expected in zip(header["history"]["epochs"], history.epochs, strict=True):
                for key in ("loss", "dead", "rate", "train_accuracy", "validation_accuracy"):
                    assert found[key] == pytest.approx(expected[key], rel=1e-3), (case, rank, key)
    other, _ = train(CASES[-1], None, tmp_path / "one")  # the checkpoint of the last is that of one process
    read, _ = read_tensors(tmp_path / "run" / "checkpoint.safetensors")
    expected, _ = read_tensors(tmp_path / "one" / "checkpoint.safetensors")
    assert read.keys() == expected.keys()
    for name, wanted in expected.items():
        assert torch.equal(read[name], wanted), name
    assert torch.equal(other.readout.weight, alone["begun"][0].readout.weight)


class Killed(Exception):
    pass


@pytest.mark.parametrize("rule", ["adam", "thresholds"])
def test_a_run_goes_on_with_another_number_of_processes(rule, tmp_path, monkeypatch) -> None:
    case = {"name": "more", "parallel": "layers", "model": "mlp", "rule": rule, "batch": 8, "epochs": 3, "folder": "run"}
    whole, _ = train(case, None)
    # Two processes, then one.
    first = processes(2, tmp_path, [{**case, "folder": "fewer", "dies": True}])
    said = ended(first)
    assert first[0].returncode == 9 and "holds the first 1 epoch(s)" in said[1]
    fewer, history = train(case, None, tmp_path / "fewer")
    assert len(history.epochs) == 3
    # One process, then two.
    original = sp.training._save

    def save_then_die(*arguments: object) -> None:
        original(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sp.training, "_save", save_then_die)
        with pytest.raises(Killed):
            train(case, None, tmp_path / "run")
    assert ended(processes(2, tmp_path, [case])) == ["", ""]
    for rank in range(2):
        more, header = read_tensors(tmp_path / f"more-{rank}.safetensors")
        assert len(header["history"]["epochs"]) == 3
        for name, wanted in whole.state_dict().items():
            assert torch.equal(more[name], wanted), name
            assert torch.equal(fewer.state_dict()[name], wanted), name


@pytest.mark.parametrize("kind", ["data", "layers"])
def test_a_lost_process_ends_the_run_and_leaves_the_checkpoint(kind, tmp_path) -> None:
    case = {"name": "lost", "parallel": kind, "model": "mlp", "rule": "adam", "batch": 8, "folder": "run", "epochs": 100_000}
    running, checkpoint = processes(3, tmp_path, [case]), tmp_path / "run" / "checkpoint.safetensors"
    for _ in range(1200):
        if checkpoint.exists() or running[0].poll() is not None:
            break
        time.sleep(0.1)
    assert checkpoint.exists()
    running[1].kill()
    said = ended(running, 60.0)
    for rank in (0, 2):
        assert running[rank].returncode not in (0, None)
        assert f"process {rank} of 3 lost another one" in said[rank]
        assert f"{checkpoint} holds the first " in said[rank] and "start all processes again with resume=True" in said[rank]
    tensors, header = read_tensors(checkpoint)
    assert len(header["history"]) >= 1 and all(tensor.isfinite().all() for tensor in tensors.values())


def command(*options: str, processes: int | None = None) -> subprocess.CompletedProcess:
    folder = Path(sys.executable).parent
    started = [] if processes is None else [str(folder / "torchrun"), f"--nproc-per-node={processes}", "--no-python"]
    settings = ["--model", "mlp:24,16", "--epochs", "2", "--seed", "7"]
    return subprocess.run(
        [*started, str(folder / "spikeprop"), "train", "--json", *settings, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240.0,
    )


def test_the_command_line_trains_the_same_network_on_two_processes(tmp_path) -> None:
    several = command("--parallel", "layers", "--out", str(tmp_path / "two"), processes=2)
    one = command("--out", str(tmp_path / "one"))
    assert several.returncode == one.returncode == 0, several.stderr
    assert json.loads(several.stdout)["accuracy"] == json.loads(one.stdout)["accuracy"]  # one line, of the first process
    assert (tmp_path / "two" / "network.safetensors").read_bytes() == (tmp_path / "one" / "network.safetensors").read_bytes()
    # What cannot be spread is refused before the run in its way is replaced.
    before = (tmp_path / "two" / "result.json").read_bytes()
    refused = command("--parallel", "layers", "--out", str(tmp_path / "two"), "--overwrite", processes=3)
    assert refused.returncode != 0 and "3 processes cannot share 2 layers" in refused.stderr
    assert (tmp_path / "two" / "result.json").read_bytes() == before
    alone = command("--parallel", "data", "--out", str(tmp_path / "three"))
    assert alone.returncode == 2 and "start them with: torchrun" in alone.stderr


def test_answers_to_stretches_are_not_kept() -> None:
    """One per stretch would take memory that grows with the length of a sequence."""
    answers, alive = parallel._Answers(), []
    for steps in (2, 3, 5):
        answer = Answer(torch.full((4, 3), float(steps)), torch.tensor([1.0, steps]), [torch.full((6,), float(steps))])
        alive.append(weakref.ref(answer.activity[0]))
        answers.add(steps, answer)
    del answer
    assert [kept() is not None for kept in alive] == [False, False, False]
    found = answers.mean()
    assert torch.equal(found.outputs, torch.full((4, 3), 5.0))
    torch.testing.assert_close(found.loss, torch.tensor([1.0, 3.8]))
    torch.testing.assert_close(found.activity[0], torch.full((6,), 3.8))


class SharedBetweenThreads(Share):
    """A share whose processes are threads."""

    parts: list[torch.Tensor]
    barrier: threading.Barrier

    def add_up(self, numbers: torch.Tensor) -> None:
        self.parts.append(numbers.clone())
        self.barrier.wait(60.0)
        total = torch.stack(self.parts).sum(0)
        self.barrier.wait(60.0)
        self.parts.clear()
        self.barrier.wait(60.0)
        numbers.copy_(total)


def after_two_updates(rule, size: int) -> dict[str, torch.Tensor]:
    """A network's tensors, where ``size`` threads with its copies shared two batches of eleven."""
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.rand(STEPS, 11, 1, 8, 8, generator=generator), torch.arange(11) % 3) for _ in range(2)]
    parts, barrier, found, failed = [], threading.Barrier(size), [], []

    def learn(rank: int) -> None:
        try:
            network = mlp((1, 8, 8), [20, 16], 3, neuron=sp.LIF(0.9, 0.5), seed=3)
            network.readout.weight.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(2)))
            own = part_of(11, rank, size)
            state = rule.initial_state(network.double(), generator=torch.Generator().manual_seed(0))
            if size > 1:
                state.share = SharedBetweenThreads(own.stop - own.start, 11)
                for name, value in (("parts", parts), ("barrier", barrier)):
                    object.__setattr__(state.share, name, value)
            for inputs, labels in batches:
                _, state = rule.learn(network, rule.begin(state), inputs[:, own].double(), labels[own])
            found.append({**network.state_dict(), **getattr(state, "own", {})})
        except BaseException as error:
            barrier.abort()
            failed.append(error)

    threads = [threading.Thread(target=learn, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert all(torch.equal(found[0][name], other[name]) for other in found for name in other)
    return found[0]


def descending(name: str):
    rule = configure(name, {"homeostasis": "on"})
    object.__setattr__(rule, "optimizer", lambda parameters: torch.optim.SGD(parameters, lr=0.05))
    return rule


def shared_and_not(name: str, size: int) -> list[float]:
    """How far each tensor of a shared update is from that of one process, relative to it."""
    whole, shared = (after_two_updates(descending(name), number) for number in (1, size))
    return [
        float((shared[key] - wanted).norm() / (wanted.norm() + 1e-6)) for key, wanted in whole.items() if key != "generator"
    ]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [2, 3])
def test_rows_are_shared_where_together_they_ask_the_same(name, size) -> None:
    worst = max(shared_and_not(name, size))
    if descending(name).by_row(network_of("mlp")):
        assert worst < 1e-9
    else:  # rightly refused
        assert worst > 1e-6


def test_more_rows_than_one_piece_are_shared(monkeypatch) -> None:
    monkeypatch.setattr(sigprop, "CACHED", 200)  # a step or two at a time, as in a large layer
    assert max(shared_and_not("sigprop-surrogate", 3)) < 1e-9


def test_a_batch_of_one_row_is_one_wherever_it_lies() -> None:
    assert [part_of(7, rank, 3) for rank in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert [part_of(1, rank, 2) for rank in range(2)] == [slice(0, 1), slice(1, 1)]


def test_layers_are_split_by_their_products() -> None:
    network = mlp((100,), [1000, 10, 10, 10], 3)
    assert parallel.split_layers(network, 2) == [range(0, 1), range(1, 4)]
    assert parallel.split_layers(network, 4) == [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]
    with pytest.raises(InputError, match="5 processes cannot share 4 layers"):
        parallel.split_layers(network, 5)
    deep = mlp((20,), [20] * 60, 3)  # trying all cuts would take years
    assert sorted(map(len, parallel.split_layers(deep, 20))) == [3] * 20


def test_a_part_of_a_network_is_its_layers() -> None:
    network = network_of("conv")
    with torch.no_grad():
        network.layers[0].rate.uniform_()
    x = torch.rand(STEPS, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    activities = network.run(x)
    lower, upper = network.part(0, 1), network.part(1, 3)
    assert torch.equal(lower.run(x)[-1].spikes, activities[0].spikes)
    assert torch.equal(upper.run(activities[0].spikes)[-1].spikes, activities[-1].spikes)
    assert upper.layers[0].synapse is network.layers[1].synapse and upper.readout is network.readout
    assert lower.readout is not network.readout and lower.target is network.target


def test_what_cannot_be_spread_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="parallel needs a process group"):
        sp.fit(network_of("mlp"), sp.SigProp(), data_of(), STEPS, parallel="data")
    with pytest.raises(InputError, match="'rows' is none of"):
        sp.fit(network_of("mlp"), sp.SigProp(), data_of(), STEPS, parallel="rows")
    with pytest.raises(InputError, match=r"RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set.*torchrun"), parallel.start():
        pass
