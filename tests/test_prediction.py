"""Prediction by class responses, and the diagnosis of neurons, against counts done by hand."""

import pytest
import torch

import spikeprop as sp
from spikeprop.errors import InputError
from spikeprop.models import mlp
from spikeprop.prediction import build_tree, class_responses, nearest, search_tree


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def leaves(node) -> list[int]:
    return node.classes if not node.children else [name for child in node.children for name in leaves(child)]


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 40])
def test_the_tree_holds_every_class_once(classes: int) -> None:
    assert sorted(leaves(build_tree(unit(classes, 16)))) == list(range(classes))


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_a_full_tree_search_is_the_nearest_response(classes: int) -> None:
    responses, samples = unit(classes, 16), unit(500, 16, seed=1)
    best = nearest(samples, responses)
    assert torch.equal(best.classes, (samples @ responses.T).argmax(1))
    full = search_tree(samples, build_tree(responses), margin=4.0)
    assert torch.equal(full.classes, best.classes)
    assert (full.comparisons == 2 * (classes - 1)).all()  # every inner node of a binary tree


def test_the_tree_saves_comparisons_and_pays_with_few_errors_on_clustered_classes() -> None:
    families = unit(8, 32)
    responses = torch.nn.functional.normalize(families.repeat_interleave(8, 0) + 0.15 * unit(64, 32, seed=2), dim=1)
    labels = torch.arange(64).repeat_interleave(20)
    samples = torch.nn.functional.normalize(responses[labels] + 0.05 * unit(1280, 32, seed=3), dim=1)
    found = search_tree(samples, build_tree(responses))
    assert (found.classes == labels).float().mean() > 0.98
    assert found.comparisons.float().mean() < 0.5 * 64
    wider = search_tree(samples, build_tree(responses), margin=1.0)
    assert wider.comparisons.sum() > found.comparisons.sum()


def test_predictions_do_not_depend_on_the_other_samples_of_a_batch() -> None:
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [64, 64], 10)
    sp.fit(network, sp.SigProp(), data, num_steps=6, epochs=3, progress=False)
    few = (data.test.inputs[:60], data.test.labels[:60])
    one, many = (sp.evaluate(network, few, 6, batch_size=size) for size in (1, 60))
    assert one.accuracy == many.accuracy
    assert one.comparisons["nearest"] == 10.0
    assert one.comparisons["tree"] < 10.0
    assert sum(map(sum, one.confusion)) == 60
    assert sum(one.confusion[c][c] for c in range(10)) / 60 == one.accuracy["readout"]
    assert one.to_dict()["accuracy"] == one.accuracy
    assert min(one.accuracy.values()) > 0.7
    assert class_responses(network, 6).shape == (10, 64)


def by_hand() -> sp.Network:
    """Six neurons that see the input 1 with weights that kill, starve, saturate, and let live."""
    network = mlp((1,), [6], 2, neuron=sp.LIF(0.0, 1.0), centred=False)
    network.layers[0].bias.zero_()
    network.layers[0].synapse.weight.copy_(torch.tensor([[0.2], [-5.0], [1.5], [10.0], [1.5], [1.001]]))
    return network


def test_dead_nearly_dead_and_saturated_neurons_are_counted() -> None:
    """Inputs 0.9 in all samples but one of 1.0 in 200: neuron 1, 2 never spike, 6 in half a percent, 3 to 5 always."""
    inputs = torch.full((200, 1), 0.9)
    inputs[7] = 1.0
    health = sp.dead_neurons(by_hand(), (inputs, torch.zeros(200)), 5)
    layer = health.layers[0]
    assert (layer.dead, layer.nearly_dead, layer.saturated) == (2 / 6, 3 / 6, 3 / 6)
    assert layer.spike_counts.tolist() == [0.0, 0.0, 1000.0, 1000.0, 1000.0, 5.0]
    assert layer.active_samples.tolist() == [0.0, 0.0, 200.0, 200.0, 200.0, 1.0]
    assert layer.rate == pytest.approx(3005 / 6000)
    assert layer.deficits.tolist() == pytest.approx([-0.8, -5.5, 0.5, 9.0, 0.5, 0.001], abs=1e-6)
    assert layer.deficit == pytest.approx(-5.5)
    assert health.to_dict()["layers"][0]["dead"] == 2 / 6
    assert health.samples == 200
    assert "33.33%" in str(health)


def test_silence_on_one_sample_is_not_death() -> None:
    health = sp.dead_neurons(by_hand(), (torch.tensor([[0.0], [1.0]]), torch.zeros(2)), 3)
    assert health.layers[0].dead == 2 / 6
    assert health.layers[0].saturated == 0.0


def health(*spikes: list[float], samples: int = 5, num_steps: int = 3) -> sp.Health:
    """A measurement of layers whose neurons spiked this often."""
    layers = []
    for counts in map(torch.tensor, spikes):
        figures = {"dead": 0.0, "nearly_dead": 0.0, "saturated": 0.0, "rate": 0.0, "deficit": None}
        tensors = {"spike_counts": counts, "active_samples": counts, "deficits": counts}
        layers.append(sp.evaluation.LayerHealth(neurons=counts.numel(), **figures, **tensors))
    return sp.Health(layers, samples, num_steps)


def test_revived_and_lost_neurons_are_counted() -> None:
    """Of layer 1's dead three one revives, its living one dies; layer 2 had none dead, layer 3 none alive."""
    before = health([0.0, 0.0, 0.0, 7.0], [1.0, 2.0], [0.0, 0.0])
    after = health([0.0, 4.0, 0.0, 0.0], [1.0, 0.0], [3.0, 1.0])
    assert sp.changes(before, after) == [
        sp.Change(3 / 4, 3 / 4, 1 / 3, 1.0),
        sp.Change(0.0, 1 / 2, None, 1 / 2),
        sp.Change(1.0, 0.0, 1.0, None),
    ]
    assert sp.total_change(before, after) == sp.Change(5 / 8, 4 / 8, 3 / 5, 2 / 3)
    assert sp.total_change(before, after).to_dict()["revival"] == 3 / 5


def test_changes_agree_with_two_measurements() -> None:
    inputs = (torch.full((20, 1), 0.9), torch.zeros(20))
    network = by_hand()
    before = sp.dead_neurons(network, inputs, 4)
    network.layers[0].synapse.weight.copy_(torch.tensor([[0.2], [5.0], [-1.5], [10.0], [1.5], [1.2]]))
    (change,) = sp.changes(before, sp.dead_neurons(network, inputs, 4))
    assert change == sp.Change(3 / 6, 2 / 6, 2 / 3, 1 / 3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (health([1.0], samples=6), "samples was 5 before and is 6 after"),
        (health([1.0], num_steps=4), "num_steps was 3 before and is 4 after"),
        (health([1.0, 1.0]), r"had \[1\] neurons before and have \[2\]"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: sp.Health, message: str) -> None:
    for compare in (sp.changes, sp.total_change):
        with pytest.raises(InputError, match=message):
            compare(health([1.0]), other)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda n: sp.dead_neurons(n, (torch.zeros(0, 1), None), 3), "the data set is empty"),
        (
            lambda n: sp.dead_neurons(n, (torch.zeros(3, 2), None), 3),
            r"inputs have shape \(3, 2\), the network expects \[N, 1\] or \[N, T, 1\]",
        ),
        (lambda n: sp.evaluate(n, (torch.zeros(3, 1), torch.zeros(3).long())), "num_steps is missing"),
        (
            lambda n: sp.dead_neurons(mlp((1,), [3], 2, neuron=sp.Rate()), (torch.zeros(3, 1), None), 3),
            "layer 1: Rate neurons do not spike",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(act, message: str) -> None:
    with pytest.raises(InputError, match=message):
        act(by_hand())
