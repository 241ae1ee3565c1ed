"""Learning from a stream: one sample after another, one time step at a time, a batch of one, an update at every step."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import spikeprop as sp
from spikeprop.models import mlp

NUM_STEPS = 8  # per sample
SAMPLES = 600  # of the stream, each seen once; chosen on the validation part, like the learning rate


@pytest.mark.parametrize("learn_on", [sp.Membrane(), sp.ATan()], ids=["membrane", "surrogate"])
def test_digits_are_learned_online_above_nine_tenths(learn_on: sp.Membrane | sp.ATan) -> None:
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [128, 128], data.num_classes, neuron=sp.LIF(beta=0.9, threshold=1.0), seed=0)
    network.input_mean.copy_(data.train.inputs.mean(0))  # as fit does; whoever owns a stream knows its mean or estimates it
    rule = sp.SigProp(learn_on=learn_on, update_every=1, optimizer=partial(torch.optim.Adam, lr=5e-4))

    generator = torch.Generator().manual_seed(0)
    state = rule.initial_state(network, generator=generator)
    for sample in torch.randperm(len(data.train.inputs), generator=generator)[:SAMPLES].tolist():
        present, label = data.train.inputs[sample][None, None], data.train.labels[sample][None]  # [1, 1, 1, 8, 8] and [1]
        state = rule.begin(state)
        for _ in range(NUM_STEPS):
            _, state = rule.learn(network, state, present, label)

    assert sp.evaluate(network, data.test, num_steps=NUM_STEPS).accuracy["readout"] > 0.9
    assert max(sp.dead_neurons(network, data.test, num_steps=NUM_STEPS).share("dead")) < 0.01
