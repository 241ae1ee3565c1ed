"""Devices: no rule mixes two, which a machine without a GPU can tell too; where there is a GPU, it learns as the CPU does."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import spikeprop as sp
from spikeprop import parallel
from spikeprop.catalogue import RULES
from spikeprop.errors import UnsupportedError
from spikeprop.models import conv, mlp

META, ATEN = torch.device("meta"), torch.ops.aten
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU (torch.cuda.is_available())")


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices.

    Meta tensors stand for those of a GPU; numbers read from them are made up.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func in (ATEN._local_scalar_dense.default, ATEN.item.default, ATEN.is_nonzero.default) and tensors[0].is_meta:
            return tensors[0].dtype == torch.bool
        if func is ATEN._to_copy.default:
            if tensors[0].is_meta and kwargs.get("device", META) != META:
                return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        elif func is not ATEN.copy_.default and len({tensor.device for tensor in tensors if tensor.dim() > 0}) > 1:
            raise RuntimeError(f"two devices in {func}: {[(tuple(tensor.shape), tensor.device) for tensor in tensors]}")
        return func(*args, **kwargs)


def network_of(kind: str) -> sp.Network:
    if kind == "conv":
        return conv((1, 8, 8), [4, 5], 3, kernel_size=3, stride=1, pool=2, hidden=(12,), seed=3)
    return mlp((1, 8, 8), [20, 16], 3, neuron=sp.LIF(0.9, 0.5, alpha=0.3), seed=3)


def rule_of(name: str, kind: str) -> sp.rules.base.Rule:
    rule: Any = replace(RULES[name], optimizer=partial(torch.optim.SGD, lr=0.05))
    try:
        rule.check(network_of(kind), 6)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return rule


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("name", RULES)
def test_no_rule_mixes_devices(name, kind) -> None:
    rule = rule_of(name, kind)
    with OneDevice():
        network = network_of(kind).to(META)
        crew = parallel.crew(None, network, rule)
        state = crew.initial_state(torch.Generator().manual_seed(0))
        x, labels = torch.rand(5, 6, 1, 8, 8, device=META), torch.zeros(6, dtype=torch.int64)
        for stretches in ([x], [x, x]):
            answer, _, state = crew.learn(state, lambda stretches=stretches: iter(stretches), labels)
    assert all(part.is_meta for part in (answer.outputs, answer.loss, *answer.activity, *network.state_dict().values()))


def test_two_devices_are_seen() -> None:
    with OneDevice(), pytest.raises(RuntimeError, match=r"two devices in aten\.mm"):
        torch.mm(torch.ones(2, 3, device=META), torch.ones(3, 2))


@gpu
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("name", RULES)
def test_a_gpu_learns_as_the_cpu_does(name, kind) -> None:
    """In float64, where the order of sums moves no spike."""
    rule = rule_of(name, kind)
    generator = torch.Generator().manual_seed(1)
    x, labels = (torch.rand(5, 6, 1, 8, 8, generator=generator) < 0.4).double(), torch.arange(6) % 3
    networks = []
    for device in ("cpu", "cuda"):
        network = network_of(kind).double().to(device)
        state = rule.initial_state(network, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            state = rule.begin(state)
            _, state = rule.learn(network, state, x.to(device), labels.to(device))
        networks.append(network)
    for (key, tensor), other in zip(networks[0].state_dict().items(), networks[1].state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other.cpu(), rtol=1e-7, atol=1e-10, msg=key)


@gpu
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_fit_and_evaluate_on_a_gpu(precision) -> None:
    data, before = sp.data.load("digits"), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        network = mlp((1, 8, 8), [64, 64], 10, seed=0).to("cuda")
        sp.fit(network, sp.SigProp(), data, num_steps=8, epochs=10, progress=False)
    finally:
        torch.set_float32_matmul_precision(before)
    assert sp.evaluate(network, data.validation, 8).accuracy["readout"] > 0.93
    assert max(sp.dead_neurons(network, data.validation, 8).share("dead")) < 0.05
