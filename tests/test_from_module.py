"""snnTorch and Norse modules as networks, against the modules themselves run by their own libraries."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spikeprop as sp
from spikeprop.backends import loihi
from spikeprop.backends import norse as from_norse
from spikeprop.backends import snntorch as from_snntorch
from spikeprop.errors import BackendError, InputError, UnsupportedError

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch", reason="norse is not installed")

STEPS, BATCH = 40, 4


def spike_train(shape: Sequence[int], dtype: torch.dtype, steps: int = STEPS) -> Tensor:
    return (torch.rand(steps, BATCH, *shape, generator=torch.Generator().manual_seed(99)) < 0.4).to(dtype)


def uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape)


def leaky(beta: Any = 0.9, threshold: Any = 1.0, **more: Any) -> nn.Module:
    return snntorch.Leaky(beta, threshold, **{"reset_mechanism": "zero", "reset_delay": False, "init_hidden": True, **more})


def synaptic(alpha: Any, beta: Any, threshold: Any = 1.0, **more: Any) -> nn.Module:
    settings = {"reset_mechanism": "zero", "reset_delay": False, "init_hidden": True, **more}
    return snntorch.Synaptic(alpha, beta, threshold, **settings)


def amplify(module: nn.Module, gain: float = 3.1) -> nn.Module:
    """Torch draws weights too small for spikes in every layer."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part.weight.mul_(gain)
    return module


@torch.no_grad()
def spikes_in_snntorch(module: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Every layer of neurons, ``[T, B, ...]``. snnTorch spikes in float32, whatever it computes in."""
    parts = [part for part in module.modules() if not list(part.children())]
    spikes: list[list[Tensor]] = [[] for part in parts if isinstance(part, snntorch.SpikingNeuron)]
    for x in inputs:
        layers = iter(spikes)
        for part in parts:
            x = part(x)
            if isinstance(part, snntorch.SpikingNeuron):
                x = (x[0] if isinstance(x, tuple) else x).to(inputs.dtype)
                next(layers).append(x)
    return [torch.stack(layer) for layer in spikes]


@torch.no_grad()
def spikes_in_norse(module: nn.Module, inputs: Tensor) -> list[Tensor]:
    parts = [part for part in module.modules() if not list(part.children())]
    cells = [part for part in parts if isinstance(part, norse.LIFBoxCell)]
    state: dict[int, Any] = {id(cell): None for cell in cells}
    spikes: dict[int, list[Tensor]] = {id(cell): [] for cell in cells}
    for x in inputs:
        for part in parts:
            if id(part) in state:
                x, state[id(part)] = part(x, state[id(part)])
                spikes[id(part)].append(x)
            else:
                x = part(x)
    return [torch.stack(layer) for layer in spikes.values()]


def assert_same_spikes(network: sp.Network, inputs: Tensor, expected: list[Tensor], least: int = 20) -> None:
    found = [activity.spikes for activity in network.run(inputs)]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.sum() >= least and theirs.mean() < 0.9
        assert int((ours != theirs).sum()) == 0


# --- The same spikes ----------------------------------------------------------------------------------------------------------

Build = Callable[[], nn.Module]
SNNTORCH: dict[str, tuple[tuple[int, ...], Build]] = {
    "dense": ((12,), lambda: nn.Sequential(nn.Linear(12, 20), leaky(0.9), nn.Linear(20, 15), leaky(0.5, 0.7))),
    "no bias, IF and no memory": (
        (12,),
        lambda: nn.Sequential(nn.Linear(12, 20, bias=False), leaky(1.0), nn.Linear(20, 15), leaky(0.0, 0.3)),
    ),
    "per neuron": (
        (12,),
        lambda: nn.Sequential(
            nn.Linear(12, 20), leaky(uniform(0, 1, 20), uniform(0.5, 1.5, 20)), nn.Linear(20, 15), leaky(uniform(0, 1, 1, 15))
        ),
    ),
    "learned": (
        (12,),
        lambda: nn.Sequential(
            nn.Linear(12, 20),
            leaky(0.8, 0.9, learn_beta=True, learn_threshold=True, learn_graded_spikes_factor=True),
            nn.Linear(20, 15),
            leaky(uniform(0, 1, 15), learn_beta=True),
        ),
    ),
    "without reset": (
        (12,),
        lambda: nn.Sequential(
            nn.Linear(12, 20), leaky(0.3, reset_mechanism="none", reset_delay=True), nn.Linear(20, 15), leaky(0.8)
        ),
    ),
    "synaptic": (
        (12,),
        lambda: nn.Sequential(
            nn.Linear(12, 20, bias=False),
            synaptic(0.6, 0.8, 1.5),
            nn.Linear(20, 15, bias=False),
            synaptic(uniform(0, 0.9, 15), uniform(0, 0.9, 15), init_hidden=False),
        ),
    ),
    "synaptic without memory, with bias": ((12,), lambda: nn.Sequential(nn.Linear(12, 20), synaptic(0.0, 0.8))),
    "conv, pool, flatten": (
        (2, 9, 9),
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            leaky(0.9, uniform(0.5, 1.5, 4, 1, 1)),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 6, 2, stride=2, groups=2),
            leaky(uniform(0.3, 0.9, 6, 2, 2), 0.4),
            nn.Identity(),
            nn.Flatten(),
            nn.Linear(24, 10),
            leaky(0.8),
        ),
    ),
    "pooling behind the weights, nested": (
        (1, 8, 8),
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 3, 3, padding="same"), nn.AvgPool2d((2, 2)), leaky(0.6, 0.5)),
            nn.Sequential(nn.Conv2d(3, 5, 2, padding="valid"), nn.Flatten(1, -1), leaky(0.7, 0.4, output=True)),
        ),
    ),
    "neurons behind pooling alone": (
        (1, 6, 6),
        lambda: nn.Sequential(nn.AvgPool2d(2), leaky(0.5, uniform(0.2, 0.5, 3)), nn.Flatten(-3), nn.Linear(9, 5), leaky()),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SNNTORCH)
def test_snntorch_spikes_alike(name: str, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    shape, make = SNNTORCH[name]
    module = amplify(make().to(dtype))
    network, inputs = from_snntorch.from_module(module, shape, 7), spike_train(shape, dtype)
    assert not network.centred and network.layers[0].bias.dtype == dtype
    ours = [layer.synapse.weight for layer in network.layers if layer.synapse.weight is not None]
    theirs = [part.weight for part in module.modules() if hasattr(part, "weight")]
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    assert_same_spikes(network, inputs, spikes_in_snntorch(module, inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
def test_snntorch_is_equal_bit_for_bit_where_sums_are_exact(reset: str, dtype: torch.dtype) -> None:
    """Weights in 64ths make every sum exact in any order, so that membranes are the same numbers, bit for bit. Subtraction is
    the same for neurons whose drive stays up to the threshold, and so their membrane up to twice that."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(16, 24), leaky(0.9, 1.25, reset_mechanism=reset)).to(dtype)
    with torch.no_grad():
        for parameter in module[0].parameters():
            parameter.copy_(torch.randint(-6, 12, parameter.shape) / 64)
    inputs = spike_train((16,), dtype, 200)
    network = from_snntorch.from_module(module, (16,))
    activity = network.run(inputs)[0]
    drive = network.layers[0].drive(inputs) + network.layers[0].bias
    kept = drive.amax((0, 1)) <= (1.25 if reset == "subtract" else torch.inf)
    assert kept.sum() > 5
    with torch.no_grad():
        for x, spikes, membrane in zip(inputs, activity.spikes, activity.membrane, strict=True):
            theirs = module(x)
            after = {"zero": membrane * (1 - spikes), "subtract": membrane - spikes * 1.25, "none": membrane}[reset]
            assert torch.equal(spikes[:, kept], theirs[:, kept].to(dtype))
            assert torch.equal(after[:, kept], module[1].mem[:, kept])
    assert activity.spikes[:, :, kept].sum() > 1000


@pytest.mark.parametrize("make", [leaky, lambda **more: synaptic(0.5, **more)])
def test_snntorch_subtracts_alike_below_twice_the_threshold(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(2)
    module = nn.Sequential(
        nn.Linear(12, 20, bias=False), make(beta=0.9, reset_mechanism="subtract"), nn.Linear(20, 9, bias=False)
    )
    module.append(make(beta=0.7, threshold=0.8, reset_mechanism="subtract")).double()
    with torch.no_grad():
        for linear, threshold in ((module[0], 1.0), (module[2], 0.8)):
            reach = threshold if make is leaky else threshold * (1 - 0.5)  # a current adds up to 1 / (1 - alpha) drives
            linear.weight.abs_()
            linear.weight *= 0.99 * reach / linear.weight.sum(1, keepdim=True)
    inputs = spike_train((12,), torch.float64)
    network = from_snntorch.from_module(module, (12,))
    assert_same_spikes(network, inputs, spikes_in_snntorch(module, inputs))


def norse_cell(tau_mem_inv: Any = 100.0, dt: float = 1e-3, **changes: Any) -> nn.Module:
    values = {"tau_mem_inv": tau_mem_inv, "v_leak": 0.0, "v_th": 0.1, "v_reset": 0.0, **changes}
    tensors = {key: value if callable(value) else torch.as_tensor(value) for key, value in values.items()}
    return norse.LIFBoxCell(norse.LIFBoxParameters(**tensors), dt)


NORSE: dict[str, tuple[tuple[int, ...], Build]] = {
    "dense": ((12,), lambda: norse.SequentialState(nn.Linear(12, 20), norse_cell(), nn.Linear(20, 15), norse_cell(300.0))),
    "as Norse builds it": ((12,), lambda: norse.SequentialState(nn.Linear(12, 20, bias=False), norse.LIFBoxCell())),
    "all that one step keeps": ((12,), lambda: nn.Sequential(nn.Linear(12, 20), norse_cell(1.0, 1.0, v_th=0.9))),
    "per neuron, resting at v_leak": (
        (12,),
        lambda: norse.SequentialState(
            nn.Linear(12, 20),
            norse_cell(uniform(100, 900, 20), v_leak=-0.75, v_reset=-0.75, v_th=uniform(-0.7, -0.5, 20)),
        ),
    ),
    "subtract": (
        (12,),
        lambda: norse.SequentialState(
            nn.Linear(12, 20), norse_cell(200.0, reset_method=norse.functional.reset.reset_subtract, v_reset=5.0)
        ),
    ),
    "conv, pool, flatten": (
        (2, 9, 9),
        lambda: norse.SequentialState(
            nn.Conv2d(2, 4, 3, padding=1),
            norse_cell(uniform(50, 500, 4, 1, 1)),
            nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
            norse_cell(400.0),
        ),
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NORSE)
def test_norse_spikes_alike(name: str, seed: int) -> None:
    """In float64: Norse multiplies in another order, and no membrane of these lies within rounding of its threshold."""
    torch.manual_seed(seed)
    shape, make = NORSE[name]
    module = amplify(make().double(), 6.1)
    network, inputs = from_norse.from_module(module, shape), spike_train(shape, torch.float64)
    assert_same_spikes(network, inputs, spikes_in_norse(module, inputs))
    layer = network.layers[0]
    assert torch.equal(layer.synapse.weight, module[0].weight)
    assert all(
        ((activity.membrane - layer.neuron.threshold).abs() > 1e-9).all()
        for activity, layer in zip(network.run(inputs), network.layers, strict=True)
    )


def test_norses_own_sequential_says_the_same() -> None:
    torch.manual_seed(0)
    module = amplify(NORSE["conv, pool, flatten"][1](), 6.0).double()
    module = norse.SequentialState(module[0], module[1], *module[2], module[3])
    inputs = spike_train((2, 9, 9), torch.float64)
    spikes, state = [], None
    for x in inputs:
        out, state = module(x, state)
        spikes.append(out.detach())
    network = from_norse.from_module(module, (2, 9, 9))
    assert torch.stack(spikes).sum() > 20
    assert torch.equal(network.run(inputs)[-1].spikes, torch.stack(spikes))


def test_snntorchs_own_sequential_says_the_same() -> None:
    """Its prediction, the neuron with most spikes, is the network's before any training."""
    torch.manual_seed(0)
    module = amplify(SNNTORCH["dense"][1]())
    inputs = spike_train((12,), torch.float32)
    with torch.no_grad():
        counts = torch.stack([module(x) for x in inputs]).sum(0)
    network = from_snntorch.from_module(module, (12,))
    rates = network.run(inputs)[-1].spikes.mean(0)
    assert torch.equal(network.readout(rates), counts / STEPS)
    assert network.outputs == 15 and len(counts.argmax(1).unique()) > 1


# --- What a network gets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("convert", "modules"), [(from_snntorch, SNNTORCH), (from_norse, NORSE)])
def test_modules_and_random_numbers_are_left_alone(convert: Any, modules: Any) -> None:
    torch.manual_seed(0)
    for shape, make in modules.values():
        module = make()
        before, drawn = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
        network = convert.from_module(module, shape, 3)
        assert torch.equal(drawn, torch.random.get_rng_state())
        for tensor in (*network.parameters(), *network.buffers()):
            assert not tensor.requires_grad
            tensor.add_(1.0)
        after = module.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert all(parameter.requires_grad for parameter in module.parameters())


def test_outputs_choose_the_readout() -> None:
    module = nn.Sequential(nn.Linear(3, 5), leaky())
    same = from_snntorch.from_module(module, (3,), 5)
    assert torch.equal(same.readout.weight, torch.eye(5))
    other = from_snntorch.from_module(module, (3,), 2)
    assert other.readout.weight.shape == (2, 5) and not other.readout.weight.any()
    pictures = nn.Sequential(nn.Conv2d(1, 4, 3), leaky())
    assert not from_snntorch.from_module(pictures, (1, 5, 5), 4).readout.weight.any()


def test_a_network_survives_saving(tmp_path: Any) -> None:
    torch.manual_seed(0)
    for number, (shape, make) in enumerate(SNNTORCH.values()):
        network = from_snntorch.from_module(amplify(make()), shape, 7)
        sp.save(network, tmp_path / f"{number}.safetensors")
        inputs = spike_train(shape, torch.float32)
        for ours, theirs in zip(network.run(inputs), sp.load(tmp_path / f"{number}.safetensors").run(inputs), strict=True):
            assert torch.equal(ours.membrane, theirs.membrane)


@pytest.mark.parametrize("trace", ["shared", "exact"])
@pytest.mark.parametrize(
    ("convert", "name"), [(from_snntorch, name) for name in SNNTORCH] + [(from_norse, name) for name in NORSE]
)
def test_training_goes_on_from_there(convert: Any, name: str, trace: str) -> None:
    torch.manual_seed(0)
    shape, make = (SNNTORCH if convert is from_snntorch else NORSE)[name]
    network = convert.from_module(amplify(make(), 6.0), shape, 3)
    before = copy.deepcopy(network)
    rule = sp.SigProp(trace=trace)
    rule.learn(network, rule.initial_state(network), spike_train(shape, torch.float32), torch.tensor([0, 1, 2, 1]))
    for layer, old in zip(network.layers, before.layers, strict=True):
        assert torch.isfinite(layer.bias).all() and not torch.equal(layer.bias, old.bias)
        if layer.synapse.weight is not None:
            assert torch.isfinite(layer.synapse.weight).all() and not torch.equal(layer.synapse.weight, old.synapse.weight)
    assert not torch.equal(network.readout.weight, before.readout.weight)


@pytest.mark.parametrize(
    ("convert", "name"),
    [(from_snntorch, name) for name in ("dense", "per neuron", "synaptic", "conv, pool, flatten", "learned")]
    + [(from_norse, name) for name in ("dense", "per neuron, resting at v_leak", "conv, pool, flatten")],
)
def test_the_chip_takes_it(convert: Any, name: str) -> None:
    """Fixed point rounds weights to 8 bits: nearly all spikes are those of the library itself."""
    torch.manual_seed(0)
    shape, make = (SNNTORCH if convert is from_snntorch else NORSE)[name]
    module = amplify(make(), 3.0 if convert is from_snntorch else 6.0)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(getattr(part, "beta", None), Tensor):
                part.beta.clamp_(0.01, 0.99)  # what a 12-bit decay can say
    inputs = spike_train(shape, torch.float32)
    chip = loihi.quantize(convert.from_module(module, shape), inputs="spikes")
    found = loihi.simulate(chip, loihi.encode(chip, inputs))
    expected = (spikes_in_snntorch if convert is from_snntorch else spikes_in_norse)(module, inputs)
    for ours, theirs in zip(found.spikes, expected, strict=True):
        assert theirs.sum() > 20
        assert np.mean(np.asarray(ours).reshape(theirs.shape) != theirs.numpy()) < 0.05


# --- Refusals -----------------------------------------------------------------------------------------------------------------


class Lambda(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def changed(neurons: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(neurons, name, value)
    return neurons


def loaded(neurons: nn.Module, other: nn.Module) -> nn.Module:
    neurons.load_state_dict(other.state_dict())
    return neurons


def dense(neurons: nn.Module, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2, bias=bias), neurons)


def picture(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts, leaky())


def nan(linear: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        getattr(linear, name).view(-1)[0] = torch.nan
    return linear


def twice() -> nn.Sequential:
    neurons = leaky()
    return nn.Sequential(nn.Linear(3, 3), neurons, nn.Linear(3, 3), neurons)


UNKNOWN = r"a network is made of Linear, Conv2d, AvgPool2d, Flatten, Identity, Leaky, Synaptic; remove"
REFUSED: list[tuple[Build, type[Exception], str]] = [
    # the Sequential
    (lambda: nn.Linear(3, 2), UnsupportedError, r"^a Linear does not say in which order.*put them into a Sequential"),
    (lambda: Residual(nn.Linear(3, 3), leaky()), UnsupportedError, "a Residual does not say"),
    (lambda: nn.Sequential(), UnsupportedError, "the Sequential: no neurons follow.*add Leaky"),
    (lambda: nn.Sequential(nn.Linear(3, 2)), UnsupportedError, "module 0, Linear: no neurons follow.*add Leaky"),
    (
        lambda: nn.Sequential(nn.Linear(3, 2), leaky(), nn.Linear(2, 2)),
        UnsupportedError,
        "module 2, Linear: no neurons follow, but a network ends in neurons",
    ),
    (lambda: nn.Sequential(leaky()), UnsupportedError, "module 0, Leaky: nothing drives these neurons; put weights or pooling"),
    (lambda: nn.Sequential(nn.Linear(3, 2), leaky(), leaky()), UnsupportedError, "module 2, Leaky: nothing drives"),
    (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.Linear(2, 2), leaky()),
        UnsupportedError,
        "module 2, Linear: second weights with no neurons since the first; multiply the two",
    ),
    (twice, UnsupportedError, r"module 3, Leaky: the same object as module 1, Leaky.*copy\.deepcopy"),
    (lambda: dense(Lambda()), UnsupportedError, f"module 1, Lambda: {UNKNOWN}"),
    (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(), leaky()),
        UnsupportedError,
        f"module 1, Dropout: {UNKNOWN} what acts in training only, such as Dropout",
    ),
    (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), leaky()),
        UnsupportedError,
        "module 0.1, BatchNorm1d: a network is made of",
    ),
    (lambda: dense(snntorch.RLeaky(0.9, all_to_all=False)), UnsupportedError, "module 1, RLeaky: a network is made of"),
    (lambda: dense(snntorch.Alpha(0.9, 0.8)), UnsupportedError, "module 1, Alpha: a network is made of"),
    (lambda: dense(norse.LIFBoxCell()), UnsupportedError, "module 1, LIFBoxCell: a network is made of"),
    # shapes and values
    (
        lambda: nn.Sequential(nn.Linear(4, 2), leaky()),
        InputError,
        r"module 0, Linear: Dense\(4, 2\): the input has shape \(3,\)",
    ),
    (lambda: nn.Sequential(nn.AvgPool2d(2), leaky()), InputError, r"module 0, AvgPool2d: AvgPool2d\(2\).*shape \(3,\)"),
    (lambda: nn.Sequential(nan(nn.Linear(3, 2), "weight"), leaky()), InputError, "module 0, Linear: weight holds NaN"),
    (lambda: nn.Sequential(nan(nn.Linear(3, 2), "bias"), leaky()), InputError, "module 0, Linear: bias holds NaN"),
    # Leaky and Synaptic
    (lambda: dense(leaky(reset_delay=True)), UnsupportedError, "module 1, Leaky: reset_delay = True.*use reset_delay=False"),
    (
        lambda: dense(synaptic(0.5, 0.5, reset_delay=True), bias=False),
        UnsupportedError,
        "module 1, Synaptic: reset_delay = True",
    ),
    (
        lambda: dense(leaky(graded_spikes_factor=2.0)),
        UnsupportedError,
        "module 1, Leaky: graded_spikes_factor = 2,.*set it to 1",
    ),
    (
        lambda: dense(leaky(graded_spikes_factor=torch.tensor([1.0, 0.5]))),
        UnsupportedError,
        "module 1, Leaky: graded_spikes_factor = 0.5",
    ),
    (lambda: dense(leaky(state_quant=torch.round)), UnsupportedError, "module 1, Leaky: state_quant is set.*build it without"),
    (lambda: dense(leaky(spike_grad=torch.sigmoid)), UnsupportedError, r"module 1, Leaky: spike_grad.*snntorch\.surrogate"),
    (
        lambda: dense(changed(leaky(), reset_mechanism="none")),
        UnsupportedError,
        "module 1, Leaky: reset_mechanism = 'none' is not",
    ),
    (
        lambda: dense(loaded(leaky(), leaky(reset_mechanism="subtract"))),
        UnsupportedError,
        "module 1, Leaky: reset_mechanism = 'zero' is not what it was built with, or not what was loaded; build it",
    ),
    (lambda: dense(leaky(1.5)), InputError, r"module 1, Leaky: beta = 1.5 lies outside \[0, 1\].*beta\.data\.clamp_\(0, 1\)"),
    (lambda: dense(leaky(torch.tensor([0.5, -0.25]))), InputError, "module 1, Leaky: beta = -0.25 lies outside"),
    (lambda: dense(leaky(float("nan"))), InputError, "module 1, Leaky: beta = nan lies outside"),
    (
        lambda: dense(leaky(uniform(0, 1, 3))),
        InputError,
        r"module 1, Leaky: beta has shape \(3,\), its neurons \(2,\); give one",
    ),
    (lambda: dense(leaky(uniform(0, 1, 4, 1))), InputError, r"module 1, Leaky: beta has shape \(4, 1\), its neurons \(2,\)"),
    (lambda: dense(leaky(0.9, uniform(0, 1, 3))), InputError, r"module 1, Leaky: threshold has shape \(3,\)"),
    (lambda: dense(leaky(0.9, 0.0)), InputError, "module 1, Leaky: LIF: threshold = 0 lies outside.*would spike at rest"),
    (lambda: dense(leaky(0.9, torch.tensor([1.0, -1.0]))), InputError, "module 1, Leaky: LIF: threshold = -1 lies outside"),
    (lambda: dense(synaptic(1.25, 0.5), bias=False), InputError, r"module 1, Synaptic: alpha = 1.25 lies outside \[0, 1\]"),
    (lambda: dense(synaptic(1.0, 0.5), bias=False), InputError, "module 1, Synaptic: LIF: alpha = 1 lies outside.*never fades"),
    (lambda: dense(synaptic(0.5, 0.5)), UnsupportedError, "module 1, Synaptic: the bias before it, up to .*use bias=False"),
]
PICTURES: list[tuple[Build, type[Exception], str]] = [
    (
        lambda: picture(nn.Conv2d(2, 3, 3)),
        InputError,
        r"module 1, Leaky: the last neurons form pictures of shape \(3, 6, 6\); say",
    ),
    (lambda: picture(nn.Conv2d(2, 3, (3, 2))), UnsupportedError, r"module 0, Conv2d: kernel_size = \(3, 2\).*make them equal"),
    (lambda: picture(nn.Conv2d(2, 3, 3, stride=(1, 2))), UnsupportedError, r"module 0, Conv2d: stride = \(1, 2\)"),
    (lambda: picture(nn.Conv2d(2, 3, 3, padding=(1, 0))), UnsupportedError, r"module 0, Conv2d: padding = \(1, 0\)"),
    (lambda: picture(nn.Conv2d(2, 3, 3, dilation=2)), UnsupportedError, "module 0, Conv2d: dilation = 2.*dilation=1"),
    (
        lambda: picture(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")),
        UnsupportedError,
        "module 0, Conv2d: dilation = 1, padding_mode = 'circular'; a network has .*padding_mode='zeros'",
    ),
    (
        lambda: picture(nn.Conv2d(2, 3, 2, padding="same")),
        UnsupportedError,
        "module 0, Conv2d: padding 'same'.*kernel_size = 2",
    ),
    (lambda: picture(nn.Conv2d(1, 3, 3)), InputError, r"module 0, Conv2d: Conv2d: the input has shape \(2, 8, 8\)"),
    (
        lambda: picture(nn.AvgPool2d(2, stride=1)),
        UnsupportedError,
        "module 0, AvgPool2d: kernel_size = 2, stride = 1,.*use stride",
    ),
    (lambda: picture(nn.AvgPool2d((2, 1))), UnsupportedError, r"module 0, AvgPool2d: kernel_size = \(2, 1\)"),
    (lambda: picture(nn.AvgPool2d(2, padding=1)), UnsupportedError, "module 0, AvgPool2d: .*padding = 1"),
    (lambda: picture(nn.AvgPool2d(2, ceil_mode=True)), UnsupportedError, "module 0, AvgPool2d: .*ceil_mode = True"),
    (lambda: picture(nn.AvgPool2d(2, divisor_override=3)), UnsupportedError, "module 0, AvgPool2d: .*divisor_override = 3"),
    (lambda: picture(nn.Flatten(2)), UnsupportedError, "module 0, Flatten: start_dim = 2, end_dim = -1.*use start_dim=1"),
    (lambda: picture(nn.Flatten(0)), UnsupportedError, "module 0, Flatten: start_dim = 0"),
    (lambda: picture(nn.Flatten(1, 2)), UnsupportedError, "module 0, Flatten: start_dim = 1, end_dim = 2"),
    (lambda: picture(nn.MaxPool2d(2)), UnsupportedError, "module 0, MaxPool2d: a network is made of"),
    (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), leaky(uniform(0, 1, 3))),
        InputError,
        r"module 1, Leaky: beta has shape \(3,\), its neurons \(3, 6, 6\)",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_snntorch_refusals(make: Build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_snntorch.from_module(make(), (3,))


@pytest.mark.parametrize(("make", "error", "message"), PICTURES)
def test_picture_refusals(make: Build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_snntorch.from_module(make(), (2, 8, 8))


def test_inhibition_is_refused() -> None:
    with pytest.warns(UserWarning, match="Inhibition"):
        neurons = leaky(inhibition=True)
    with pytest.raises(UnsupportedError, match=r"module 1, Leaky: inhibition is set.*build it without"):
        from_snntorch.from_module(dense(neurons), (3,))


def forget(z: Tensor, v: Tensor, reset: Tensor, th: Tensor) -> Tensor:
    return v


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (lambda: norse_cell(v_reset=0.25), UnsupportedError, "v_reset and v_leak are up to 0.25 apart.*make them equal"),
        (
            lambda: norse_cell(v_leak=-0.5, reset_method=norse.functional.reset.reset_subtract),
            UnsupportedError,
            "v_leak of up to 0.5 with reset_subtract.*use v_leak = 0",
        ),
        (
            lambda: norse_cell(reset_method=forget),
            UnsupportedError,
            "does not reset by forget; use reset_value or reset_subtract",
        ),
        (lambda: norse_cell(2000.0), InputError, r"dt tau_mem_inv = 2 lies outside \(0, 1\].*use 0 < dt <= 1 / tau_mem_inv"),
        (lambda: norse_cell(torch.tensor([100.0, 0.0])), InputError, "dt tau_mem_inv = 0 lies outside"),
        (lambda: norse_cell(v_th=-0.1), InputError, "LIF: threshold = -1 lies outside.*spike at rest"),
        (lambda: norse_cell(uniform(10, 900, 3)), InputError, r"dt tau_mem_inv has shape \(3,\), its neurons \(2,\); give one"),
        (lambda: norse_cell(v_th=uniform(1, 2, 3)), InputError, r"v_th has shape \(3,\), its neurons \(2,\)"),
    ],
)
def test_norse_refusals(cell: Build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"module 1, LIFBoxCell: .*{message}"):
        from_norse.from_module(norse.SequentialState(nn.Linear(3, 2), cell()), (3,))


@pytest.mark.parametrize("cell", [lambda: norse.LIFCell(), lambda: norse.LICell(), leaky])
def test_norse_refuses_other_neurons(cell: Build) -> None:
    with pytest.raises(UnsupportedError, match=r"module 1, \w+: a network is made of Linear, .*, Identity, LIFBoxCell; remove"):
        from_norse.from_module(norse.SequentialState(nn.Linear(3, 2), cell()), (3,))


@pytest.mark.parametrize(
    ("convert", "library", "remedy"),
    [
        (from_snntorch, "snntorch", r"snnTorch is not installed.*pip install snntorch"),
        (from_norse, "norse", r"pip install --no-deps"),
    ],
)
def test_a_missing_library_is_named(convert: Any, library: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BackendError, match=remedy):
        convert.from_module(dense(leaky()), (3,))
