"""What a network asks of the hardware: neurons, synapses, memory, and the events of an inference as measured on data.

Only counts, no energy and no cores: those need constants of one chip, which belong to whoever has measured it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikeprop.backends.loihi.network import LoihiLayer, LoihiNetwork, project
from spikeprop.backends.loihi.simulator import check_messages, simulate


def account(network: LoihiNetwork, messages: Any) -> dict[str, Any]:
    """Counts per layer and in all, measured on ``messages [T, B, features]`` (:func:`encode`); JSON types only.

    neurons, synapses: a synapse is a connection whose weight is not zero; one kernel weight makes as many as places it reaches.
    fan_in, fan_out: synapses per neuron and per input, mean and largest.
    weights, weight_memory_bits: weights that are stored (a convolution's kernel once), and weight_bits times that.
    events_in, spikes: what reaches the layer and what its neurons send, per inference (T steps of one sample). A graded
        message is one event; a message of 0 is none.
    synaptic_operations: events times the synapses they reach, per inference.
    dense_macs: multiply-accumulates of one pass of the same layer with continuous activations, zero weights included;
        dense_macs_all_steps: of T passes, what a simulator that ignores sparsity computes.

    Raises InputError if the messages do not fit the network.
    """
    messages = check_messages(network, messages)
    steps, batch = messages.shape[:2]
    counts = simulate(network, messages, record="counts").counts
    events = [np.count_nonzero(messages, axis=(0, 1)) / batch, *(count.sum(0) / batch for count in counts)]
    layers = [_layer(layer, events[index], events[index + 1], steps) for index, layer in enumerate(network.layers)]
    summed = ("neurons", "synapses", "weights", "weight_memory_bits", "spikes", "synaptic_operations")
    total = {name: sum(layer[name] for layer in layers) for name in (*summed, "dense_macs", "dense_macs_all_steps")}
    return {"samples": batch, "num_steps": steps, "layers": layers, "total": total}


def _layer(layer: LoihiLayer, arriving: NDArray[np.float64], leaving: NDArray[np.float64], steps: int) -> dict[str, Any]:
    present = layer.weight != 0
    fan_out = reach(present, layer)
    fan_in = project(present.astype(np.float64), layer.convolution, np.ones((1, layer.inputs)))[0]
    dense = int(reach(np.ones_like(present), layer).sum())
    return {
        "neurons": layer.outputs,
        "synapses": int(fan_out.sum()),
        "fan_in": {"mean": float(fan_in.mean()), "largest": int(fan_in.max())},
        "fan_out": {"mean": float(fan_out.mean()), "largest": int(fan_out.max())},
        "weights": layer.weight.size,
        "weight_memory_bits": layer.weight.size * layer.weight_bits,
        "events_in": float(arriving.sum()),
        "spikes": float(leaving.sum()),
        "synaptic_operations": float((arriving * fan_out).sum()),
        "dense_macs": dense,
        "dense_macs_all_steps": dense * steps,
    }


def reach(present: NDArray[np.bool_], layer: LoihiLayer) -> NDArray[np.int64]:
    """How many neurons each input reaches, ``[inputs]``, through the weights that are ``present``."""
    if layer.convolution is None:
        return np.asarray(present.sum(0))
    convolution = layer.convolution
    channels, height, width = convolution.input_shape
    _, out_height, out_width = layer.output_shape
    found = np.zeros((channels, height + 2 * convolution.padding[0], width + 2 * convolution.padding[1]), np.int64)
    # [groups, out / groups, in / groups, h, w] summed over the outputs: what one tap of each input channel reaches
    taps = present.reshape(convolution.groups, -1, *present.shape[1:]).sum(1).reshape(channels, *present.shape[2:])
    down, right = convolution.stride
    for i in range(taps.shape[1]):
        for j in range(taps.shape[2]):
            rows, columns = slice(i, i + down * out_height, down), slice(j, j + right * out_width, right)
            found[:, rows, columns] += taps[:, i, j, None, None]
    above, left = convolution.padding
    return found[:, above : above + height, left : left + width].reshape(math.prod(convolution.input_shape))
