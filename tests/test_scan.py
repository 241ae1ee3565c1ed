"""Loops along time, by numba on a CPU and by Triton on a GPU, against single steps; Triton's also interpreted without one."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import spikeprop
import spikeprop as sp
from spikeprop import compiled, fused, scan, traces
from spikeprop.models import conv, mlp
from spikeprop.network import Network
from spikeprop.neuron import Neuron, NeuronState

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU (torch.cuda.is_available())")


def suits_interpreter(*tensors: Tensor) -> bool:
    return all(part.dtype == torch.float32 for part in tensors) and not compiled.watched()


@pytest.fixture(params=["numba", "triton interpreted", pytest.param("triton", marks=NO_GPU)])
def device(request, monkeypatch) -> Iterator[torch.device]:
    """Where tensors must lie for the loops of a compiler."""
    pytest.importorskip(request.param.split()[0])
    if request.param == "triton interpreted":  # which it is from the moment when the module is read
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setitem(sys.modules, "spikeprop.gpu_kernels", None)
        monkeypatch.delitem(sys.modules, "spikeprop.gpu_kernels")
        monkeypatch.delattr(spikeprop, "gpu_kernels", raising=False)
        monkeypatch.setattr(compiled, "suits", lambda *tensors: False)
        monkeypatch.setattr(compiled, "suits_gpu", suits_interpreter)
        compiled.gpu_loops.cache_clear()
    yield torch.device("cuda" if request.param == "triton" else "cpu")
    if request.param == "triton interpreted":
        compiled.gpu_loops.cache_clear()
        vars(spikeprop).pop("gpu_kernels", None)
        sys.modules.pop("spikeprop.gpu_kernels", None)


def single_steps(neuron: sp.LIF, state: NeuronState, drive: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Spikes, membranes, current and membrane at the end, by the definition."""
    activity, after = Neuron.run(neuron, state, drive, bias)
    return [*activity, *after]


def in_one_pass(neuron: sp.LIF, state: NeuronState, drive: Tensor, bias: Tensor | None) -> tuple[Tensor, ...] | None:
    numbers = {"alpha": neuron.alpha, "beta": neuron.beta, "threshold": neuron.threshold}
    own = neuron.bias if bias is None else bias
    return scan.advance(drive, *state, **numbers, bias=own, reset_mechanism=neuron.reset_mechanism)


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """What a function of :mod:`spikeprop.scan` returns from now on."""
    found: list[Any] = []
    own = getattr(scan, name)

    def call(*arguments: Any, **named: Any) -> Any:
        found.append(own(*arguments, **named))
        return found[-1]

    monkeypatch.setattr(scan, name, call)
    return found


NEURONS = {
    "membrane": lambda shape: sp.LIF(0.9),
    "current": lambda shape: sp.LIF(0.7, 0.5, alpha=0.6, bias=0.1),
    "per neuron": lambda shape: sp.LIF(torch.rand(shape), 0.2 + torch.rand(shape), alpha=torch.rand(shape) * 0.9),
    "per channel": lambda shape: sp.LIF(torch.rand(shape[0], *[1] * (len(shape) - 1)), alpha=torch.zeros(())),
}


@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
@pytest.mark.parametrize("kind", NEURONS)
@pytest.mark.parametrize("shape", [(300,), (3, 5, 7), (1,)], ids=str)
def test_one_pass_is_single_steps_bit_for_bit(device, shape, kind, reset) -> None:
    torch.manual_seed(0)
    neuron = NEURONS[kind](shape)
    neuron.reset_mechanism = reset
    neuron = neuron.to(device)
    drive = torch.randn(6, 5, *shape, device=device)
    bias = torch.randn(shape, device=device) * 0.3
    rest = neuron.initial_state(drive[0])
    for given, state in ((drive, rest), (drive[:1].expand(6, 5, *shape), rest), (drive[:2], NeuronState(drive[1], drive[2]))):
        for own in (bias, None):
            before = [part.clone() for part in state]
            found = in_one_pass(neuron, state, given, own)
            assert found is not None
            for one, other in zip(found, single_steps(neuron, state, given, own), strict=True):
                assert torch.equal(one, other)
            assert all(map(torch.equal, state, before)), "the caller's state stays"
            assert shape == (1,) or 0.0 < found[0].mean() < 1.0


@pytest.mark.parametrize("shape", [(6,), (6, 9), (6, 4, 9)], ids=str)
def test_bare_neurons(device, shape) -> None:
    drive = torch.randn(shape, device=device)
    neuron = sp.LIF(0.8, 0.5)
    state = neuron.initial_state(drive[0])
    found = in_one_pass(neuron, state, drive, None)
    assert found is not None and all(map(torch.equal, found, single_steps(neuron, state, drive, None)))


def test_what_it_does_not_suit(device) -> None:
    drive = torch.randn(6, 5, 9, device=device)
    neuron = sp.LIF()
    state = neuron.initial_state(drive[0])
    assert in_one_pass(neuron, state, drive, None) is not None
    wide = NeuronState(*(part.double() for part in state))
    assert in_one_pass(neuron, wide, drive.double(), None) is None, "another precision"
    assert in_one_pass(neuron, state, drive.requires_grad_(), None) is None, "a graph is recorded"
    assert in_one_pass(neuron, state, drive.detach(), torch.zeros(5, 9, device=device)) is None, "a bias per row"
    assert in_one_pass(neuron, state, torch._neg_view(drive.detach()), None) is None, "a view that torch alone can read"
    membrane = neuron.run(state, drive)[0].membrane
    membrane.sum().backward()
    assert drive.grad is not None


def test_one_drive_into_several_neurons(device) -> None:
    """What a parameter is wider than, it broadcasts over; only single steps know that."""
    drive, neuron = torch.ones(6, 1, device=device), sp.LIF(torch.linspace(0.1, 0.9, 9)).to(device)
    assert sp.lif(neuron, drive).spikes.shape == (6, 9)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_what_torch_watches_takes_single_steps(device) -> None:
    drive, tangent = torch.randn(2, 6, 5, 9, device=device)
    neuron = sp.LIF()
    state = neuron.initial_state(drive[0])

    def membranes(x: Tensor) -> Tensor:
        return neuron.run(state, x)[0].membrane

    wanted = torch.func.jvp(lambda x: Neuron.run(neuron, state, x)[0].membrane, (drive,), (tangent,))
    found = torch.func.jvp(membranes, (drive,), (tangent,))
    assert all(map(torch.equal, found, wanted)) and wanted[1].abs().sum() > 0.0
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(drive, tangent)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(membranes(dual)).tangent, wanted[1])
    other = torch.randn_like(drive)
    assert torch.equal(make_fx(membranes)(drive)(other), membranes(other))


class Rebellious(sp.LIF):
    """Neurons of a user's own."""

    def step(self, state, drive, bias=None, arithmetic=None):
        activity, state = super().step(state, drive, bias, arithmetic)
        return sp.Activity(1.0 - activity.spikes, activity.membrane), state


def test_neurons_that_spike_otherwise_are_left_alone(device) -> None:
    drive = torch.randn(6, 5, 9, device=device)
    for neuron in (sp.WinnerTakeAll(winners=2), Rebellious()):
        state = neuron.initial_state(drive[0])
        activity, _ = neuron.run(state, drive)
        assert torch.equal(activity.spikes, single_steps(neuron, state, drive, None)[0])
        assert not torch.equal(activity.spikes, sp.LIF().run(state, drive)[0].spikes)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_share_the_rows(threads, monkeypatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(scan, "A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    drive, neuron = torch.randn(6, 7, 50), sp.LIF(alpha=0.3)
    state = neuron.initial_state(drive[0])
    seen = []
    found = in_one_pass(neuron, state, drive, None)
    scan.share_out(seen.append, 7, 350)
    assert len(seen) == min(threads, 7) and sum(len(range(7)[part]) for part in seen) == 7
    assert found is not None and all(map(torch.equal, found, single_steps(neuron, state, drive, None)))


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        scan.share_out(lambda rows: 1 // rows.start, 2, 2 * scan.A_THREAD)


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(9,), (3, 4, 5)], ids=str)
def test_the_adjoint_scan_is_that_of_single_steps(device, shape, reset, gated, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    beta, alpha = torch.rand(2, *shape, generator=generator) * 0.9
    neuron = sp.LIF(beta, alpha=alpha, reset_mechanism=reset).to(device)
    error = torch.randn(7, 5, *shape, generator=generator).to(device)
    spikes = (torch.rand(7, 5, *shape, generator=generator) < 0.3).float().to(device)
    used = spy(monkeypatch, "back")
    found = traces.scan_back(neuron, error, spikes, gated=gated)
    assert [call is not None for call in used] == [True]
    wide = traces.scan_back(neuron.double(), error.double(), spikes.double(), gated=gated)
    torch.testing.assert_close(found, wide, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at", [None, [1, 3], []], ids=str)
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_low_pass_is_its_recursion_in_any_layout(device, channels_last, started, at, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, before = torch.randn(4, 3, 5, 6, 6, generator=generator), torch.randn(3, 5, 6, 6, generator=generator)
    if channels_last:
        x, before = (part.movedim(-3, -1).contiguous().movedim(-1, -3) for part in (x, before))
    x, before = x.to(device), before.to(device)
    expected, last = traces.low_pass(x.double(), 0.9, before.double() if started else None, at=at)
    used = spy(monkeypatch, "low_pass")
    found, end = traces.low_pass(x, 0.9, before.clone() if started else None, at=at)
    assert used == ([] if at == [] else [True])
    assert found.stride() == x[: len(found)].stride()
    torch.testing.assert_close(found, expected, check_dtype=False)
    torch.testing.assert_close(end, last, check_dtype=False)
    spikes = (x > 0.5).bfloat16()
    expected, last = traces.low_pass(spikes.double(), 0.9, before.double() if started else None, at=at)
    found, end = traces.low_pass(spikes, 0.9, before.clone() if started else None, at=at)
    torch.testing.assert_close(end, last, check_dtype=False)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=0.0)
    assert len(found) == 0 or float((found != expected.bfloat16()).float().mean()) < 0.01


def network_of(kind: str) -> Network:
    if kind == "conv":
        return conv((1, 8, 8), [4, 5], 3, kernel_size=3, stride=1, pool=2, hidden=(12,), seed=3)
    return mlp((1, 8, 8), [20, 300], 3, neuron=sp.LIF(0.9, 0.5, alpha=0.3 if kind == "currents" else 0.0), seed=3)


@pytest.mark.parametrize("trace", ["shared", "exact"])
@pytest.mark.parametrize("kind", ["mlp", "currents", "conv"])
def test_it_trains_as_single_steps_do(device, kind, trace, monkeypatch) -> None:
    monkeypatch.setattr(fused, "fits", lambda *what: False)  # SigProp's own loop on a CPU
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(5, 6, 1, 8, 8, generator=generator) < 0.4).float().to(device)
    rule = sp.SigProp(trace=trace, optimizer=partial(torch.optim.SGD, lr=0.05))
    labels, states, calls = (torch.arange(6) % 3).to(device), [], spy(monkeypatch, "advance")
    monkeypatch.setattr(compiled, "suits", compiled.suits)
    for loops in (True, False):
        if not loops:
            monkeypatch.setattr(compiled, "suits", lambda *tensors: False)
            monkeypatch.setattr(compiled, "suits_gpu", lambda *tensors: False)
        network = network_of(kind).to(device)
        state = rule.initial_state(network, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            _, state = rule.learn(network, rule.begin(state), x, labels)
        states.append(network.state_dict())
    done = [call is not None for call in calls]
    assert done and done == [True] * (len(done) // 2) + [False] * (len(done) // 2)
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("broken", [False, True])
def test_without_triton_there_are_no_loops_for_a_gpu(broken, monkeypatch) -> None:
    compiled.gpu_loops.cache_clear()
    monkeypatch.delattr(spikeprop, "gpu_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "spikeprop.gpu_kernels", None)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: object() if broken else None)
    if broken:
        with pytest.warns(UserWarning, match="triton is installed but does not work here"):
            assert compiled.gpu_loops() is None
    assert compiled.gpu_loops() is None
    compiled.gpu_loops.cache_clear()


def test_a_gpu_that_triton_cannot_build_for_takes_single_steps(monkeypatch) -> None:
    pytest.importorskip("triton")
    from spikeprop import gpu_kernels

    def refuse() -> None:
        raise RuntimeError("Failed to find C compiler")

    compiled.gpu_loops.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_kernels, "try_out", refuse)
    with pytest.warns(UserWarning, match="triton is installed but does not work here.*C compiler"):
        assert compiled.gpu_loops() is None
    compiled.gpu_loops.cache_clear()


KERNELS = {
    "advance": "drive neurons current membrane before spikes",
    "low_pass": "x places last filtered",
    "scan_back": "error spikes alpha beta at_membrane at_current responsible total",
}


@pytest.mark.parametrize("ones", [(), ("steps",), ("stride", "size", "features")], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_triton_compiles_its_loops_and_fuses_nothing(name, ones) -> None:
    """To the assembly of a GPU that need not be there; arguments equal to 1 become constants."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from spikeprop import gpu_kernels

    kernel, (block, fusion) = getattr(gpu_kernels, name), gpu_kernels.AS_WRITTEN.values()
    names = [parameter.name for parameter in kernel.params]
    chosen = [{"RESET": reset, "HAS_CURRENT": has} for reset in range(3) for has in (False, True)]
    for constants in {"advance": chosen, "low_pass": [{}], "scan_back": [{"GATED": False}, {"GATED": True}]}[name]:
        fixed = {**constants, "BLOCK": block, **dict.fromkeys(set(ones) & set(names), 1)}
        kinds = {each: "*fp32" for each in KERNELS[name].split()} | {"places": "*i64", "keep": "fp32"}
        signature = {each: "constexpr" if each in fixed else kinds.get(each, "i32") for each in names}
        source = ASTSource(kernel, signature, {(names.index(each),): value for each, value in fixed.items()}, {})
        assembly = compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": fusion}).asm["ptx"]
        assert "fma.rn.f32" not in assembly and ("mul.f32" in assembly or "mul.rn.f32" in assembly)
