"""The neuron against snnTorch, Norse and closed forms."""

import math

import numpy as np
import pytest
import torch

import spikeprop as sp
from spikeprop.errors import InputError
from spikeprop.neuron import NeuronState, advance

STEPS, NEURONS = 200, 1000


def random_drive(seed: int, scale: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS, NEURONS, generator=generator, dtype=torch.float64) * scale + 0.1


def after_reset(activity: sp.Activity, neuron: sp.LIF) -> torch.Tensor:
    if neuron.reset_mechanism == "zero":
        return activity.membrane.masked_fill(activity.spikes.bool(), 0.0)
    return activity.membrane - activity.spikes * neuron.threshold


def snntorch_run(beta: float, threshold: float, reset: str, drive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    snntorch = pytest.importorskip("snntorch")
    leaky = snntorch.Leaky(beta=beta, threshold=threshold, reset_mechanism=reset, reset_delay=False).double()
    membrane, spikes, membranes = torch.zeros(NEURONS, dtype=torch.float64), [], []
    for present in drive:
        spike, membrane = leaky(present, membrane)
        spikes.append(spike)
        membranes.append(membrane)
    return torch.stack(spikes).detach(), torch.stack(membranes).detach()


@pytest.mark.parametrize(("beta", "threshold", "seed"), [(0.9, 1.0, 0), (0.5, 0.7, 1), (0.0, 0.3, 2), (1.0, 2.0, 3)])
def test_zero_reset_equals_snntorch_bit_for_bit(beta: float, threshold: float, seed: int) -> None:
    neuron, drive = sp.LIF(beta, threshold), random_drive(seed)
    activity = sp.lif(neuron, drive)
    spikes, membranes = snntorch_run(neuron.beta, threshold, "zero", drive)
    assert 0.01 < spikes.mean() < 0.9
    # snnTorch holds beta and threshold in single precision; comparing at those very numbers makes it a comparison of bits.
    single = sp.LIF(float(torch.tensor(beta)), float(torch.tensor(threshold)))
    activity = sp.lif(single, drive)
    assert torch.equal(activity.spikes, spikes)
    assert torch.equal(after_reset(activity, single), membranes)


def test_subtract_reset_equals_snntorch_below_twice_the_threshold() -> None:
    neuron = sp.LIF(float(torch.tensor(0.9)), 1.0, reset_mechanism="subtract")
    drive = random_drive(4, scale=0.3).clamp(max=0.9)
    activity = sp.lif(neuron, drive)
    spikes, membranes = snntorch_run(neuron.beta, 1.0, "subtract", drive)
    below = activity.membrane.amax(0) < 2.0  # neurons that never overshoot
    assert below.float().mean() > 0.5
    assert spikes[:, below].sum() > 1000
    assert torch.equal(activity.spikes[:, below], spikes[:, below])
    assert torch.equal(after_reset(activity, neuron)[:, below], membranes[:, below])


def test_snntorch_subtracts_again_beyond_twice_the_threshold() -> None:
    """Documented difference: a membrane still above the threshold after its reset spikes again at the next step here, while
    snnTorch takes another threshold off before it decides on that step's spike."""
    drive = torch.zeros(3, NEURONS, dtype=torch.float64)
    drive[0] = 2.5
    ours = sp.lif(sp.LIF(1.0, 1.0, reset_mechanism="subtract"), drive)
    spikes, _ = snntorch_run(1.0, 1.0, "subtract", drive)
    assert ours.membrane[:, 0].tolist() == [2.5, 1.5, 0.5]
    assert ours.spikes[:, 0].tolist() == [1.0, 1.0, 0.0]
    assert spikes[:, 0].tolist() == [1.0, 0.0, 0.0]


def test_norse_lifbox() -> None:
    box = pytest.importorskip("norse.torch.functional.leaky_integrator_box", reason="norse is not installed")
    del box
    from norse.torch.functional.lif_box import LIFBoxFeedForwardState, LIFBoxParameters, lif_box_feed_forward_step

    tau, dt = 0.01, 0.001
    parameters = LIFBoxParameters(
        tau_mem_inv=torch.tensor(1 / tau, dtype=torch.float64),
        v_leak=torch.tensor(0.0, dtype=torch.float64),
        v_th=torch.tensor(1.0, dtype=torch.float64),
        v_reset=torch.tensor(0.0, dtype=torch.float64),
    )
    drive = random_drive(5, scale=3.0)
    state, spikes, membranes = LIFBoxFeedForwardState(v=torch.zeros(NEURONS, dtype=torch.float64)), [], []
    for present in drive:
        spike, state = lif_box_feed_forward_step(present, state, parameters, dt)
        spikes.append(spike)
        membranes.append(state.v)
    # Norse charges the membrane with dt/tau times the current: that factor is part of our drive.
    neuron = sp.LIF(sp.decay_from_tau(tau, dt, "euler"), 1.0)
    activity = sp.lif(neuron, drive * dt / tau)
    assert torch.stack(spikes).sum() > 1000
    assert torch.equal(activity.spikes, torch.stack(spikes))
    assert (after_reset(activity, neuron) - torch.stack(membranes)).abs().max() < 1e-12


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_subthreshold_charging_has_its_closed_form(alpha: float) -> None:
    beta, current, bias = 0.9, 0.01, 0.002
    membrane = sp.lif(sp.LIF(beta, 1.0, alpha=alpha, bias=bias), torch.full((100, 1), current, dtype=torch.float64)).membrane[
        :, 0
    ]
    steps = torch.arange(1, 101, dtype=torch.float64)
    charge = (1 - beta**steps) / (1 - beta)
    if alpha:
        drive = current / (1 - alpha) * (charge - alpha * (beta**steps - alpha**steps) / (beta - alpha))
    else:
        drive = current * charge
    assert torch.allclose(membrane, drive + bias * charge, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("beta", "current"), [(0.9, 0.15), (0.9, 0.5), (1.0, 0.3), (0.7, 0.31)])
def test_interspike_interval_has_its_closed_form(beta: float, current: float) -> None:
    """From rest, U reaches beyond the threshold at the first n with current (1 - beta^n)/(1 - beta) > 1; reset repeats that."""
    spikes = sp.lif(sp.LIF(beta, 1.0), torch.full((300, 1), current, dtype=torch.float64)).spikes[:, 0]
    if beta < 1.0:
        interval = math.floor(math.log(1 - (1 - beta) / current) / math.log(beta)) + 1
    else:
        interval = math.floor(1 / current) + 1
    assert torch.equal(spikes.nonzero()[:, 0], torch.arange(interval - 1, 300, interval))


def test_the_threshold_is_strict() -> None:
    drive = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert sp.lif(sp.LIF(0.9, 1.0), drive).spikes.tolist() == [[0.0, 1.0]]


def test_resets_leave_what_they_say() -> None:
    drive = torch.tensor([[1.75], [0.0]], dtype=torch.float64)
    second = {
        reset: sp.lif(sp.LIF(0.5, 1.0, reset_mechanism=reset), drive).membrane[1].item()
        for reset in ("zero", "subtract", "none")
    }
    assert second == {"zero": 0.0, "subtract": 0.375, "none": 0.875}


def test_per_neuron_parameters_equal_neurons_run_alone() -> None:
    drive = random_drive(6)[:, :3]
    beta, threshold = torch.tensor([0.5, 0.9, 1.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
    together = sp.lif(sp.LIF(beta, threshold, alpha=torch.tensor([0.0, 0.3, 0.6]).double()), drive)
    for index, alpha in enumerate(torch.tensor([0.0, 0.3, 0.6]).double()):
        alone = sp.lif(sp.LIF(float(beta[index]), float(threshold[index]), alpha=float(alpha)), drive[:, index])
        assert torch.equal(together.membrane[:, index], alone.membrane)


def test_one_step_function_serves_numpy_and_torch() -> None:
    drive = random_drive(7)
    numbers = dict(alpha=0.3, beta=0.9, bias=0.01, threshold=1.0)
    ours = NeuronState(torch.zeros(NEURONS).double(), torch.zeros(NEURONS).double())
    plain = NeuronState(np.zeros(NEURONS), np.zeros(NEURONS))
    for present in drive:
        spikes, _, ours = advance(ours, present, **numbers)
        plain_spikes, _, plain = advance(plain, present.numpy(), **numbers)
        assert np.array_equal(spikes.numpy(), plain_spikes)
    assert np.array_equal(ours.membrane.numpy(), plain.membrane)


@pytest.mark.parametrize("method", ["exact", "euler"])
@pytest.mark.parametrize("tau", [1.5, 20.0, 1e6])
def test_time_constants_convert_both_ways(tau: float, method: str) -> None:
    assert sp.tau_from_decay(sp.decay_from_tau(tau, 1.0, method), 1.0, method) == pytest.approx(tau, rel=1e-6)


def test_time_constants_have_known_values() -> None:
    assert sp.decay_from_tau(10.0, 1.0) == math.exp(-0.1)
    assert sp.decay_from_tau(10.0, 1.0, "euler") == 0.9
    assert sp.decay_from_tau(math.inf, 1.0) == 1.0
    assert sp.tau_from_decay(1.0, 1.0) == math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sp.LIF(beta=1.2), r"LIF: beta = 1.2 lies outside \[0, 1\].*decay_from_tau"),
        (lambda: sp.LIF(beta=-0.1), r"beta = -0.1 lies outside"),
        (lambda: sp.LIF(beta=float("nan")), r"beta = nan lies outside"),
        (lambda: sp.LIF(alpha=1.0), r"alpha = 1 lies outside.*never fades"),
        (lambda: sp.LIF(threshold=0.0), r"threshold = 0 lies outside.*spike at rest"),
        (lambda: sp.LIF(beta=torch.tensor([0.5, 1.5])), r"beta = 1.5 lies outside"),
        (lambda: sp.LIF(reset_mechanism="soft"), r"reset_mechanism = 'soft' is not one of"),
        (lambda: sp.decay_from_tau(0.5, 1.0, "euler"), r"dt = 1 exceeds tau = 0.5"),
        (lambda: sp.decay_from_tau(-1.0, 1.0), r"tau = -1 and dt = 1 must both be positive"),
        (lambda: sp.tau_from_decay(1.5, 1.0), r"decay = 1.5 has no time constant"),
        (lambda: sp.lif(sp.LIF(), torch.zeros(0, 3)), r"time comes first"),
    ],
)
def test_bad_parameters_are_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
