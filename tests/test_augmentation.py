"""Augmentation moves, mirrors and blurs training inputs, and refuses what it does not suit."""

from __future__ import annotations

import pytest
import torch

import spikeprop as sp
from spikeprop import Augmentation
from spikeprop.errors import InputError
from spikeprop.models import mlp


def test_shifts_are_all_those_within_reach_and_nothing_else() -> None:
    """Against every offset written out by hand: zeros come in at the edge, each sample has its own, all occur equally often."""
    picture = torch.rand(2, 5, 7)
    expected = torch.zeros(9, 2, 5, 7)
    for number, (down, right) in enumerate((d, r) for d in (-1, 0, 1) for r in (-1, 0, 1)):
        for y in range(5):
            for x in range(7):
                if 0 <= y + down < 5 and 0 <= x + right < 7:
                    expected[number, :, y + down, x + right] = picture[:, y, x]
    moved = Augmentation(shift=1)(picture.expand(2000, -1, -1, -1), torch.Generator().manual_seed(0))
    same = (moved.unsqueeze(1) == expected).flatten(2).all(2)
    assert (same.sum(1) == 1).all()
    assert (same.sum(0) - 2000 / 9).abs().max() < 5 * (2000 * 8 / 81) ** 0.5


def test_the_frames_of_a_recording_move_together_and_stay_whole_numbers() -> None:
    recording = torch.randint(0, 2, (20, 4, 2, 6, 6), dtype=torch.uint8)
    moved = Augmentation(shift=2, flip=True)(recording, torch.Generator().manual_seed(1))
    assert moved.dtype == torch.uint8 and moved.shape == recording.shape and not torch.equal(moved, recording)
    still = recording[:, :1].expand(-1, 4, -1, -1, -1)
    moved = Augmentation(shift=2, flip=True)(still, torch.Generator().manual_seed(1))
    assert torch.equal(moved, moved[:, :1].expand_as(moved))


def test_half_the_pictures_are_mirrored() -> None:
    pictures = torch.rand(400, 1, 3, 4)
    seen = Augmentation(flip=True)(pictures, torch.Generator().manual_seed(0))
    mirrored = torch.tensor([torch.equal(one, other.flip(-1)) for one, other in zip(seen, pictures, strict=True)])
    assert torch.equal(seen[~mirrored], pictures[~mirrored])
    assert 160 < mirrored.sum() < 240


def test_recordings_move_in_time_alone() -> None:
    """Against every delay written out by hand."""
    recording = torch.rand(6, 3)
    expected = torch.stack(
        [
            torch.cat([torch.zeros(max(d, 0), 3), recording[max(-d, 0) : 6 - max(d, 0)], torch.zeros(max(-d, 0), 3)])
            for d in (-2, -1, 0, 1, 2)
        ]
    )
    moved = Augmentation(delay=2)(recording.expand(500, -1, -1), torch.Generator().manual_seed(0))
    same = (moved.unsqueeze(1) == expected).flatten(2).all(2)
    assert (same.sum(1) == 1).all() and (same.sum(0) > 60).all()


def test_events_get_lost_as_often_as_asked_and_the_mean_stays() -> None:
    events = torch.ones(100, 20, 30, dtype=torch.uint8)
    left = Augmentation(drop=0.3)(events, torch.Generator().manual_seed(0))
    assert left.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (left > 0).float().mean().item() == pytest.approx(0.7, abs=5 * (0.21 / 60_000) ** 0.5)


def test_nothing_is_the_default() -> None:
    inputs = torch.rand(3, 1, 4, 4)
    assert Augmentation()(inputs) is inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": -0.1}, r"noise = -0\.1 is a standard deviation"),
        ({"noise": float("nan")}, "noise = nan is a standard deviation"),
        ({"shift": -1}, "shift = -1 must be a whole number of pixels"),
        ({"delay": -2}, "delay = -2 must be a whole number of steps"),
        ({"drop": 1.0}, r"drop = 1\.0 is a probability"),
        ({"shift": 1.5}, r"shift = 1\.5 must be a whole number of pixels"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Augmentation(**settings)  # type: ignore[arg-type]


def test_what_does_not_suit_the_data_is_refused_before_training() -> None:
    data, network = sp.data.load("digits"), mlp((1, 8, 8), [4], 10)
    with pytest.raises(InputError, match=r"shift = 8 can move a picture of \(1, 8, 8\) out of sight"):
        sp.fit(network, sp.SigProp(), data, 2, augment=Augmentation(shift=8))
    with pytest.raises(InputError, match="delay = 3 moves recordings in time, and inputs for the current encoder have no time"):
        sp.fit(network, sp.SigProp(), data, 2, augment=Augmentation(delay=3))
    with pytest.raises(InputError, match=r"drop = 0\.3 enlarges the inputs it leaves, beyond the 1 that the poisson encoder"):
        sp.fit(network, sp.SigProp(), data, 2, augment=Augmentation(drop=0.3), encoder=sp.Poisson())
    taxels = sp.data.from_arrays((torch.rand(4, 3, 12), torch.tensor([0, 1, 0, 1])), temporal=True)
    with pytest.raises(InputError, match=r"shift = 1 moves pictures .* shape \(12,\)"):
        sp.fit(mlp((12,), [4], 2), sp.SigProp(), taxels, augment=Augmentation(shift=1))
    with pytest.raises(InputError, match="delay = 3 can move a recording of 3 steps out of sight"):
        sp.fit(mlp((12,), [4], 2), sp.SigProp(), taxels, augment=Augmentation(delay=3))
