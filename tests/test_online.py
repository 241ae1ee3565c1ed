"""Learning from a stream: one sample after another, one time step at a time, a batch of one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import spikeprop as sp
from spikeprop.models import mlp

NUM_STEPS = 8  # per sample
SAMPLES = 1000  # of the stream; each is seen once


@pytest.mark.parametrize("learn_on", [sp.Membrane(), sp.ATan()], ids=["membrane", "surrogate"])
def test_digits_are_learned_online_above_nine_tenths(learn_on: sp.Membrane | sp.ATan) -> None:
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [128, 128], data.num_classes, neuron=sp.LIF(beta=0.9, threshold=1.0), seed=0)
    network.input_mean.copy_(data.train.inputs.mean(0))  # what fit does; a stream's owner knows the mean or estimates it
    rule = sp.SigProp(learn_on=learn_on, update_every=NUM_STEPS, optimizer=partial(torch.optim.Adam, lr=1e-3))

    generator = torch.Generator().manual_seed(0)
    state = rule.initial_state(network, generator=generator)
    right = []
    for sample in torch.randperm(len(data.train.inputs), generator=generator)[:SAMPLES].tolist():
        present, label = data.train.inputs[sample][None, None], data.train.labels[sample][None]  # [1, 1, *input_shape], [1]
        state = rule.begin(state)
        for _ in range(NUM_STEPS):
            answer, state = rule.learn(network, state, present, label)
        right.append(int(answer.outputs.argmax()) == int(label))

    assert sum(right[-200:]) / 200 > 0.9, "the answers given while learning, each before its sample was learned"
    assert sp.evaluate(network, data.test, num_steps=NUM_STEPS).accuracy["readout"] > 0.9
