"""The compiled path of SigProp against the plain one, which is its definition."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import spikeprop
import spikeprop as sp
from spikeprop import compiled, fused, traces
from spikeprop.models import conv, heterogeneous, mlp
from spikeprop.network import Network
from spikeprop.rules import sigprop
from spikeprop.rules.sigprop import SigProp

pytest.importorskip("numba")
CLASSES, STEPS = 4, 6
READINGS = (sp.ATan(), sp.ATan(2.0), sp.Membrane(), sp.Membrane(clip=0.5), sp.Membrane(clip=None))


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def network_of(kind: str, neuron: sp.LIF, seed: int) -> Network:
    if kind == "mlp":
        return mlp((1, 10, 10), [70, 1100], CLASSES, neuron=neuron, seed=seed)  # 1100: more than one block of the filter
    if kind == "heterogeneous":
        neurons = heterogeneous((2.0, 20.0), (1.0, 9.0), threshold=neuron.threshold)
        return mlp((1, 10, 10), [70, 30], CLASSES, neuron=neurons, seed=seed)
    biases = "channel" if kind == "conv per channel" else "neuron"
    return conv((1, 10, 10), [5, 6], CLASSES, neuron=neuron, stride=1, kernel_size=3, hidden=(20,), biases=biases, seed=seed)


def batch_of(size: int, constant: bool, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(STEPS, size, 1, 10, 10, generator=generator)
    return x[:1].expand_as(x) if constant else x, torch.randint(0, CLASSES, (size,), generator=generator)


def whole(error: Tensor | traces.Factored) -> Tensor:
    if isinstance(error, Tensor):
        return error
    return torch.cat([error.weights @ error.responses, error.contexts], 1)


def both_ways(network: Network, rule: SigProp, inputs: Tensor, labels: Tensor) -> list[tuple[fused.Local, fused.Local]]:
    """What every layer's own learning finds by the compiled path, and by the plain one from the same drive and state."""
    found, compiled_learn = [], fused.learn

    def twice(*arguments, **options):
        fast = compiled_learn(*arguments, **options)
        with matmul_precision("highest"):  # the plain path's loss is made of products, too
            found.append((fast, sigprop.learn_locally(*arguments)))
        return fast

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "learn", twice)
        state = rule.begin(rule.initial_state(network, generator=torch.Generator().manual_seed(0)))
        rule.learn(network, state, inputs, labels)
    return found


@settings(deadline=None)  # the first case waits for the compiler
@given(
    st.sampled_from(["mlp", "conv", "conv per channel", "heterogeneous"]),
    st.sampled_from(READINGS),
    st.builds(
        sp.LIF,
        st.sampled_from([0.0, 0.9, 1.0]),
        st.sampled_from([0.3, 1.0, 2.0]),
        alpha=st.sampled_from([0.0, 0.6]),
        reset_mechanism=st.sampled_from(["zero", "subtract", "none"]),
    ),
    st.sampled_from([1, 7, 32]),
    st.booleans(),
    st.sampled_from([None, 2, 4]),
    st.sampled_from(["cosine", "dot"]),
    st.sampled_from([None, 3]),
    st.sampled_from([None, 2, 3]),
    st.sampled_from(["highest", "medium"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_it_computes_what_the_plain_path_computes(
    kind, learn_on, neuron, size, constant, regions, similarity, window, read_every, precision, own_thresholds, seed
) -> None:
    loss = sp.SimilarityCrossEntropy(similarity=similarity)
    band = sp.Homeostasis(act_on="threshold" if own_thresholds else "bias")
    rule = SigProp(learn_on, loss, regions=regions, update_every=window, read_every=read_every, homeostasis=band)
    inputs, labels = batch_of(size, constant, seed)
    network = network_of(kind, neuron, seed)
    network.input_mean.copy_(inputs.mean((0, 1)))
    with matmul_precision(precision):
        both = both_ways(network, rule, inputs, labels)
    assert len(both) == len(network.layers) * (1 if window is None else STEPS // window)
    for fast, plain in both:
        assert len(fast.error) == len(plain.error) == (window or STEPS) // (read_every or 1)
        assert torch.equal(fast.spikes, plain.spikes)
        assert torch.equal(fast.state.membrane, plain.state.membrane)
        assert bool((torch.as_tensor(network.layers[0].neuron.alpha) == 0.0).all()) or torch.equal(
            fast.state.current, plain.state.current
        )
        assert torch.equal(fast.activity, plain.activity)
        assert fast.counts is None or torch.equal(fast.counts, plain.counts)
        torch.testing.assert_close(fast.phi, plain.phi, rtol=1e-5, atol=1e-3)
        assert math.isclose(fast.loss, plain.loss, rel_tol=1e-4, abs_tol=1e-2 if size == 1 else 1e-3)
        scale = float(plain.error.norm())
        # A single row may lie so close to its running mean that the difference is rounding, half of it or all.
        least = 2e-4 if size == 1 else 1e-5
        low_rank = isinstance(fast.error, traces.Factored)
        suits = similarity == "dot" and learn_on == sp.Membrane(clip=None) and size >= 4 * CLASSES
        assert low_rank == (suits and plain.error.dim() == 3 and kind != "heterogeneous")
        error, wanted = whole(fast.error), plain.error
        rounding = 2e-2 if size == 1 else 1e-3 if error.dtype == torch.float32 else 2**-8
        error = error.float()
        assert float((error - wanted).norm()) <= rounding * scale + least
        assert fast.error_sum is not None
        assert float((fast.error_sum - error.sum(1)).norm()) <= rounding * scale * (size + CLASSES) ** 0.5 + least


@pytest.mark.parametrize("threshold", [1.0, 0.4])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_gradient_from_factors_is_that_from_all_rows(kind, constant, threshold, monkeypatch) -> None:
    """Over two calls, the first of which ends between two readings, so that traces and windows go on."""
    inputs, labels = batch_of(32, constant, 0)
    loss = sp.SimilarityCrossEntropy(similarity="dot")
    how = {"update_every": STEPS, "read_every": 3, "optimizer": partial(torch.optim.SGD, lr=1.0)}
    rule, learned, factored = SigProp(sp.Membrane(clip=None), loss, **how), [], []
    for choose in (fused.factors, lambda *what: False):
        monkeypatch.setattr(fused, "factors", lambda *what, choose=choose: factored.append(choose(*what)) or factored[-1])
        network = network_of(kind, sp.LIF(0.9, threshold), 0)
        network.input_mean.copy_(inputs.mean((0, 1)))
        state = rule.begin(rule.initial_state(network, generator=torch.Generator().manual_seed(0)))
        for part in inputs.split([2, STEPS - 2]):
            _, state = rule.learn(network, state, part, labels)
        learned.append(network.state_dict())
    dense = [False, False, True] if kind == "conv" else [True, True]
    assert factored == dense * 2 + [False] * 2 * len(dense)
    start = network_of(kind, sp.LIF(0.9, threshold), 0).state_dict()
    for name, tensor in learned[0].items():
        change = tensor - start.get(name, torch.zeros_like(tensor))
        torch.testing.assert_close(tensor, learned[1][name], rtol=0.0, atol=1e-4 * float(change.abs().max()) + 1e-6, msg=name)
        assert not name.endswith("weight") or change.abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("rule", [SigProp(), SigProp(sp.Membrane(clip=None), sp.SimilarityCrossEntropy(similarity="dot"))])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_stretch_may_have_no_reading(kind, rule, constant, precision) -> None:
    """Weights after one window, learned in stretches of which some are not read and learned whole."""
    inputs, labels = batch_of(32, constant, 0)
    rule = replace(rule, update_every=STEPS, read_every=3, optimizer=partial(torch.optim.SGD, lr=1.0))
    learned = []
    with matmul_precision(precision):
        for stretches in ([STEPS], [2, 2, 2], [1, 3, 2]):
            network = network_of(kind, sp.LIF(0.9), 0)
            network.input_mean.copy_(inputs.mean((0, 1)))
            state = rule.begin(rule.initial_state(network, generator=torch.Generator().manual_seed(0)))
            for part in inputs.split(stretches):
                _, state = rule.learn(network, state, part, labels)
            learned.append(network.state_dict())
    start = network_of(kind, sp.LIF(0.9), 0).state_dict()
    for name, tensor in learned[0].items():
        change = float((tensor - start.get(name, torch.zeros_like(tensor))).abs().max())
        for other in learned[1:]:
            exact = precision == "highest"
            torch.testing.assert_close(other[name], tensor, rtol=0.0, atol=(1e-4 if exact else 0.02) * change + 1e-6, msg=name)


def test_a_loss_that_is_no_number_stays_none() -> None:
    """Similarities beyond float32 must not pass for small derivatives."""
    inputs, labels = batch_of(32, False, 0)
    network = network_of("mlp", sp.LIF(0.9), 0)
    rule = SigProp(sp.Membrane(clip=None), sp.SimilarityCrossEntropy(similarity="dot"), homeostasis=None)
    answer, _ = rule.learn(network, rule.begin(rule.initial_state(network)), inputs * 1e20, labels)
    assert torch.isnan(answer.loss[0]) and torch.isnan(network.layers[0].synapse.parts[1].weight).any()


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_it_is_what_a_plain_fit_takes(kind) -> None:
    inputs, labels = batch_of(8, False, 0)
    assert len(both_ways(network_of(kind, sp.LIF(), 0), SigProp(), inputs, labels)) == (2 if kind == "mlp" else 3)


def chain_of_kinds() -> Network:
    """Convolution, a layer that only averages, a dense one."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        (sp.Conv2d(1, 5, 3, padding=1, gain=3.0, generator=generator), sp.LIF(0.9)),
        (sp.AvgPool2d(2), sp.LIF(0.9, 0.3)),
        (sp.Chain(sp.Flatten(), sp.Dense(125, 20, gain=3.0, generator=generator)), sp.LIF(0.9)),
    ]
    return sp.Network((1, 10, 10), layers, CLASSES)


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("kind", ["mlp", "conv", "chain"])
def test_it_sees_the_spikes_that_the_network_sends(kind, precision) -> None:
    inputs, labels = batch_of(8, False, 0)
    network, rule = chain_of_kinds() if kind == "chain" else network_of(kind, sp.LIF(), 0), SigProp(update_every=STEPS)
    with matmul_precision(precision):
        expected = [activity.spikes.mean((0, 1)) for activity in network.run(inputs)]
        answer, state = rule.learn(network, rule.begin(rule.initial_state(network)), inputs, labels)
    assert min(float(each.mean()) for each in expected) > 0.01
    for found, wanted in zip(answer.activity, expected, strict=True):
        # A row more in a product may change the order of its sums, and a spike at the edge with it.
        assert float((found - wanted).abs().max()) <= 1.0 / (8 * STEPS) + 1e-6
        assert float((found - wanted).abs().mean()) < 1e-3
    assert state.stream is not None
    assert {part.dtype for neurons in state.stream.neurons for part in neurons} == {torch.float32}


@pytest.mark.parametrize("read_every", [1, 2])
@pytest.mark.parametrize("trace", ["shared", "exact"])
@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-4), ("medium", 2**-6)])
@pytest.mark.parametrize("kind", ["mlp", "conv", "chain"])
def test_it_moves_the_weights_as_the_plain_path_does(kind, precision, tolerance, trace, read_every, monkeypatch) -> None:
    inputs, labels = batch_of(16, False, 1)
    descent = partial(torch.optim.SGD, lr=1e-3)
    rule = SigProp(sp.ATan(), trace=trace, update_every=3, read_every=read_every, optimizer=descent, homeostasis=None)
    moved = []
    for fast in (True, False):
        network = chain_of_kinds() if kind == "chain" else network_of(kind, sp.LIF(alpha=0.4), 0)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with monkeypatch.context() as patch, matmul_precision(precision):
            if not fast:
                patch.setattr(compiled, "suits", lambda *tensors: False)
            rule.learn(
                network, rule.begin(rule.initial_state(network, generator=torch.Generator().manual_seed(0))), inputs[:3], labels
            )
        moved.append({name: tensor - before[name] for name, tensor in network.state_dict().items() if name in before})
    for name, change in moved[1].items():
        assert float((moved[0][name] - change).norm()) <= tolerance * float(change.norm()) + 1e-7, name


def test_weights_that_leave_come_with_a_bias_of_full_precision() -> None:
    network = mlp((784,), [64], CLASSES, neuron=sp.LIF(0.9, alpha=0.9))
    network.input_mean.copy_(torch.rand(784, generator=torch.Generator().manual_seed(0)))
    with matmul_precision("medium"):
        found = network.fold_bias(0, exact=True)
        assert torch.get_float32_matmul_precision() == "medium"
    with matmul_precision("highest"):
        torch.testing.assert_close(found, network.fold_bias(0))
        wide = network.double()
        torch.testing.assert_close(found.double(), wide.fold_bias(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "neuron", "dtype"),
    [
        (SigProp(sp.Sigmoid()), sp.LIF(), torch.float32),
        (SigProp(loss=sp.Hebbian()), sp.LIF(), torch.float32),
        (SigProp(loss=sp.Pairwise()), sp.LIF(), torch.float32),
        (SigProp(), sp.WinnerTakeAll(winners=3), torch.float32),
        (SigProp(), sp.LIF(), torch.float64),
    ],
)
def test_what_it_does_not_have_takes_the_plain_path(rule, neuron, dtype, monkeypatch) -> None:
    monkeypatch.setattr(fused, "learn", None)
    inputs, labels = batch_of(8, False, 0)
    network = network_of("mlp", neuron, 0).to(dtype)
    rule.learn(network, rule.begin(rule.initial_state(network)), inputs.to(dtype), labels)


@pytest.mark.parametrize("broken", [False, True])
def test_without_numba_the_plain_path_learns(broken, monkeypatch) -> None:
    compiled.loops.cache_clear()
    if broken:
        monkeypatch.setitem(sys.modules, "spikeprop.kernels", None)
        monkeypatch.delattr(spikeprop, "kernels", raising=False)
        with pytest.warns(UserWarning, match="numba is installed but does not work here"):
            assert compiled.loops() is None
    else:
        monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    inputs, labels = batch_of(8, False, 0)
    network, rule = network_of("conv", sp.LIF(), 0), SigProp()
    with monkeypatch.context() as patch:
        patch.setattr(fused, "learn", None)
        answer, _ = rule.learn(network, rule.begin(rule.initial_state(network)), inputs, labels)
    compiled.loops.cache_clear()
    assert torch.isfinite(answer.loss).all()


def test_a_state_that_the_caller_keeps_does_not_change(monkeypatch) -> None:
    inputs, labels = batch_of(8, False, 0)
    network, rule = network_of("mlp", sp.LIF(alpha=0.5), 0), SigProp(update_every=STEPS)
    state = rule.begin(rule.initial_state(network))
    _, state = rule.learn(network, state, inputs[:3], labels)
    assert state.stream is not None
    before = [part for neurons in state.stream.neurons for part in neurons]
    copies = [part.clone() for part in before]
    rule.learn(network, state, inputs[3:], labels)
    assert all(torch.equal(part, copy) for part, copy in zip(before, copies, strict=True))
    assert not any(part.is_inference() for part in before)


def test_loops_out_of_the_cache_round_as_those_just_compiled(tmp_path) -> None:
    script = """
import hashlib, torch
from parallel_worker import train
torch.set_num_threads(1)
for model, rule in (("mlp", "surrogate"), ("mlp", "windows"), ("mlp", "adam"), ("conv", "surrogate")):
    network, _ = train({"model": model, "rule": rule, "parallel": None, "batch": 10}, None)
    print(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in network.state_dict().values())).hexdigest())
"""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    how = {"env": {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}, "capture_output": True, "text": True}
    cold, warm = (subprocess.run([sys.executable, "-c", script], timeout=240.0, **how) for _ in range(2))
    assert cold.returncode == warm.returncode == 0, cold.stderr + warm.stderr
    assert list(tmp_path.rglob("kernels.learn*.nbc"))
    assert len(cold.stdout.split()) == 4 and cold.stdout == warm.stdout


def test_a_low_pass_minds_layouts_that_have_the_same_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    x, before = torch.randn(4, 3, 5, 5, 5, generator=generator), torch.randn(3, 5, 5, 5, generator=generator)
    expected = traces.low_pass(x.double(), 0.9, before.double())[0]
    turned = x.movedim(2, -1).contiguous().movedim(-1, 2)
    torch.testing.assert_close(traces.low_pass(turned, 0.9, before)[0], expected, check_dtype=False)


@pytest.mark.parametrize("channels_last", [True, False])
def test_sums_over_rows_and_steps_in_any_layout(channels_last) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 6, 6, generator=generator)
    if channels_last:
        x = x.movedim(-3, -1).contiguous().movedim(-1, -3)
    torch.testing.assert_close(traces.over_rows(x), x.sum(1))
    response = torch.rand(4, generator=generator)
    torch.testing.assert_close(traces.over_steps(response, x), torch.einsum("k,kbchw->bchw", response, x))
