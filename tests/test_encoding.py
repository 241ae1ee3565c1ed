"""Encoders against closed forms, statistics and snnTorch."""

from __future__ import annotations

import json

import pytest
import torch

from spikeprop.encoding import ENCODERS, Current, Encoder, Events, Latency, Poisson, default_encoder, from_config
from spikeprop.errors import InputError

ALL = [Current(), Current(scale=-2.5), Poisson(0.5), Latency(), Latency(threshold=0.2, tau=3.0), Events()]


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("encoder", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_every_encoder_is_time_first_and_floating(encoder: Encoder, dtype: torch.dtype) -> None:
    inputs = uniform(3, 5, 2, 4).round().to(dtype)  # [B, T, *features] for Events, features (5, 2, 4) for the others
    encoded = encoder(inputs, 5)
    assert encoded.shape == ((5, 3, 2, 4) if encoder.temporal else (5, 3, 5, 2, 4))
    assert encoded.dtype == (torch.float32 if dtype == torch.uint8 else dtype)


@pytest.mark.parametrize("encoder", ALL, ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 9, None])
def test_stretches_are_the_whole_a_few_steps_at_a_time(encoder: Encoder, chunk: int | None) -> None:
    inputs = uniform(3, 5, 2, 4)
    whole = encoder(inputs, 5, torch.Generator().manual_seed(1))
    stretches = list(encoder.stretches(inputs, 5, chunk, torch.Generator().manual_seed(1)))
    assert torch.equal(torch.cat(stretches), whole)
    assert max(map(len, stretches)) == min(chunk or 5, 5)
    rows = torch.tensor([2, 0])
    some = list(encoder.stretches(inputs, 5, chunk, torch.Generator().manual_seed(1), rows))
    assert torch.equal(torch.cat(some), encoder(inputs[rows], 5, torch.Generator().manual_seed(1)))
    with pytest.raises(InputError, match="chunk = 0 must be at least 1 step"):
        next(encoder.stretches(inputs, 5, 0))


def test_current_is_the_scaled_input_at_every_step_and_costs_the_memory_of_one() -> None:
    inputs = uniform(4, 7)
    encoded = Current(scale=3.0)(inputs, 1000)
    assert encoded.stride(0) == 0 and encoded.untyped_storage().nbytes() == inputs.untyped_storage().nbytes()
    assert all(torch.equal(step, 3.0 * inputs) for step in encoded[[0, 1, 999]])
    assert Current()(inputs, 3).data_ptr() == inputs.data_ptr()


def test_poisson_spikes_with_probability_rate_times_input() -> None:
    num_steps, rate = 20_000, 0.8
    inputs = torch.tensor([[0.0, 0.01, 0.3, 0.5, 0.9, 1.0]])
    spikes = Poisson(rate)(inputs, num_steps, torch.Generator().manual_seed(0))
    assert set(spikes.flatten().tolist()) == {0.0, 1.0}
    probability = rate * inputs.double()
    # Six standard deviations of the mean of num_steps Bernoulli trials: wrong by chance once in 10^8.
    bound = 6 * (probability * (1 - probability) / num_steps).sqrt()
    assert bool(((spikes.double().mean(0) - probability).abs() <= bound).all())
    # Independent in time: the share of spikes followed by a spike is the probability again.
    followed = (spikes[1:] * spikes[:-1]).mean(0) / spikes[:-1].mean(0)
    torch.testing.assert_close(followed[0, 2:], (rate * inputs)[0, 2:], atol=0.02, rtol=0)


def test_poisson_at_probability_0_and_1_is_certain() -> None:
    spikes = Poisson()(torch.tensor([[0.0, 1.0]]), 10_000, torch.Generator().manual_seed(1))
    assert spikes.sum(0).tolist() == [[0.0, 10_000.0]]


@pytest.mark.parametrize("shape", [(1, 3), (16, 49), (32, 1, 28, 28)])
def test_poisson_follows_its_generator_and_may_be_streamed_in_pieces(shape: tuple[int, ...]) -> None:
    inputs, encoder = uniform(*shape), Poisson(0.7)
    whole = encoder(inputs, 8, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(99)  # the global generator must not matter
    pieces = torch.cat([encoder(inputs, steps, generator) for steps in (3, 1, 4)])
    assert torch.equal(whole, pieces)
    assert not torch.equal(whole, encoder(inputs, 8, torch.Generator().manual_seed(4)))


def test_linear_latency_has_its_closed_form() -> None:
    # x = k/10 and T = 11: exactly step 10 - k; nothing at 0 and below the threshold.
    inputs = torch.tensor([[0.0, 0.004, 0.1, 0.2, 0.5, 0.9, 1.0]])
    spikes = Latency()(inputs, 11)
    assert spikes.sum(0).tolist() == [[0, 0, 1, 1, 1, 1, 1]]
    assert spikes.argmax(0)[0, 2:].tolist() == [9, 8, 5, 1, 0]
    assert Latency(threshold=0)(torch.tensor([[0.0, 1e-6]]), 5).sum(0).tolist() == [[0, 1]]  # an input of 0 never spikes
    assert Latency()(torch.tensor([[0.0, 0.5, 1.0]]), 1).tolist() == [[[0, 1, 1]]]


def test_logarithmic_latency_is_when_a_charging_leaky_integrator_reaches_the_threshold() -> None:
    tau, threshold, num_steps = 8.0, 0.2, 40
    inputs = uniform(1, 500, seed=5).double()
    spikes = Latency(threshold=threshold, tau=tau)(inputs, num_steps)
    # U(t) = x (1 - exp(-t / tau)): the crossing found numerically, on a fine grid, instead of by the logarithm.
    time = torch.arange(0, num_steps, 1e-3, dtype=torch.float64)
    membrane = inputs[0, :, None] * (1 - torch.exp(-time / tau))
    reached = membrane >= threshold
    crossing = reached.double().argmax(1) * 1e-3
    fires = reached.any(1) & (crossing.round() < num_steps)
    unclear = ((crossing % 1) - 0.5).abs() < 2e-3  # too near a half for the grid to tell which way to round
    assert int(unclear.sum()) < 10 and 0 < int(fires.sum()) < 500
    assert torch.equal(spikes.sum(0)[0][~unclear] > 0, fires[~unclear])
    sure = fires & ~unclear
    assert torch.equal(spikes.argmax(0)[0][sure], crossing[sure].round().long())
    assert spikes.sum(0).max() == 1


@pytest.mark.parametrize("num_steps", [2, 5, 8, 25, 100])
@pytest.mark.parametrize("threshold", [0.01, 0.2])
def test_latency_equals_snntorch(num_steps: int, threshold: float) -> None:
    spikegen = pytest.importorskip("snntorch.spikegen")
    inputs = uniform(16, 300, seed=num_steps)
    inputs[0, :3] = torch.tensor([0.0, 0.5, 1.0])
    linear = spikegen.latency(inputs, num_steps, threshold=threshold, linear=True, normalize=True, clip=True)
    assert torch.equal(Latency(threshold)(inputs, num_steps), linear.float())
    logarithmic = spikegen.latency(inputs, num_steps, threshold=threshold, tau=6.0, clip=True, bypass=True)
    assert torch.equal(Latency(threshold, tau=6.0)(inputs, num_steps), logarithmic.float())


def test_events_only_turn_time_to_the_front() -> None:
    inputs = (uniform(3, 6, 2, 5) * 4).to(torch.uint8)
    encoded = Events()(inputs, 6)
    assert all(torch.equal(encoded[t, b], inputs[b, t].float()) for t in range(6) for b in range(3))


def test_an_encoder_survives_json() -> None:
    for encoder in ALL:
        assert from_config(json.loads(json.dumps(encoder.config()))) == encoder
    assert Poisson(0.5).config() == {"name": "poisson", "rate": 0.5}
    assert [from_config({"name": name}).name for name in ("current", "poisson", "latency", "events")] == list(ENCODERS)
    assert default_encoder(temporal=False) == Current() and default_encoder(temporal=True) == Events()


@pytest.mark.parametrize("encoder", ALL, ids=str)
@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, None])
def test_num_steps_below_1_is_refused(encoder: Encoder, num_steps: int) -> None:
    with pytest.raises(InputError, match="num_steps must be a whole number of at least 1, got"):
        encoder(torch.ones(1, 2, 3), num_steps)


@pytest.mark.parametrize("encoder", ALL, ids=str)
def test_inputs_that_no_encoder_takes_are_refused(encoder: Encoder) -> None:
    for bad in (float("nan"), float("inf")):
        inputs = torch.full((2, 4, 3), 0.5)
        inputs[1, 2, 0] = bad
        with pytest.raises(InputError, match=f"{encoder.name} encoder: inputs hold NaN or infinity"):
            encoder(inputs, 4)
    with pytest.raises(InputError, match=r"not empty, got shape \[0, 4, 3\]"):
        encoder(torch.ones(0, 4, 3), 4)
    with pytest.raises(InputError, match=r"features\] and not empty, got shape \[\]"):
        encoder(torch.tensor(1.0), 4)
    with pytest.raises(InputError, match=r"inputs must be a tensor .* got list"):
        encoder([[0.5]], 4)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"real numbers, got torch.complex64"):
        encoder(torch.ones(2, 4, 3, dtype=torch.complex64), 4)


@pytest.mark.parametrize(
    ("encoder", "value", "message"),
    [
        (Poisson(), -0.25, r"poisson encoder: rate \* inputs \(rate = 1\) must lie in \[0, 1\], found -0.25 to 0.5; scale"),
        (Poisson(2.0), 0.75, r"rate \* inputs \(rate = 2\) must lie in \[0, 1\], found 1 to 1.5"),
        (Latency(), 255.0, r"latency encoder: inputs must lie in \[0, 1\], found 0.5 to 255; scale the data first"),
        (Latency(tau=5.0), -1.0, r"latency encoder: inputs must lie in \[0, 1\], found -1 to 0.5"),
    ],
)
def test_inputs_outside_the_range_are_refused(encoder: Encoder, value: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encoder(torch.tensor([[0.5, value]]), 4)


def test_events_refuse_another_number_of_steps() -> None:
    with pytest.raises(InputError, match=r"num_steps = 8, but the inputs \[2, 6, 3\] have 6 time steps"):
        Events()(torch.ones(2, 6, 3), 8)
    with pytest.raises(InputError, match=r"\[B, T, \*features\] and not empty, got shape \[4\]"):
        Events()(torch.ones(4), 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "rate"}, "unknown encoder 'rate'; known: current, poisson, latency, events"),
        ({}, "unknown encoder None"),
        ({"name": "poisson", "gain": 2}, r"poisson encoder: settings \{'gain': 2\} do not fit"),
        ({"name": "poisson", "rate": 0}, "rate must be finite and above 0, got 0"),
        ({"name": "poisson", "rate": float("nan")}, "rate must be finite and above 0, got nan"),
        ({"name": "poisson", "rate": "high"}, "poisson encoder: settings .* do not fit"),
        ({"name": "current", "scale": float("inf")}, "scale must be finite, got inf"),
        ({"name": "latency", "threshold": 1.0}, r"threshold must be in \[0, 1\), got 1.0"),
        ({"name": "latency", "tau": 0.0}, r"tau must be None \(linear\) or a finite number of steps above 0, got 0.0"),
        ({"name": "latency", "tau": 2.0, "threshold": 0}, "with tau, threshold must be above 0"),
    ],
)
def test_bad_settings_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_config(config)
