"""Training on several processes, started by ``torchrun`` and joined by torch.distributed.

``fit(parallel="data")``: every process has the whole network and its rows of every batch. What is a mean over rows (updates,
running rates, the centre of a local loss) is made one over all processes, so that the same batches give the same weights
whatever the number of processes, but for the order of sums.

``fit(parallel="layers")``: every process has some layers of the network, one after the other. Spikes travel forward only: a
process sends on what its layers spiked, learns, and takes the next batch while the layers above are still at work on this one.
Nothing comes back, so nothing waits but for its input, and the result is that of one process, bit for bit. This is for
:class:`~spikeprop.SigProp`, whose layers learn as the signal passes.

In both, the first process evaluates and writes the checkpoint. It has the format of a training on one process: a run can go on
with another number of them.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from spikeprop.errors import InputError, ProcessError, UnsupportedError
from spikeprop.network import Network
from spikeprop.neuron import Bernoulli
from spikeprop.rules.base import Answer, Rule
from spikeprop.rules.sigprop import SigProp
from spikeprop.team import DTYPES, Pipe, Share, part_of, talking

Kind = Literal["data", "layers"]


@contextmanager
def start(timeout: float = 1800.0) -> Iterator[bool]:
    """Join the processes that ``torchrun`` started, for as long as the block lasts; yields whether this is the first of them.

    Args:
        timeout: seconds that a process waits for another before it gives up. The others wait while the first evaluates and
            writes, too.

    Raises:
        InputError: if this process was not started by ``torchrun``, or by something that sets the same variables.
        ProcessError: if the others do not come.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"parallel training needs several processes, and {', '.join(missing)} are not set; start them with: "
            "torchrun --nproc-per-node 2 --no-python spikeprop train --parallel data ..."
        )
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=timeout)
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"process {os.environ['RANK']} did not find the others: {str(error).splitlines()[0]}") from None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


class Turn(NamedTuple):
    """What a process learned from a batch: the answer of its rows or layers, and the labels that it is about."""

    answer: Answer
    labels: Tensor
    state: Any


class Alone:
    """One process with all rows and all layers; the base of the others, which say what is different.

    Attributes:
        main: whether this process shows progress, evaluates and writes.
        trained: the network that this process hands to its rule.
        optimizers: whose learning rates follow the schedule.
    """

    main = True

    def __init__(self, network: Network, rule: Rule) -> None:
        self.network, self.rule, self.trained = network, rule, network

    def initial_state(self, generator: torch.Generator) -> Any:
        """The state of the rule for the whole network, as checkpoints have it."""
        self.whole = self.rule.initial_state(self.network, generator=generator)
        self.optimizers = [self.whole.optimizer]
        return self.whole

    def own_state(self) -> Any:
        """The state of the rule for what this process trains, from that of the whole network."""
        return self.whole

    def learn(self, state: Any, encode: Callable[[], Iterator[Tensor]], labels: Tensor) -> Turn:
        """Learn from a batch, whose inputs ``encode`` makes, a stretch of time after another."""
        state, answers = self.rule.begin(state), _Answers()
        for x in encode():
            answer, state = self.rule.learn(self.network, state, x, labels.to(x.device))
            answers.add(len(x), answer)
        return Turn(answers.mean(), labels, state)

    def total(self, numbers: Tensor) -> Tensor:
        """Sums over an epoch of what all processes counted."""
        return numbers

    def epoch(self, state: Any, figures: dict[str, Any]) -> dict[str, Any]:
        """At the end of an epoch: bring network and whole state up to date where ``main``, and the figures of all layers."""
        self.whole = state
        return figures

    def agree(self, what: dict[str, Any]) -> None:
        """Raise InputError unless all processes say the same."""

    def check(self, smallest_batch: int) -> None:
        """Raise InputError for batches that cannot be shared out."""

    def finish(self, epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """At the end of the training: network and history are the same everywhere."""
        return epochs


class _Several(Alone):
    """What both kinds share."""

    def __init__(self, network: Network, rule: Rule) -> None:
        super().__init__(network, rule)
        if not dist.is_available() or not dist.is_initialized():
            raise InputError(
                "fit: parallel needs a process group; call it inside `with spikeprop.parallel.start():` in a script that "
                "torchrun started"
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.main = self.rank == 0
        for number, layer in enumerate(network.layers, 1):
            if isinstance(layer.neuron, Bernoulli):
                raise UnsupportedError(
                    f"layer {number} has Bernoulli neurons, which would draw other numbers in each process; train it on one"
                )

    def agree(self, what: dict[str, Any]) -> None:
        theirs = json.loads(_spread_text(json.dumps(what)))
        mine = json.loads(json.dumps(what))
        other = [f"{name} = {mine.get(name)} here, {theirs.get(name)} there" for name in mine if mine[name] != theirs.get(name)]
        if other:
            raise InputError(f"fit: process {self.rank} differs from process 0 ({'; '.join(other)}); give all the same")

    def finish(self, epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        _spread(list(self.network.state_dict().values()))
        found: list[dict[str, Any]] = json.loads(_spread_text(json.dumps(epochs)))
        return found


class Rows(_Several):
    """Every process has some rows of each batch."""

    def __init__(self, network: Network, rule: Rule) -> None:
        super().__init__(network, rule)
        if not rule.by_row(network):
            raise UnsupportedError(
                f"{type(rule).__name__} cannot share the rows of a batch over processes here, because they meet in more than "
                "their mean; train on one process, or by SigProp on classes with SimilarityCrossEntropy, or by BPTT"
            )

    def check(self, smallest_batch: int) -> None:
        if smallest_batch < self.size:
            raise InputError(
                f"fit: the smallest batch has {smallest_batch} row(s) for {self.size} processes; choose another batch size, or "
                "fewer processes"
            )

    def initial_state(self, generator: torch.Generator) -> Any:
        start = generator.get_state()
        _spread([*self.network.state_dict().values(), start])
        generator.set_state(start)
        return super().initial_state(generator)

    def learn(self, state: Any, encode: Callable[[], Iterator[Tensor]], labels: Tensor) -> Turn:
        own = part_of(len(labels), self.rank, self.size)
        share = Share(own.stop - own.start, len(labels))
        state, answers = replace(self.rule.begin(state), share=share), _Answers()
        for x in encode():  # all rows were drawn, so that every process draws the same
            answer, state = self.rule.learn(self.network, state, x[:, own], labels[own].to(x.device))
            answers.add(len(x), answer)
        return Turn(answers.mean(), labels[own], state)

    def total(self, numbers: Tensor) -> Tensor:
        with talking():
            dist.all_reduce(numbers)
        return numbers


class Layers(_Several):
    """Every process has some layers."""

    rule: SigProp

    def __init__(self, network: Network, rule: Rule) -> None:
        super().__init__(network, rule)
        if not isinstance(rule, SigProp):
            raise UnsupportedError(
                f"{type(rule).__name__} cannot be spread over processes by layers: only SigProp's layers learn as the signal "
                "passes; use parallel='data' or one process"
            )
        self.spans = split_layers(network, self.size)
        self.own = self.spans[self.rank]
        self.below = Pipe(self.rank - 1) if self.rank > 0 else None
        self.above = Pipe(self.rank + 1) if self.rank < self.size - 1 else None

    def initial_state(self, generator: torch.Generator) -> Any:
        _spread(list(self.network.state_dict().values()))
        whole = super().initial_state(generator)
        self.trained = self.network.part(self.own.start, self.own.stop)
        self.state = self.rule.initial_state(self.trained, entered=self.below is not None)
        self.optimizers = [whole.optimizer, self.state.optimizer]
        return whole

    def own_state(self) -> Any:
        groups = {id(parameter): group for group in self.whole.optimizer.param_groups for parameter in group["params"]}
        for group in self.state.optimizer.param_groups:
            known = [parameter for parameter in group["params"] if id(parameter) in groups]  # but for a readout of its own
            for parameter in known:  # shared with the whole network, so that its moments are these
                if parameter in self.whole.optimizer.state:
                    self.state.optimizer.state[parameter] = self.whole.optimizer.state[parameter]
            if known:  # a checkpoint's learning rate, for example
                group.update({name: value for name, value in groups[id(known[0])].items() if name != "params"})
        self.state.means = self.whole.means[self.own.start : self.own.stop]
        return self.state

    def learn(self, state: Any, encode: Callable[[], Iterator[Tensor]], labels: Tensor) -> Turn:
        state, answers = self.rule.begin(state), _Answers()
        for x, present, last in self._arriving() if self.below else self._windows(encode(), labels):
            rate = self.trained.layers[-1].rate.clone()  # on which the next layer is centred while it sees these spikes
            answer, state = self.rule.learn(self.trained, state, x, present.to(x.device))
            answers.add(len(x), answer)
            if self.above is not None:
                packed = _packed(state.stream.spikes, self.trained.layers[-1].neuron.spiking)
                self.above.send([*packed, rate, present, torch.tensor(last)])
        return Turn(answers.mean(), present, state)

    def _windows(self, stretches: Iterator[Tensor], labels: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """A sequence, cut wherever the rates may change that the layers above are centred on; the last piece is marked."""
        before: Tensor | None = None
        place = 0  # in the update window
        for stretch in stretches:
            while len(stretch):
                stop = min(len(stretch), (self.rule.update_every or len(stretch)) - place)
                piece, stretch = stretch[:stop], stretch[stop:]
                place = (place + stop) % (self.rule.update_every or stop)
                if before is not None:
                    yield before, labels, False
                before = piece
        assert before is not None
        yield before, labels, True

    def _arriving(self) -> Iterator[tuple[Tensor, Tensor, bool]]:
        assert self.below is not None
        last = False
        while not last:
            *packed, rate, labels, end = self.below.receive()
            self.trained.input_mean.copy_(rate)
            last = bool(end)
            yield _unpacked(*packed).to(self.network.readout.weight.device), labels, last

    def epoch(self, state: Any, figures: dict[str, Any]) -> dict[str, Any]:
        parameters = {id(parameter): index for index, parameter in enumerate(self.whole.parameters)}
        if not self.main:
            moments = [
                (parameters[id(parameter)], name, value)
                for parameter, found in state.optimizer.state.items()
                if id(parameter) in parameters
                for name, value in found.items()
                if isinstance(value, Tensor)
            ]
            text = {"figures": figures, "moments": [(index, name) for index, name, _ in moments]}
            pipe = Pipe(0)
            pipe.send([_bytes(json.dumps(text)), *(value for *_, value in moments), *state.means, *self._tensors(self.rank)])
            pipe.finish()
            return figures
        self._keep(state)
        for other in range(1, self.size):
            first, *tensors = Pipe(other).receive()
            text = json.loads(_text(first))
            values = iter(tensors)
            for index, name in text["moments"]:
                self.whole.optimizer.state[self.whole.parameters[index]][name] = next(values)
            for index in self.spans[other]:
                self.whole.means[index] = next(values)
            for tensor, value in zip(self._tensors(other), values, strict=True):
                tensor.copy_(value)
            for name in ("loss", "dead", "rate"):
                figures[name] = [*figures[name], *text["figures"][name]]
            figures["train_accuracy"] = text["figures"]["train_accuracy"]  # of the last: its readout is the network's
        return figures

    def _keep(self, state: Any) -> None:
        """What this process learned, in the state of the whole network."""
        mine = {id(parameter) for parameter in self.whole.parameters}
        for parameter, found in state.optimizer.state.items():
            if id(parameter) in mine:
                self.whole.optimizer.state[parameter] = found
        self.whole.means[self.own.start : self.own.stop] = state.means

    def _tensors(self, rank: int) -> list[Tensor]:
        """What a process changes of the network."""
        span = self.spans[rank]
        found = [tensor for index in span for tensor in self.network.layers[index].state_dict().values()]
        return [*found, *self.network.readout.parameters()] if rank == self.size - 1 else found


def crew(kind: Kind | None, network: Network, rule: Rule) -> Alone:
    """Who trains: one process, or all of the group by rows or by layers.

    Raises:
        InputError: without a process group, or with more processes than layers.
        UnsupportedError: a rule that cannot be spread so.
    """
    if kind is None:
        return Alone(network, rule)
    if kind not in ("data", "layers"):
        raise InputError(f"fit: parallel = {kind!r} is none of 'data', 'layers' and None")
    return Rows(network, rule) if kind == "data" else Layers(network, rule)


def split_layers(network: Network, parts: int) -> list[range]:
    """The layers of each process, in order, so that the one with the most products has as few as can be.

    Raises:
        InputError: if there are more parts than layers.
    """
    count = len(network.layers)
    if parts > count:
        raise InputError(
            f"{parts} processes cannot share {count} layers, as each needs at least one; start at most {count}, or use "
            "parallel='data'"
        )
    costs = [layer.rate.numel() * max(1, layer.synapse.fan_in) for layer in network.layers]

    # best[parts - 1][stop]: of the first ``stop`` layers in so many parts, the smallest largest sum, and where the last begins.
    sums = [0, *itertools.accumulate(costs)]
    best = [[(float(total), 0) for total in sums]]
    for part in range(1, parts):
        best.append([(float("inf"), 0)] * (part + 1))
        best[part] += [
            min((max(best[part - 1][start][0], sums[stop] - sums[start]), start) for start in range(part, stop))
            for stop in range(part + 1, count + 1)
        ]
    edges = [count]
    for part in range(parts - 1, 0, -1):
        edges.insert(0, best[part][edges[0]][1])
    return [range(start, stop) for start, stop in itertools.pairwise([0, *edges])]


class _Answers:
    """The answers to the stretches of a sequence, added up as they come: kept ones would take memory that grows with time."""

    def __init__(self) -> None:
        self.steps = 0

    def add(self, steps: int, answer: Answer) -> None:
        read = torch.full_like(answer.loss, steps) if answer.readings is None else answer.readings
        parts = [answer.loss.where(read > 0, 0.0) * read, *(mean * steps for mean in answer.activity), read]
        if self.steps == 0:
            self.first: Answer | None = answer
            self.sums = parts
        else:
            self.first = None
            self.sums = [total + part for total, part in zip(self.sums, parts, strict=True)]
        self.steps, self.outputs = self.steps + steps, answer.outputs

    def mean(self) -> Answer:
        if self.first is not None:  # the only one, to the last digit
            return self.first
        return Answer(self.outputs, self.sums[0] / self.sums[-1], [part / self.steps for part in self.sums[1:-1]])


def _packed(spikes: Tensor, spiking: bool) -> list[Tensor]:
    """Activity ``[k, R, *features]`` as it travels: spikes as bytes, in the order in which they lie in memory."""
    turned = spikes.dim() == 5 and spikes.stride(2) == 1
    rows = spikes.movedim(2, -1) if turned else spikes
    return [torch.tensor([DTYPES.index(spikes.dtype), turned]), rows.to(torch.uint8) if spiking else rows]


def _unpacked(how: Tensor, rows: Tensor) -> Tensor:
    dtype, turned = how.tolist()
    rows = rows.to(DTYPES[dtype])
    return rows.movedim(-1, 2) if turned else rows


def _spread(tensors: list[Tensor]) -> None:
    """Overwrite tensors by those of process 0."""
    with talking():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def _spread_text(text: str) -> str:
    length = torch.tensor([len(text.encode())])
    _spread([length])
    content = _bytes(text) if dist.get_rank() == 0 else torch.empty(int(length), dtype=torch.uint8)
    _spread([content])
    return _text(content)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _text(content: Tensor) -> str:
    return content.numpy().tobytes().decode()
