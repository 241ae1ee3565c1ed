"""The cause of every dead neuron, against networks that are changed as the diagnosis says and run again."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch

import spikeprop as sp
from spikeprop.diagnosis import CAUSES, LARGEST_FACTOR, advise
from spikeprop.diagnosis_page import content, course, page
from spikeprop.errors import InputError
from spikeprop.models import conv, mlp
from spikeprop.network import Network

STEPS = 6
SIGNS = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])  # of the inputs of random networks that see both signs


def spikes(network: Network, inputs: torch.Tensor, index: int, neuron: int) -> bool:
    """Whether one neuron ever spikes."""
    counts = sp.dead_neurons(network, (inputs, None), STEPS, batch_size=len(inputs)).layers[index].spike_counts
    return bool(counts.flatten()[neuron] > 0)


def changed(
    network: Network, index: int, neuron: int, cause: str, factor: float = 1.0, signs: torch.Tensor | None = None
) -> Network:
    """The network with one cause removed from the neuron of one layer, by editing what a user would edit."""
    network = copy.deepcopy(network)
    layer = network.layers[index]
    row = neuron // math.prod(layer.output_shape[1:])
    weights = [synapse.weight for synapse in (layer.synapse, layer.recurrent) if synapse is not None]
    if cause in ("bias", "several"):
        layer.bias[row] = layer.bias[row].clamp(min=0.0)
    if cause == "excitation alone":
        layer.bias[row] = 0.0
        cause = "several"
    if cause in ("inhibition", "several"):
        for number, weight in enumerate(weights):
            sign = signs if signs is not None and number == 0 and index == 0 else torch.ones(())
            weight[row] *= weight[row] * sign > 0
    if cause in ("centring", "several"):
        (network.input_mean if index == 0 else network.layers[index - 1].rate).zero_()
    if cause in ("threshold", "several"):
        for weight in weights:
            weight[row] *= factor
    if cause == "lift":
        layer.bias[row] += factor
    return network


def hand_made(weight: list[float], *, bias: float = 0.0, mean: float = 0.0, below: bool = False, beta: float = 0.9) -> Network:
    """Inputs of as many as weights to one neuron; ``below``: through a layer that spikes at every step where the input is 1."""
    count = len(weight)
    network = mlp((count,), [count, 1] if below else [1], 2, neuron=sp.LIF(beta, 1.0))
    *first, last = network.layers
    for layer in first:
        layer.synapse.weight.copy_(1.5 * torch.eye(count))
        layer.bias.zero_()
        layer.rate.fill_(mean)
    last.synapse.weight.copy_(torch.tensor([weight]))
    last.bias.fill_(bias)
    if not below:
        network.input_mean.fill_(mean)
    return network


KNOWN = [
    ("no input", {"weight": [0.0, 0.0, 3.0]}),  # the last input is silent
    ("no input", {"weight": [0.0, 0.0, 0.0], "bias": 0.05}),
    ("no input", {"weight": [-1.0, -2.0, 3.0]}),
    ("bias", {"weight": [0.5, 0.0, 0.0], "bias": -0.45}),
    ("threshold", {"weight": [0.05, 0.02, 0.0]}),
    ("threshold", {"weight": [0.05, 0.02, 0.0], "bias": -0.001}),
    ("threshold", {"weight": [0.005, 0.0, 0.0]}),  # by more than ten, and nothing else helps
    ("inhibition", {"weight": [0.5, -0.7, 0.0]}),
    ("inhibition", {"weight": [0.5, -0.49, 0.0]}),  # net excitation, but a hundredth of what it needs
    ("inhibition", {"weight": [3.0, -0.6, 2.4], "mean": 0.5}),  # without centring it would spike, too
    ("centring", {"weight": [0.5, 0.0, 0.0], "mean": 1.0}),
    ("several", {"weight": [0.5, -0.7, 0.0], "bias": -0.6}),
    ("several", {"weight": [0.1, -0.7, 0.0]}),
]


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize(("cause", "how"), KNOWN)
def test_a_known_cause_is_named_and_its_removal_brings_a_spike(cause: str, how: dict, below: bool) -> None:
    network, inputs, index = hand_made(**how, below=below), torch.tensor([[1.0, 1.0, 0.0]] * 3), int(below)
    found = sp.diagnose(network, (inputs, None), STEPS)
    layer = found.layers[index]
    assert layer.causes == {cause: [0]} and layer.dead == [0]
    assert not spikes(network, inputs, index, 0)
    if cause == "no input":
        layer_above = network.layers[-1]
        if layer_above.synapse.weight.max() <= 0:
            layer_above.synapse.weight.fill_(1.0)
        assert layer.weightless == (max(how["weight"]) == 0.0)
        assert spikes(network, torch.tensor([[0.0, 0.0, 1.0]]), index, 0)
        return
    factor = float(layer.factor[0]) * 1.001
    assert spikes(changed(network, index, 0, cause, factor), inputs, index, 0)
    for other in {"bias", "inhibition", "centring"} - {cause}:
        earlier = CAUSES.index(other) < CAUSES.index(cause)
        assert not (earlier and cause != "several" and spikes(changed(network, index, 0, other), inputs, index, 0)), other
    if cause == "several":
        assert not any(
            spikes(changed(network, index, 0, other), inputs, index, 0) for other in ("bias", "inhibition", "centring")
        )
    if cause == "threshold":
        lower = copy.deepcopy(network)
        lower.layers[index].neuron.threshold = float(layer.peak[0]) * 0.999
        assert spikes(lower, inputs, index, 0)


def test_the_centring_of_a_bias_is_the_networks_own() -> None:
    """A bias that centring makes: the membrane of the folded network, whose bias is -0.5, has the same cause by its bias."""
    network, inputs = hand_made([0.5, 0.0, 0.0], mean=1.0), torch.tensor([[1.0, 1.0, 0.0]])
    (centred,) = sp.diagnose(network, (inputs, None), STEPS).layers
    assert float(network.fold_bias(0)) == -0.5 and centred.causes == {"centring": [0]} and centred.uncentred == 1
    network.layers[0].bias.copy_(network.fold_bias(0))
    network.input_mean.zero_()
    (folded,) = sp.diagnose(network, (inputs, None), STEPS).layers
    assert folded.causes == {"bias": [0]} and folded.uncentred == 0
    assert folded.peak.tolist() == pytest.approx(centred.peak.tolist())


def random_network(seed: int) -> tuple[Network, torch.Tensor, torch.Tensor | None]:
    """Networks in double precision, with neurons that die for every reason; inputs; their signs where they have both."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    kind, signs = ("dense", "signed", "recurrent", "conv")[seed % 4], None
    neuron = sp.LIF(
        float(0.5 + 0.5 * uniform(1)), 0.8, alpha=(0.0, 0.4)[seed // 4 % 2], reset_mechanism=("zero", "subtract")[seed % 3 % 2]
    )
    if kind == "conv":
        network = conv((1, 5, 5), [6], 2, kernel_size=3, stride=1, pool=2, hidden=[8], neuron=neuron, seed=seed)
    else:
        network = mlp((6,), [10, 8], 2, neuron=neuron, seed=seed, recurrent=kind == "recurrent", centred=kind != "recurrent")
    network.double()
    for layer in network.layers:
        synapses = [layer.synapse] if layer.recurrent is None else [layer.synapse, layer.recurrent]
        size = (10.0 ** (2.5 * uniform(layer.output_shape[0]) - 1.8)).clone()
        size[uniform(len(size)) < 0.05] = 0.0
        tilt = (uniform(len(size)) - 0.5).sign() * uniform(len(size))
        for synapse in synapses:
            weight = synapse.weight
            shape = (-1, *[1] * (weight.dim() - 1))
            weight.copy_((weight + tilt.view(shape)) * size.view(shape))
        layer.bias.copy_(0.4 * (uniform(*layer.bias.shape) - 0.7))
        layer.rate.copy_(0.3 * uniform(*layer.rate.shape))
    inputs = uniform(7, *network.input_shape)
    inputs[:, ..., 0] = 0.0
    mean = inputs.mean(0) * (2.0 * uniform(1))
    if kind == "signed":
        signs = SIGNS.double()
        inputs, mean = inputs * signs, mean * signs
    network.input_mean.copy_(mean)
    return network, inputs, signs


def test_in_random_networks_every_removal_is_tested_by_running_them() -> None:
    """Dense, signed inputs, recurrent, convolutional; with synaptic memory, centring, both resets. No earlier line may hold."""
    seen: dict[str, int] = {}
    for seed in range(24):
        network, inputs, signs = random_network(seed)
        found = sp.diagnose(network, (inputs, None), STEPS, batch_size=3)
        for index, layer in enumerate(found.layers):

            def revived(cause: str, neuron: int, factor: float = 1.0, at: tuple = (network, inputs, signs, index)) -> bool:
                network, inputs, signs, index = at
                return spikes(changed(network, index, neuron, cause, factor, signs), inputs, index, neuron)

            assert layer.dead == (layer.health.spike_counts.flatten() == 0).nonzero().flatten().tolist()
            for cause, neurons in layer.causes.items():
                for neuron in neurons[:6]:
                    seen[cause] = seen.get(cause, 0) + 1
                    factor, lift = float(layer.factor[neuron]), float(layer.lift[neuron])
                    assert revived("lift", neuron, lift + 1e-6) and not revived("lift", neuron, lift - 1e-6)
                    if cause == "no input":
                        assert not revived("excitation alone", neuron, 1e9)
                        continue
                    assert revived(cause, neuron, factor * (1 + 1e-6)), (seed, index, neuron, cause)
                    if cause == "several":
                        assert not any(revived(other, neuron) for other in ("bias", "inhibition", "centring"))
                        continue
                    assert cause == "bias" or not revived("bias", neuron)
                    if cause == "threshold":
                        assert not revived("threshold", neuron, factor * (1 - 1e-6))
                        if factor > LARGEST_FACTOR:
                            assert not revived("inhibition", neuron) and not revived("centring", neuron)
                    elif cause != "bias":
                        assert not revived("threshold", neuron, LARGEST_FACTOR)
                        assert cause != "centring" or not revived("inhibition", neuron)
    assert set(seen) == set(CAUSES) - {"competition", "chance"} and min(seen.values()) >= 4, seen


def test_who_never_wins_and_who_never_draws_a_spike() -> None:
    """Neuron 1 is always above the threshold, but neuron 0 is further; neuron 2 is too weak."""
    network = mlp((1,), [3], 2, neuron=sp.WinnerTakeAll(0.5, 1.0), centred=False)
    network.layers[0].synapse.weight.copy_(torch.tensor([[8.0], [3.0], [0.1]]))
    network.layers[0].bias.zero_()
    inputs = (torch.ones(4, 1), None)
    found = sp.diagnose(network, inputs, STEPS)
    assert found.layers[0].causes == {"competition": [1], "threshold": [2]}
    (advice,) = [line for line in advise(found) if "competition" in line]
    assert "allow more than 1 winners" in advice
    network.layers[0].neuron = sp.LIF(0.5, 1.0)
    assert sp.diagnose(network, inputs, STEPS).layers[0].causes == {"threshold": [2]}

    network.layers[0].neuron = sp.Bernoulli(0.5, 1.0, slope=0.01)  # half of all steps, whatever the membrane
    network.layers[0].synapse.weight.fill_(4.0)
    causes = [sp.diagnose(network, inputs, 1, seed=n).layers[0].causes for n in range(6)]
    drawn = [sum(map(len, found.values())) for found in causes]
    assert all(set(found) <= {"chance"} for found in causes) and sum(drawn) > 0 and min(drawn) < 3


def health_of(network: Network, inputs: tuple, **how) -> dict:
    return sp.dead_neurons(network, inputs, STEPS, **how).to_dict()


@pytest.mark.parametrize("seed", range(4))
def test_batches_change_nothing_and_the_measure_is_that_of_dead_neurons(seed: int) -> None:
    network, inputs, _ = random_network(seed)
    one, whole = (sp.diagnose(network, (inputs, None), STEPS, batch_size=size) for size in (1, 100))
    assert whole.health.to_dict() == health_of(network, (inputs, None))
    for mine, other in zip(one.layers, whole.layers, strict=True):
        assert mine.causes == other.causes
        assert torch.allclose(mine.factor, other.factor) and torch.allclose(mine.lift, other.lift)
    assert sp.total_change(one.health, whole.health).revival in (0.0, None)


def test_nearly_dead_and_saturated_neurons_are_listed() -> None:
    """Of 200 samples one is 1.0, the others 0.9: neurons 0 and 1 never spike, 2 once, 3 always, 4 in half of the steps."""
    network = mlp((1,), [5], 2, neuron=sp.LIF(0.0, 1.0), centred=False)
    network.layers[0].bias.zero_()
    network.layers[0].synapse.weight.copy_(torch.tensor([[0.2], [0.5], [1.001], [1.5], [0.6]]))
    network.layers[0].neuron.register_buffer("own_beta", torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
    network.layers[0].neuron.beta = network.layers[0].neuron.own_beta
    inputs = torch.full((200, 1), 0.9)
    inputs[7] = 1.0
    (layer,) = sp.diagnose(network, (inputs, None), STEPS).layers
    assert (layer.dead, layer.nearly_dead, layer.saturated) == ([0, 1], [2], [3])
    assert layer.peak.tolist()[:4] == pytest.approx([0.2, 0.5, 1.001, 1.5], abs=1e-6)
    assert layer.deficits() == pytest.approx([0.5, 0.575, 0.65, 0.725, 0.8])
    assert layer.factor.tolist()[:2] == pytest.approx([5.0, 2.0])
    assert layer.lift.tolist()[:2] == pytest.approx([0.8, 0.5])


@pytest.mark.parametrize(
    ("what", "cause"), [("weights", "threshold"), ("thresholds", "threshold"), ("biases", "bias"), ("nothing", None)]
)
def test_a_network_with_one_fault_shows_that_one(what: str, cause: str | None) -> None:
    """The first layer of a network as it comes, all weights a fifteenth, thresholds ten times as high, or biases too low."""
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [64], 10, seed=2)
    network.input_mean.copy_(data.train.inputs.mean(0))
    layer = network.layers[0]
    if what == "weights":
        layer.synapse.weight.div_(15.0)
    elif what == "thresholds":
        layer.neuron.threshold *= 10.0
    elif what == "biases":
        layer.bias.sub_(1.0)
    (found,) = sp.diagnose(network, data.test, 8).layers
    assert set(found.causes) == ({cause} if cause else set()) and (len(found.dead) > 50) == (cause is not None)


def weakened(threshold: float = 1.0) -> tuple[Network, tuple]:
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [64, 48], 10, neuron=sp.LIF(0.9, threshold), seed=1)
    network.input_mean.copy_(data.train.inputs.mean(0))
    network.layers[0].synapse.weight.mul_(0.1)
    return network, (data.test.inputs, data.test.labels)


@pytest.mark.parametrize("threshold", [1.0, 2.5])
def test_what_the_advice_says_revives_nine_tenths(threshold: float) -> None:
    network, inputs = weakened(threshold)
    found = sp.diagnose(network, inputs, STEPS)
    assert set(found.layers[0].causes) == {"threshold"} and len(found.layers[0].dead) > 20
    remedy, by_bias = (line for line in advise(found) if line.startswith("layer 1,") and "dead" not in line)
    lower, times = map(float, re.search(r"threshold from \S+ to (\S+) .*weights by (\S+),", remedy).groups())
    lift, updates = map(
        float, re.search(r"raised by (\S+) revives 90% of them; --homeostasis on .*about (\d+) up", by_bias).groups()
    )
    for change in ("threshold", "weights", "bias", "homeostasis"):
        other = copy.deepcopy(network)
        layer = other.layers[0]
        if change == "threshold":
            layer.neuron.threshold = lower
        elif change == "weights":
            layer.synapse.weight.mul_(times)
        elif change == "bias":
            layer.bias.add_(lift)
        else:  # with the rates of this data
            layer.rate.copy_(found.layers[0].health.spike_counts / (len(inputs[0]) * STEPS))
            for _ in range(int(updates)):
                sp.Homeostasis().regulate(layer, 128)
        after = sp.dead_neurons(other, inputs, STEPS)
        revival = sp.changes(found.health, after)[0].revival
        assert 0.9 <= revival < 1.0 or (change == "homeostasis" and revival >= 0.9), (change, revival)


def test_advice_begins_where_the_trouble_does() -> None:
    network, inputs = weakened()
    network.layers[0].bias.sub_(3.0)
    found = sp.diagnose(network, inputs, STEPS)
    text = "\n".join(advise(found, sp.Homeostasis()))
    assert "layer 2 hears a layer of which 100% are dead: begin with layer 1" in text
    assert "layer 2, 48 of 48 neurons, no input: nothing that excites reaches 48 of them: layer 1 is silent" in text
    assert "homeostasis, which is on, does that" in text
    network.layers[0].synapse.weight[:9] = 0.0
    assert "9 have no weight: draw their weights anew" in "\n".join(advise(sp.diagnose(network, inputs, STEPS)))
    healthy = mlp((1, 8, 8), [32], 10, seed=1)
    healthy.input_mean.copy_(inputs[0].mean(0))
    assert advise(sp.diagnose(healthy, inputs, 16)) == ["none needed, nearly every neuron lives and none is stuck"]


def test_the_text_has_the_table_and_the_neurons() -> None:
    network, inputs = weakened()
    found = sp.diagnose(network, inputs, STEPS)
    text = str(found)
    assert text.startswith(str(sp.dead_neurons(network, inputs, STEPS)))
    counts = [len(layer.causes.get("threshold", [])) for layer in found.layers]
    assert re.search(rf"layer 1 +(\d+ +)*{counts[0]}\b", text)
    assert f"{', '.join(map(str, found.layers[0].dead[:10]))} and {counts[0] - 10} more" in text
    assert "no neuron is dead" in str(sp.diagnose(hand_made([9.0]), (torch.ones(2, 1), None), STEPS))


def test_what_does_not_spike_cannot_be_diagnosed() -> None:
    with pytest.raises(InputError, match="layer 1: Rate neurons do not spike"):
        sp.diagnose(mlp((1,), [3], 2, neuron=sp.Rate()), (torch.zeros(3, 1), None), 3)
    with pytest.raises(InputError, match="the data set is empty"):
        sp.diagnose(mlp((1,), [3], 2), (torch.zeros(0, 1), None), 3)


def test_the_page_of_the_docs_and_the_module_know_every_cause() -> None:
    docs = (Path(sp.__file__).resolve().parent.parent / "docs" / "dead-neurons.md").read_text()
    for cause in CAUSES:
        assert f"| {cause} |" in docs and f"\n{cause} " in str(sp.diagnosis.__doc__)


# --- The page ----------------------------------------------------------------------------------------------------------------


def test_the_page_shows_every_cause_and_needs_nothing_else() -> None:
    network, inputs, _ = random_network(0)
    found = sp.diagnose(network, (inputs, None), STEPS)
    before = sp.dead_neurons(random_network(4)[0], (inputs, None), STEPS)
    epochs = [{"epoch": n, "dead": [0.5, 0.25], "rate": [0.1, 0.2], "loss": [1.0, 1.0]} for n in (1, 2, 3)]
    shown = content(found, sp.Homeostasis(), before, epochs)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    for described, layer in zip(shown["layers"], found.layers, strict=True):
        assert {cause: part["neurons"] for cause, part in described["causes"].items()} == layer.causes
        membranes, alive = described["membranes"], layer.health.neurons - len(layer.dead)
        assert sum(membranes["dead"]) == len(layer.dead) and sum(membranes["alive"]) == alive
        below = sum(1 for edge in membranes["edges"][1:] if edge <= 1.0 + 1e-9)
        assert not any(membranes["alive"][:below]) and not any(membranes["dead"][below:])  # the threshold parts them
        assert (
            described["rates"] == sorted(described["rates"], reverse=True) and len(described["rates"]) == layer.health.neurons
        )
    html = page({"run": "r<un", "data": "d", "split": "test", **shown})
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", html) and html.count("<svg") == 3 + 2 * 2
    assert (
        "r&lt;un" in html
        and "prefers-color-scheme: dark" in html
        and not re.search(r"#(?!\w*clip)[0-9a-f]{6}\b", figures(html))
    )
    for cause in found.layers[0].causes:
        assert f">{cause}</th>" in html
    change = sp.total_change(before, found.health)
    assert f"<b>{change.revival:.2%}</b><span>of the dead ones were revived" in html
    assert f"{found.layers[1].health.dead:>10.2%}" in course(shown).splitlines()[5]


def figures(html: str) -> str:
    return "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))


def test_the_page_of_a_network_that_was_not_trained() -> None:
    found = sp.diagnose(hand_made([9.0, 1.0]), (torch.ones(2, 2), None), STEPS)
    shown = content(found, None, None, [])
    html = page({"run": "r", "data": "d", "split": "test", **shown})
    assert "No neuron is dead." in html and html.count("<svg") == 2 and shown["changes"] is None
    assert course(shown).splitlines()[1:] == [f"{'now':<22}{'0.00%':>10}"]
