"""Runs a saved Loihi network in Lava, as a script of its own: ``python worker.py network.npz messages.npz out.npz``.

It needs numpy and Lava only. Lava forks one operating-system process per Lava process, deadlocks if torch was used before,
and hangs for ever if one of them fails; so it runs apart, and whoever starts it can end it as a whole, as
``spikeprop.backends.lava`` does.

messages.npz holds ``messages [T, B, features]``, integers, and ``membranes``, 0 or 1. out.npz gets ``spikes1``, ``spikes2`` and
so on and, if wanted, ``membranes1`` and so on (after the reset), ``[T, B, n]``, and ``seconds``, the time of the run without
building. It is written whole or not at all.

All samples go through in one continuous run. Each Dense delays by one step, so layer l (from 1) sees step t of the input at
step t + l; LIFReset clears u and v of layer l just before a sample's first step arrives there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import mmap
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

import numpy as np

VAR_MODEL = "lava.magma.compiler.var_model"


def import_lava() -> None:
    """Imports the one module of Lava 0.10 that Python >= 3.11 refuses, because of dataclass defaults without a hash.

    Its ByteEncoder() and CoreEncoder() defaults are never changed, so giving them a hash while it is imported is safe.
    """
    original = dataclasses.dataclass

    def hashable(cls: Any = None, **options: Any) -> Any:
        if cls is None:
            return lambda decorated: hashable(decorated, **options)
        made = original(cls, **options)
        if made.__module__ == VAR_MODEL and made.__hash__ is None:
            made.__hash__ = object.__hash__
        return made

    dataclasses.dataclass = hashable
    try:
        importlib.import_module(VAR_MODEL)
    finally:
        dataclasses.dataclass = original


def shared(shape: tuple[int, ...], dtype: type) -> Any:
    """Zeros that forked processes write and this one reads. Lava's own Var.get costs 18 microseconds per number."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype).reshape(shape)


def inputs_of(network: dict[str, Any], layers: list[dict[str, Any]], number: int) -> tuple[int, ...]:
    """Shape of what layer ``number`` (from 1) takes: (C, H, W), or (n,)."""
    convolution = layers[number - 1].get("convolution")
    return tuple(convolution["input_shape"]) if convolution else (network[f"layer{number}_weight"].shape[1],)


def to_lava(values: Any, shape: tuple[int, ...]) -> Any:
    """``[neurons, ...]`` in C order of ``shape``, (C, H, W) or (n,), with its axes in Lava's order, (W, H, C) or (n,)."""
    axes = range(len(shape))
    return np.ascontiguousarray(
        values.reshape(*shape, *values.shape[1:]).transpose(*axes[::-1], *range(len(shape), values.ndim + len(shape) - 1))
    )


def reordered(port: Any, shape: tuple[int, ...], wanted: tuple[int, ...]) -> Any:
    """A port of neurons of one shape as inputs of another: both in C order of (C, H, W), which Lava's axes are not."""
    if len(shape) > 1:
        port = port.transpose((2, 1, 0)).reshape((int(np.prod(shape)),))
    return port.reshape(wanted).transpose((2, 1, 0)) if len(wanted) > 1 else port


def build(network: dict[str, Any], messages: Any, with_membranes: bool) -> tuple[Any, Any, list[Any], list[Any]]:
    """The Lava processes: the source (to run), the run configuration, and per layer the recordings ``[steps, *shape]``."""
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc.conv.process import Conv
    from lava.proc.dense.process import Dense
    from lava.proc.io import sink, source
    from lava.proc.io.sink import PyReadFixed, PyReceiveModelFixed
    from lava.proc.lif.process import LIFReset
    from lava.utils.weightutils import SignMode

    class SharedSink(PyReceiveModelFixed):
        """Lava's spike sink, but for where it writes."""

        def run_spk(self) -> None:
            self.proc_params["recording"][self.time_step - 1] = self.a_in.recv()

    class SharedProbe(PyReadFixed):
        """Lava's reader of a variable at the end of each step, but for where it writes."""

        def run_post_mgmt(self) -> None:
            self.proc_params["recording"][self.time_step - 1] = self.state.read()

    metadata = json.loads(str(network["metadata"]))
    steps, batch, features = messages.shape
    total = steps * batch + len(metadata["layers"])
    shape = inputs_of(network, metadata["layers"], 1)
    feed = source.RingBuffer(data=to_lava(messages.transpose(2, 1, 0).reshape(features, -1), shape).astype(np.int32))
    spikes, membranes, previous = [], [], feed.s_out
    for number, layer in enumerate(metadata["layers"], 1):
        wanted = inputs_of(network, metadata["layers"], number)
        if wanted != shape:
            previous = reordered(previous, shape, wanted)
        bits = metadata["num_message_bits"] if number == 1 else 0
        weight = network[f"layer{number}_weight"].astype(np.int32)
        if layer.get("convolution") is None:
            shape = (len(weight),)
            synapse = Dense(
                weights=weight,
                weight_exp=layer["weight_exp"],
                num_weight_bits=layer["weight_bits"],
                # Left out, Lava would treat a layer that happens to have no negative weight as unsigned, on another grid.
                sign_mode=SignMode.MIXED,
                num_message_bits=bits,
            )
        else:
            synapse = Conv(
                # Lava convolves, so the kernel is turned round, and counts width before height before channels.
                weight=np.ascontiguousarray(weight[:, :, ::-1, ::-1].transpose(0, 3, 2, 1)),
                input_shape=wanted[::-1],
                stride=tuple(layer["convolution"]["stride"][::-1]),
                padding=tuple(layer["convolution"]["padding"][::-1]),
                groups=layer["convolution"]["groups"],
                num_weight_bits=layer["weight_bits"],
                num_message_bits=bits,
            )
            shape = tuple(int(extent) for extent in synapse.output_shape[::-1])
        registers = {name: network[f"layer{number}_{name}"] for name in ("du", "dv", "vth", "bias_mant", "bias_exp")}
        registers = {name: to_lava(values, shape) if values.ndim else int(values) for name, values in registers.items()}
        lif = LIFReset(shape=shape[::-1], reset_interval=steps, reset_offset=number + 1, **registers)
        previous.connect(synapse.s_in)
        synapse.a_out.connect(lif.a_in)
        recorder = sink.RingBuffer(shape=shape[::-1], buffer=1)
        lif.s_out.connect(recorder.a_in)
        spikes.append(shared((total, *shape[::-1]), np.int8))
        recorder.proc_params["recording"] = spikes[-1]
        if with_membranes:
            probe = sink.Read(buffer=1)
            probe.connect_var(lif.v)
            membranes.append(shared((total, *shape[::-1]), np.int32))
            probe.proc_params["recording"] = membranes[-1]
        previous = lif.s_out
    models = {sink.RingBuffer: SharedSink, sink.Read: SharedProbe}
    return feed, Loihi2SimCfg(select_tag="fixed_pt", exception_proc_model_map=models), spikes, membranes


def run(feed: Any, configuration: Any, total: int) -> float:
    """Runs and stops; seconds of the run alone. An error is fatal for the caller: Lava's processes may wait for each other."""
    from lava.magma.core.run_conditions import RunSteps

    feed.create_runtime(configuration)
    try:
        finished = watch_actors(feed.runtime._messaging_infrastructure.actors)
        started = time.perf_counter()
        feed.run(RunSteps(num_steps=total))
        seconds = time.perf_counter() - started
        finished.set()
    finally:
        feed.stop()
    return seconds


def watch_actors(actors: list[Any]) -> threading.Event:
    """Ends everything, with the reason on stderr, as soon as one of Lava's processes ends before the returned event is set.

    Lava itself would wait for it for ever, and never show its traceback.
    """
    finished = threading.Event()
    sentinels = {actor.sentinel: actor for actor in actors}

    def watch() -> None:
        ended = multiprocessing.connection.wait(list(sentinels))
        if not finished.is_set():
            actor = sentinels[ended[0]]
            reason = actor.exception
            fail(reason[1] if reason else f"Lava process {actor.name} ended by itself, without a traceback (killed?)")

    threading.Thread(target=watch, daemon=True).start()
    return finished


def fail(reason: str) -> None:
    """Ends this process and all that it started, at once: after an error Lava's own clean-up waits for ever."""
    print(reason, file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def follow_parent() -> None:
    """Ends the whole process group when stdin closes, which happens when whoever started us is gone, in whatever way."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def collect(recordings: list[Any], name: str, steps: int, batch: int) -> dict[str, Any]:
    """Recordings ``[steps, *shape]`` as ``[T, B, n]``, with each layer's delay taken out."""
    result = {}
    for number, recording in enumerate(recordings, 1):
        undelayed = recording[number : number + steps * batch]
        in_order = undelayed.transpose(0, *range(undelayed.ndim - 1, 0, -1))  # (C, H, W), not Lava's (W, H, C)
        result[f"{name}{number}"] = in_order.reshape(batch, steps, -1).transpose(1, 0, 2)
    return result


def main(network_path: str, messages_path: str, out_path: str) -> None:
    """Run the messages of one file through the network of another, and write what every layer did."""
    with np.load(network_path, allow_pickle=False) as archive:
        network = dict(archive)
    with np.load(messages_path, allow_pickle=False) as archive:
        messages, with_membranes = archive["messages"], bool(archive["membranes"])
    import_lava()
    feed, configuration, spikes, membranes = build(network, messages, with_membranes)
    seconds = np.array(run(feed, configuration, len(spikes[0])))
    steps, batch = messages.shape[:2]
    temporary = f"{out_path}.part"
    with open(temporary, "wb") as file:
        layers = {**collect(spikes, "spikes", steps, batch), **collect(membranes, "membranes", steps, batch)}
        np.savez(file, seconds=seconds, **layers)
    os.replace(temporary, out_path)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--follow-parent" in arguments:
        arguments.remove("--follow-parent")
        follow_parent()
    try:
        main(*arguments)
    except BaseException:  # whatever it is: shown, and then no process may stay behind
        fail(traceback.format_exc())
