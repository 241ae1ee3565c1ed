"""The steps that the speed benchmark times do what they say, so that their times can be compared."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import Spike

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
speed, speed_steps = importlib.import_module("speed"), importlib.import_module("speed_steps")
BETA, THRESHOLD, CONTESTANTS, Work = (getattr(speed_steps, name) for name in ("BETA", "THRESHOLD", "CONTESTANTS", "Work"))
SMALL = {"mlp": Work("mlp", 3, 4, 0.3, width=12), "conv": Work("conv", 2, 3, 0.3)}


def test_the_scan_by_hand_has_the_gradient_of_the_unrolled_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    drive = torch.randn(7, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    wanted = torch.randn(7, 3, 5, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((speed_steps._Scan.apply(drive) * wanted).sum(), drive)[0]

    membrane, loss = torch.zeros(3, 5, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for step, present in enumerate(drive):
        membrane = BETA * membrane + present
        spikes = Spike.apply(membrane - THRESHOLD)
        loss = loss + (spikes * wanted[step]).sum()
        membrane = membrane * (1.0 - spikes.detach())
    torch.testing.assert_close(found, torch.autograd.grad(loss, drive)[0])


def test_the_folded_kernel_is_a_convolution_and_a_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 9, 9, generator=generator), torch.randn(4, 3, 5, 5, generator=generator)
    apart = F.avg_pool2d(F.conv2d(x, weight, padding=2), 2)
    torch.testing.assert_close(F.conv2d(x, speed_steps.folded(weight), None, 2, 2), apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "mlp") for name in CONTESTANTS), ("sigprop-membrane", "conv"), ("BPTT by hand, bfloat16", "conv")],
)
def test_every_contestant_learns_the_batch_it_is_given(name, kind, monkeypatch) -> None:
    if speed_steps.missing(name):
        pytest.skip(f"{name} is not installed")
    losses, original = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *given, **how: losses.append(original(*given, **how)) or losses[-1])
    step = CONTESTANTS[name](SMALL[kind])
    for _ in range(250):
        step()
    known = [float(loss.mean().detach()) for loss in losses]
    assert known[-1] < 0.8 * math.log(10) < known[0] * 1.3


def test_ratios_are_taken_within_a_round() -> None:
    found = speed.summarise({"sigprop-membrane": [1.0, 2.0, 4.0], "snntorch": [3.0, 8.0, 8.0]})
    assert found["times"]["sigprop-membrane"]["snntorch"]["median"] == 3.0
    assert found["ms"]["snntorch"]["median"] == 8.0


def test_every_round_times_every_contestant() -> None:
    names = ["sigprop-membrane", "BPTT by hand, float32"]
    found = speed.measure(SMALL["mlp"], names, rounds=4)
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys(names, 4)
    assert min(min(times) for times in found.values()) > 0.0
