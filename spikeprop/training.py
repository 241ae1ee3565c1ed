"""The training loop: epochs of batches, one sequence each, with progress, validation and checkpoints that survive a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from spikeprop import parallel as parallel_training
from spikeprop.augmentation import Augmentation
from spikeprop.data import Data
from spikeprop.encoding import Encoder, default_encoder
from spikeprop.errors import CheckpointError, InputError, ProcessError
from spikeprop.evaluation import evaluate, stream_batches
from spikeprop.network import Network
from spikeprop.rules.base import Rule
from spikeprop.storage import read_tensors, write_tensors

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class History:
    """One entry per epoch: loss per layer, training and validation accuracy, dead share and rate per layer, seconds."""

    epochs: list[dict[str, Any]] = field(default_factory=list)

    def series(self, name: str) -> list[Any]:
        """One figure over the epochs, for example ``series("validation_accuracy")``."""
        return [epoch[name] for epoch in self.epochs]

    def to_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}


def default_batch_size(samples: int) -> int:
    """128, or fewer for small data so that an epoch still has more than a hundred updates."""
    return max(1, min(128, samples // 128))


def fit(
    network: Network,
    rule: Rule,
    data: Data,
    num_steps: int | None = None,
    epochs: int = 20,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    encoder: Encoder | None = None,
    schedule: Literal["cosine", "constant"] = "cosine",
    augment: Augmentation | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    observe: Callable[[Network, Any], dict[str, Any]] | None = None,
    chunk: int | None = None,
    parallel: parallel_training.Kind | None = None,
) -> History:
    """Train a network in place.

    Args:
        network: its tensors are changed; a centred network gets the mean of the encoded training inputs first.
        rule: for example ``SigProp()``.
        data: needs ``train``; ``validation`` is looked at after every epoch if it is there. ``test`` is never touched.
        num_steps: time steps per sample, T; may be left out where the data carry time.
        epochs: passes over the training data.
        batch_size: samples per sequence of ``rule.learn``; by default 128, fewer for small data (:func:`default_batch_size`).
        seed: fixes the order of samples, random encoders and what the rule draws.
        encoder: constant current, or events as they are, by default.
        schedule: the learning rate falls as half a cosine to zero, or stays.
        augment: random changes of the training inputs, drawn anew each time; none by default. Evaluation never has them.
        folder: where a checkpoint is written after every epoch (atomically: a kill leaves the last good one).
        resume: continue from the folder's checkpoint, to the same weights, bit for bit, as if it had not been interrupted.
        observe: called with the network and the rule's state after every epoch; what it returns joins the epoch's figures. It
            must change neither.
        chunk: steps of a sequence that are encoded and learned at a time, so that a long one is never held whole; None: all.
            Recordings may lie in a file (:func:`spikeprop.data.from_arrays`); augmentation needs whole ones all the same. A
            rule that updates once per call (``update_every=None``) then does so after each stretch, and the windows of rules
            other than SigProp end with one.
        parallel: "data" or "layers" spreads the training over the processes that called this together, each with the same
            arguments: see :mod:`spikeprop.parallel`. None trains in this process alone.
        progress: a bar with loss, accuracy, dead share and rate; one line per epoch where the output is not a terminal.

    Raises:
        InputError: data that do not fit the network.
        CheckpointError: a checkpoint that is missing, damaged, or of a run with other settings.
        UnsupportedError: a rule or neurons that cannot be trained on several processes.
        ProcessError: another process was lost; the checkpoint of the last whole epoch is intact.
        KeyboardInterrupt: on Ctrl-C, after the batch at hand; the network and the last checkpoint are whole.
    """
    inputs, labels = data.train
    encoder = default_encoder(data.temporal) if encoder is None else encoder
    augment = Augmentation() if augment is None else augment
    check_training(network, data, epochs, encoder, augment)
    batch_size = default_batch_size(len(inputs)) if batch_size is None else batch_size
    num_steps = num_steps or data.num_steps
    if num_steps is None:
        raise InputError(f"fit: num_steps is missing: the data set {data.name} has no time axis of its own")
    check_rule(rule, network, len(inputs), batch_size, num_steps)
    batches = math.ceil(len(inputs) / batch_size)
    together = batch_size if chunk is not None and encoder.temporal else None  # a stretch of more recordings may be too much
    settings = {
        "rule": type(rule).__name__,
        "num_steps": num_steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "encoder": encoder.config(),
        "schedule": schedule,
        "augment": augment.config(),
        "samples": len(inputs),
        **({} if chunk is None else {"chunk": chunk}),
    }

    crew = parallel_training.crew(parallel, network, rule)
    plain = {name: repr(value) for name, value in vars(rule).items() if not callable(value)}
    crew.agree({**settings, "settings of the rule": plain, "network": network.config(), "parallel": parallel, "resume": resume})
    crew.check(len(inputs) % batch_size or min(batch_size, len(inputs)))
    if parallel is not None and observe is not None:
        raise InputError("fit: observe sees a network and a state in one process; leave it out with parallel, or train on one")
    generator = torch.Generator().manual_seed(seed)
    whole = crew.initial_state(generator)
    history = History()
    path = None if folder is None else Path(folder) / CHECKPOINT
    if resume:
        if path is None:
            raise InputError("fit: resume=True needs the folder that holds the checkpoint")
        history.epochs = _restore(path, settings, network, rule, whole, generator)
        crew.agree({"epochs in the checkpoint": history.epochs})
    elif network.centred:
        centre_inputs(network, inputs, num_steps, encoder, seed, chunk, together or 1000)
    state = crew.own_state()
    groups = [group for optimizer in crew.optimizers for group in optimizer.param_groups]
    base_rates = [group.setdefault("initial_lr", group["lr"]) for group in groups]

    with _interruptible() as interrupted, _lost(path, resume):
        for epoch in range(len(history.epochs), epochs):
            started, order = time.perf_counter(), torch.randperm(len(inputs), generator=generator)
            totals = _Totals(crew.trained)
            silent = None if progress and crew.main else True
            bar = tqdm(order.split(batch_size), f"epoch {epoch + 1}/{epochs}", disable=silent, leave=False)
            for number, rows in enumerate(bar):
                if schedule == "cosine":
                    factor = 0.5 * (1.0 + math.cos(math.pi * (epoch * batches + number) / (epochs * batches)))
                    for group, rate in zip(groups, base_rates, strict=True):
                        group["lr"] = rate * factor

                def encode(rows: Tensor = rows) -> Iterator[Tensor]:
                    plain = augment == Augmentation()
                    seen = (inputs, rows) if plain else (augment(inputs[rows], generator), None)
                    stretches = encoder.stretches(seen[0], num_steps, chunk, generator, seen[1])
                    return (x.to(network.readout.weight) for x in stretches)

                answer, learned, state = crew.learn(state, encode, labels[rows])
                totals.add(answer, learned, network.regression)
                if number % 10 == 0:
                    bar.set_postfix_str(totals.line(whole=crew.trained is network))
                if interrupted.is_set():
                    raise KeyboardInterrupt(
                        f"stopped in epoch {epoch + 1}; {path or 'no checkpoint folder'} holds the epochs before it"
                    )
            totals.numbers = crew.total(totals.numbers)
            figures = crew.epoch(state, totals.to_dict())
            if not crew.main:
                history.epochs.append(figures)
                continue
            entry = {"epoch": epoch + 1, **figures, "seconds": time.perf_counter() - started}
            if data.validation is not None:
                size = together or 500
                found = evaluate(network, data.validation, num_steps, encoder=encoder, batch_size=size, seed=seed, chunk=chunk)
                entry["validation_accuracy"] = found.accuracy.get("readout")
                entry["validation_error"] = found.error
            entry |= {} if observe is None else observe(network, state)
            history.epochs.append(entry)
            if path is not None:
                _save(path, settings, network, rule, crew.whole, generator, history)
            if progress:
                tqdm.write(_describe(entry, epochs))
        history.epochs = crew.finish(history.epochs)
    return history


def check_training(network: Network, data: Data, epochs: int, encoder: Encoder, augment: Augmentation | None = None) -> None:
    """Raise InputError for what :func:`fit` would refuse before it begins."""
    if augment is not None:
        augment.check(tuple(data.input_shape), encoder, data.num_steps)
    if epochs < 1:
        raise InputError(f"fit: epochs = {epochs} must be at least 1")
    if tuple(data.input_shape) != network.input_shape:
        raise InputError(
            f"fit: {data.name} has inputs of shape {tuple(data.input_shape)}, the network expects {network.input_shape}"
        )
    if data.num_classes != network.outputs or data.regression != network.regression:
        kinds = ("classes", "real outputs")
        raise InputError(
            f"fit: {data.name} has {data.num_classes} {kinds[data.regression]}, "
            f"the network {network.outputs} {kinds[network.regression]}"
        )


def check_rule(rule: Rule, network: Network, samples: int, batch_size: int, num_steps: int) -> None:
    """Raise InputError or UnsupportedError for what a rule would refuse, or never learn from, in the course of :func:`fit`."""
    rule.check(network, samples % batch_size or min(batch_size, samples))  # the last batch may be smaller
    window = getattr(rule, "update_every", None)
    if window is not None and window > num_steps:
        raise InputError(
            f"fit: update_every = {window} is longer than a sequence of {num_steps} steps; leave it out to update once per "
            "sequence"
        )


@torch.inference_mode()
def centre_inputs(
    network: Network,
    inputs: Tensor,
    num_steps: int,
    encoder: Encoder,
    seed: int,
    chunk: int | None = None,
    batch_size: int = 1000,
) -> None:
    """Set a centred network's input mean to the mean of the encoded inputs over samples and time, as :func:`fit` does first."""
    total = torch.zeros_like(network.input_mean, dtype=torch.float64)
    for _, stretches in stream_batches(network, inputs, num_steps, encoder, batch_size, seed, chunk):
        for x in stretches:
            total += x.mean(0).sum(0) * (len(x) / num_steps)
    network.input_mean.copy_(total / len(inputs))


class _Totals:
    """Sums over an epoch, weighted by samples. ``numbers``: samples, right ones, each layer's loss, each neuron's activity."""

    def __init__(self, network: Network) -> None:
        self.sizes = [layer.rate.numel() for layer in network.layers]
        self.numbers = torch.zeros(2 + len(self.sizes) + sum(self.sizes), dtype=torch.float64)

    def add(self, answer: Any, labels: Tensor, regression: bool) -> None:
        batch = len(labels)
        if regression:
            right = (answer.outputs.cpu() - labels).square().mean(1).sum()
        else:
            right = (answer.outputs.argmax(1).cpu() == labels).sum()
        means = [answer.loss.cpu(), *(part.flatten().cpu() for part in answer.activity)]
        self.numbers += torch.cat([torch.tensor([float(batch), float(right)]), *(mean * batch for mean in means)])

    def to_dict(self) -> dict[str, Any]:
        samples, right = self.numbers[:2].tolist()
        losses, *activity = self.numbers[2:].split([len(self.sizes), *self.sizes])
        return {
            "loss": (losses / samples).tolist(),
            "train_accuracy": right / samples,
            "dead": [float((total == 0).double().mean()) for total in activity],
            "rate": [float(total.mean()) / samples for total in activity],
        }

    def line(self, whole: bool = True) -> str:
        figures = self.to_dict()
        accuracy = f"accuracy {figures['train_accuracy']:.3f} " if whole else "own layers "  # a part's readout is thrown away
        return (
            f"loss {sum(figures['loss']) / len(figures['loss']):.3f} {accuracy}"
            f"dead {max(figures['dead']):.1%} rate {max(figures['rate']):.3f}"
        )


def _describe(entry: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {entry['epoch']}/{epochs}", "loss " + " ".join(f"{loss:.3f}" for loss in entry["loss"])]
    parts.append(f"train {entry['train_accuracy']:.4f}")
    if entry.get("validation_accuracy") is not None:
        parts.append(f"validation {entry['validation_accuracy']:.4f}")
    parts.append("dead " + " ".join(f"{share:.1%}" for share in entry["dead"]))
    parts.append("rate " + " ".join(f"{rate:.3f}" for rate in entry["rate"]))
    return "  ".join([*parts, f"{entry['seconds']:.1f} s"])


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn Ctrl-C into a flag, so that no tensor is left half written. Only the main thread can catch signals."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = signal.signal(signal.SIGINT, lambda *_: flag.set())
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _lost(path: Path | None, resumed: bool) -> Iterator[None]:
    """Say what is left when another process is lost."""
    started = time.time()
    try:
        yield
    except ProcessError as error:
        kept = "nothing was saved before it"
        if (
            path is not None and path.exists() and (resumed or path.stat().st_mtime > started - 2.0)
        ):  # not one of an earlier run
            epochs = len(read_tensors(path)[1]["history"])
            kept = f"{path} holds the first {epochs} epoch(s); start all processes again with resume=True (--resume)"
        raise ProcessError(f"{error}. The training stopped; {kept}") from None


def _save(
    path: Path, settings: dict[str, Any], network: Network, rule: Rule, state: Any, generator: torch.Generator, history: History
) -> None:
    optimizer = state.optimizer.state_dict()
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"rule.{name}": tensor for name, tensor in rule.tensors(state).items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, moments in optimizer["state"].items():
        for name, value in moments.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    tensors["generator"] = generator.get_state()
    header = {
        "network": network.config(),
        "settings": settings,
        "history": history.epochs,
        "optimizer": {"groups": optimizer["param_groups"], "plain": plain},
    }
    write_tensors(path, tensors, header)


def _restore(
    path: Path, settings: dict[str, Any], network: Network, rule: Rule, state: Any, generator: torch.Generator
) -> list[dict[str, Any]]:
    """Load a checkpoint into network, rule state and generator; returns the epochs already done."""
    tensors, header = read_tensors(path)
    if "settings" not in header:
        raise CheckpointError(f"{path} is a saved network, not a checkpoint: it has no optimiser state to resume from")
    before, now = header["settings"], json.loads(json.dumps(settings))  # those of another version have other names
    changed = [name for name in {**before, **now} if name not in before or name not in now or before[name] != now[name]]
    if changed:
        what = "; ".join(f"{name} was {before.get(name, 'unknown')}, is {now.get(name, 'unknown')}" for name in changed)
        raise CheckpointError(
            f"{path} belongs to a run with other settings ({what}); resume with the same ones or start a new run"
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    try:
        network.load_state_dict(part("network."))
        moments: dict[int, dict[str, Any]] = {
            int(index): dict(values) for index, values in header["optimizer"]["plain"].items()
        }
        for name, tensor in part("optimizer.").items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        state.optimizer.load_state_dict({"state": moments, "param_groups": header["optimizer"]["groups"]})
        rule.restore(state, part("rule."))
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} does not fit this network and rule ({error}); resume with the same ones") from None
    generator.set_state(tensors["generator"])
    return list(header["history"])
