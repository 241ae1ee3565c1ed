"""SigProp's update against autograd's gradient of the same layer-local loss, in float64; schedules, streams, no autograd."""

import copy
import itertools
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import spikeprop as sp
from spikeprop.errors import InputError, UnsupportedError
from spikeprop.models import conv, mlp

STEPS, BATCH, CLASSES = 6, 7, 4
PHI = {
    sp.ATan(): lambda u, th: torch.atan(torch.pi * (u - th)) / torch.pi + 0.5,
    sp.Sigmoid(): lambda u, th: torch.sigmoid(4.0 * (u - th)),
    sp.FastSigmoid(): lambda u, th: 4.0 * (u - th) / (1.0 + (4.0 * (u - th)).abs()),
    sp.Membrane(): lambda u, th: ((u - th) / th).clamp(-1.0, 1.0),
    sp.Membrane(clip=None): lambda u, th: u,
}


def cosine_loss(h: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    h, t = h - h.mean(0), t - t.mean(0)
    return F.cross_entropy(F.normalize(h, dim=1, eps=1e-6) @ F.normalize(t, dim=1, eps=1e-6).T / 0.1, labels)


def dot_loss(h: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    h, t = h - h.mean(0), t - t.mean(0)
    return F.cross_entropy(h @ t.T / h.shape[1] / 0.5, labels)


def pairwise_loss(h: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    rows = F.normalize(torch.cat([h - h.mean(0), t - t.mean(0)]), dim=1, eps=1e-6)
    names = torch.cat([labels, torch.arange(CLASSES)])
    terms = []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        log_likelihood = (rows[others] @ rows[i] / 0.1).log_softmax(0)
        positives = [k for k, j in enumerate(others) if names[j] == names[i]]
        if positives:
            terms.append(-log_likelihood[positives].mean())
    return torch.stack(terms).mean()


def hebbian_loss(h: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    h, t = h - h.mean(0), t - t.mean(0)
    rows = (0.5 * h.square() - h * t[labels].detach()).mean(1).mean()
    contexts = [0.5 * t[c].square() - t[c] * h[labels == c].mean(0).detach() for c in range(CLASSES) if (labels == c).any()]
    return rows + torch.stack(contexts).mean(1).sum() / CLASSES


LOSSES = {
    "cosine": (sp.SimilarityCrossEntropy(0.1), cosine_loss),
    "dot": (sp.SimilarityCrossEntropy(0.5, "dot"), dot_loss),
    "pairwise": (sp.Pairwise(0.1), pairwise_loss),
    "hebbian": (sp.Hebbian(1.0), hebbian_loss),
}


def oracle(
    network: sp.Network, inputs: Tensor, labels: Tensor, phi, loss, trace: str, read_every: int = 1
) -> dict[str, Tensor]:
    """What every layer's own loss asks for, by autograd through a hand-written neuron, with the spikes held constant.

    The loss reads membranes in units of the threshold, and the learning rate is in those units, too: plain descent moves w by
    threshold dL/dw.
    """
    x = inputs
    gradients = {}
    for index, layer in enumerate(network.layers):
        neuron, synapse = layer.neuron, layer.synapse
        weight = synapse.weight.detach().clone().requires_grad_()
        bias = layer.bias.detach().clone().requires_grad_()
        target = network.target.weight.detach().clone().requires_grad_()
        mean = network.input_mean if index == 0 else network.layers[index - 1].rate

        def linear(rows: Tensor, synapse=synapse, weight=weight) -> Tensor:
            for part in synapse.parts if isinstance(synapse, sp.Chain) else [synapse]:
                if isinstance(part, sp.Dense):
                    rows = F.linear(rows, weight)
                elif isinstance(part, sp.Conv2d):
                    rows = F.conv2d(rows, weight, stride=part.how[0], padding=part.how[1], groups=part.how[3])
                else:
                    rows = part(rows)
            return rows

        offset = bias - linear(mean[None])[0] / (1 - neuron.alpha)
        current = membrane = 0.0
        losses, spikes = [], []
        for step in range(STEPS):
            if index == 0:  # each class's target beside the mean input, below the input rows
                drive = linear(torch.cat([x[step], mean.expand(CLASSES, *mean.shape)]))
                entering = (torch.eye(CLASSES).double() @ target.flatten(0, -2).T).view(-1, *drive.shape[1:])
                drive = drive + torch.cat([torch.zeros(BATCH, *drive.shape[1:]), entering])
            else:
                drive = linear(x[step])
            current = neuron.alpha * current + drive
            membrane = neuron.beta * membrane + current + offset
            spike = (membrane > neuron.threshold).double()
            value = phi(membrane / neuron.threshold, 1.0)
            value = (F.adaptive_avg_pool2d(value, 4) if value.dim() == 4 and value.shape[2] > 4 else value).flatten(1)
            if (step + 1) % read_every == 0:
                losses.append(loss(value[:BATCH], value[BATCH:], labels))
            spikes.append(spike)
            if neuron.reset_mechanism == "zero":
                membrane = membrane * (1 - spike) if trace == "exact" else membrane - (spike * membrane).detach()
            elif neuron.reset_mechanism == "subtract":
                membrane = membrane - spike * neuron.threshold
        wanted = [weight, bias] + ([target] if index == 0 else [])
        found = [neuron.threshold * part for part in torch.autograd.grad(torch.stack(losses).mean(), wanted)]
        gradients[f"{index}.weight"], gradients[f"{index}.bias"] = found[:2]
        if index == 0:
            gradients["target"] = found[2]
        x = torch.stack(spikes).detach()
    return gradients


def make_network(kind: str, neuron: sp.LIF) -> tuple[sp.Network, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if kind == "dense":
        network = mlp((9,), [12, 10], CLASSES, neuron=neuron, gain=1.2, seed=1)
    else:
        strided = sp.Conv2d(2, 4, 3, stride=2, padding=1, gain=2.0, generator=generator)
        grouped = sp.Chain(sp.Conv2d(4, 4, 3, padding=1, groups=2, gain=2.0, generator=generator), sp.AvgPool2d(2))
        dense = sp.Chain(sp.AvgPool2d(2), sp.Flatten(), sp.Dense(4, 6, gain=4.0, generator=generator))
        network = sp.Network((2, 9, 9), [(part, copy.deepcopy(neuron)) for part in (strided, grouped, dense)], CLASSES)
    network = network.double()
    for layer in network.layers:
        layer.rate.uniform_(0.0, 0.3, generator=generator)
        layer.bias.uniform_(0.0, 0.2, generator=generator)
    network.input_mean.uniform_(0.0, 0.5, generator=generator)
    inputs = torch.rand(STEPS, BATCH, *network.input_shape, generator=generator, dtype=torch.float64)
    return network, inputs


LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 2])  # class 3 has no sample
descent = partial(torch.optim.SGD, lr=1.0)  # the weight change is minus the gradient


def changes(network: sp.Network, rule: sp.SigProp, inputs: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], sp.Network]:
    trained = copy.deepcopy(network)
    state = rule.initial_state(trained)
    _, state = rule.learn(trained, rule.begin(state), inputs, labels)
    found = {"target": network.target.weight - trained.target.weight}
    for index, (before, after) in enumerate(zip(network.layers, trained.layers, strict=True)):
        found[f"{index}.weight"] = before.synapse.weight - after.synapse.weight
        found[f"{index}.bias"] = before.bias - after.bias
    return found, trained


CASES = [
    *itertools.product(["dense"], PHI, ["cosine"], ["zero", "subtract", "none"], [0.0, 0.6], ["shared", "exact"]),
    *itertools.product(
        ["dense"], [sp.ATan(), sp.Membrane(clip=None)], ["dot", "pairwise", "hebbian"], ["zero"], [0.0], ["shared"]
    ),
    *itertools.product(["conv"], PHI, ["cosine"], ["zero", "subtract", "none"], [0.0, 0.6], ["shared", "exact"]),
]


@pytest.mark.parametrize(("kind", "learn_on", "loss", "reset", "alpha", "trace"), CASES)
def test_update_equals_autograd_of_the_local_loss(kind, learn_on, loss, reset, alpha, trace) -> None:
    network, inputs = make_network(kind, sp.LIF(0.8, 0.7, alpha=alpha, reset_mechanism=reset))
    ours, theirs = LOSSES[loss]
    rule = sp.SigProp(learn_on, ours, trace=trace, optimizer=descent, homeostasis=None)
    network.attach_target(generator=torch.Generator().manual_seed(5))
    expected = oracle(network, inputs, LABELS, PHI[learn_on], theirs, trace)
    found, _ = changes(network, rule, inputs, LABELS)
    for name, gradient in expected.items():
        # Raw U, centred over the rows, does not see a bias at all: that gradient is zero, and 1e-12 stands for zero.
        assert gradient.norm() > 1e-6 or (learn_on == sp.Membrane(clip=None) and name.endswith("bias")), name
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("read_every", [2, 4])
@pytest.mark.parametrize("trace", ["shared", "exact"])
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_a_loss_that_reads_some_steps_gives_the_gradient_of_its_mean_over_them(kind, trace, read_every) -> None:
    network, inputs = make_network(kind, sp.LIF(0.8, 0.7, alpha=0.3))
    rule = sp.SigProp(sp.ATan(), LOSSES["cosine"][0], trace=trace, read_every=read_every, optimizer=descent, homeostasis=None)
    network.attach_target(generator=torch.Generator().manual_seed(5))
    expected = oracle(network, inputs, LABELS, PHI[sp.ATan()], cosine_loss, trace, read_every)
    for steps in (inputs, inputs[:1].expand_as(inputs)):
        if steps is not inputs:
            expected = oracle(network, steps, LABELS, PHI[sp.ATan()], cosine_loss, trace, read_every)
        found, _ = changes(network, rule, steps, LABELS)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name


@dataclass(frozen=True)
class Counting(sp.SimilarityCrossEntropy):
    """Notes how many steps it reads."""

    read: list[int] = field(default_factory=list)

    def __call__(self, h, t, labels, mean):
        self.read.append(len(h))
        return super().__call__(h, t, labels, mean)


@pytest.mark.parametrize(
    ("steps", "beta", "trace", "update_every", "readings"),
    [
        (8, 0.9, "shared", None, 8),  # five at least
        (25, 0.9, "shared", None, 5),
        (100, 0.9, "shared", None, 20),  # half a time constant of 10 apart
        (100, 1.0, "shared", None, 5),  # no time constant
        (25, 0.5, "shared", None, 25),
        (25, 0.9, "exact", None, 25),
        (100, 0.9, "shared", 10, 50),
    ],
)
def test_the_loss_reads_as_rarely_as_changes_little(steps, beta, trace, update_every, readings) -> None:
    network, loss = mlp((9,), [6], CLASSES, neuron=sp.LIF(beta)).double(), Counting()
    rule = sp.SigProp(loss=loss, trace=trace, update_every=update_every)
    rule.learn(network, rule.initial_state(network), torch.rand(steps, 7, 9).double(), LABELS)
    assert sum(loss.read) == readings


@pytest.mark.parametrize(("regions", "pooled"), [(4, True), (None, False), (5, False)])
def test_maps_are_compared_by_regions_where_there_are_more_places_than_those(regions: int | None, pooled: bool) -> None:
    """Layer 1 has maps of 5 x 5. With regions it learns from their pooled phi, without from phi itself (the oracle pools)."""
    network, inputs = make_network("conv", sp.LIF(0.8, 0.7))
    network.attach_target(generator=torch.Generator().manual_seed(5))
    rule = sp.SigProp(sp.ATan(), sp.SimilarityCrossEntropy(0.1), regions=regions, optimizer=descent, homeostasis=None)
    expected = oracle(network, inputs, LABELS, PHI[sp.ATan()], cosine_loss, "shared")["0.weight"]
    found = changes(network, rule, inputs, LABELS)[0]["0.weight"]
    assert ((found - expected).norm() <= 1e-6 * expected.norm()) == pooled


@pytest.mark.parametrize("trace", ["shared", "exact"])
def test_constant_input_takes_the_same_update_as_the_same_input_step_by_step(trace: str) -> None:
    network, inputs = make_network("dense", sp.LIF(0.8, 0.7))
    network.attach_target(generator=torch.Generator().manual_seed(5))
    rule = sp.SigProp(trace=trace, optimizer=descent, homeostasis=None)
    constant = inputs[0].expand(STEPS, *inputs[0].shape)
    one, _ = changes(network, rule, constant, LABELS)
    other, _ = changes(network, rule, constant.clone(), LABELS)
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("trace", ["shared", "exact"])
def test_decays_per_neuron_mean_what_one_decay_means(trace: str) -> None:
    """With all decays equal, the per-neuron form must ask for the same update as the form with one decay per layer."""
    network, inputs = make_network("dense", sp.LIF(0.8, 0.7, alpha=0.4))
    network.attach_target(generator=torch.Generator().manual_seed(5))
    spread = copy.deepcopy(network)
    for layer in spread.layers:
        layer.neuron = sp.LIF(torch.full_like(layer.rate, 0.8), 0.7, alpha=torch.full_like(layer.rate, 0.4))
    rule = sp.SigProp(trace=trace, optimizer=descent, homeostasis=None)
    one, _ = changes(network, rule, inputs, LABELS)
    other, _ = changes(spread, rule, inputs, LABELS)
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-9, atol=1e-14)


def weights(network: sp.Network) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(("update_every", "read_every"), [(1, None), (3, None), (6, None), (3, 2), (6, 4)])
@pytest.mark.parametrize("trace", ["shared", "exact"])
@pytest.mark.parametrize("labels_per_step", [False, True])
def test_a_stream_learns_what_the_whole_sequence_learns(
    update_every: int, read_every: int | None, trace: str, labels_per_step: bool
) -> None:
    network, inputs = make_network("dense", sp.LIF(0.8, 0.7, alpha=0.3))
    labels = torch.stack([(LABELS + step) % CLASSES for step in range(STEPS)]) if labels_per_step else LABELS
    adam = partial(torch.optim.Adam, lr=1e-2)
    rule = sp.SigProp(trace=trace, update_every=update_every, read_every=read_every, optimizer=adam)
    whole, stream = copy.deepcopy(network), copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    state = rule.initial_state(whole, generator=generator)
    for _ in range(2):  # two sequences, so that what is carried from one to the next counts too
        answer, state = rule.learn(whole, rule.begin(state), inputs, labels)
    generator = torch.Generator().manual_seed(0)
    state = rule.initial_state(stream, generator=generator)
    for _ in range(2):
        state = rule.begin(state)
        for step in range(STEPS):
            answer_now, state = rule.learn(
                stream, state, inputs[step : step + 1], labels[step : step + 1] if labels_per_step else labels
            )
    start = weights(network)
    for name, tensor in weights(whole).items():
        assert torch.allclose(tensor, weights(stream)[name], rtol=1e-9, atol=1e-11), name
        assert name in ("input_mean", "target.weight") or not torch.equal(tensor, start[name]), name
    assert torch.allclose(answer.outputs, answer_now.outputs, rtol=1e-9, atol=1e-11)


@pytest.fixture
def no_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("autograd was used")

    for owner, name in ((torch.Tensor, "backward"), (torch.autograd, "backward"), (torch.autograd, "grad")):
        monkeypatch.setattr(owner, name, refuse)


@pytest.mark.parametrize("learn_on", [sp.Membrane(), sp.Membrane(clip=None), sp.ATan()])
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_trains_without_autograd_and_leaves_ordinary_tensors(no_autograd, learn_on, model) -> None:
    data = sp.data.load("digits")
    network = (
        mlp((1, 8, 8), [32], 10) if model == "mlp" else conv((1, 8, 8), [4], 10, kernel_size=3, stride=1, pool=2, hidden=[16])
    )
    before = weights(copy.deepcopy(network))
    sp.fit(network, sp.SigProp(learn_on), data, num_steps=4, epochs=1, progress=False)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        assert not tensor.requires_grad, name
        assert tensor.grad_fn is None, name
        assert not tensor.is_inference(), name
        if name != "target.weight" and not name.endswith("neuron.bias"):  # new with training; where the biases started from
            assert not torch.equal(tensor, before[name]), name


def test_sigprop_then_autograd_then_sigprop() -> None:
    network, inputs = make_network("dense", sp.LIF(0.8, 0.7))
    rule = sp.SigProp()
    state = rule.initial_state(network)
    answer, state = rule.learn(network, rule.begin(state), inputs, LABELS)
    assert not answer.outputs.is_inference()
    assert not any(part.is_inference() for neurons in state.stream.neurons for part in neurons)

    for parameter in network.parameters():
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(network.parameters())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    membranes = torch.stack(
        [activity.membrane.square().mean() for activity in network.advance(network.initial_state(BATCH), inputs)[0]]
    )
    (membranes.sum() + answer.outputs.sum() * network.readout.bias.sum()).backward()
    assert network.layers[0].synapse.weight.grad.abs().sum() > 0
    optimizer.step()
    state.optimizer.step()  # the rule's own optimiser works outside inference mode too
    for parameter in network.parameters():
        parameter.requires_grad_(False)

    before = network.layers[0].synapse.weight.clone()
    rule.learn(network, rule.begin(state), inputs, LABELS)
    assert not torch.equal(before, network.layers[0].synapse.weight)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.AdamW, lr=1e-3),
        partial(torch.optim.RMSprop, lr=1e-3),
        partial(torch.optim.Adagrad, lr=1e-2),
        partial(torch.optim.Adam, lr=1e-3, fused=True),
    ],
)
def test_takes_any_optimizer_that_reads_gradients(optimizer) -> None:
    network, inputs = make_network("dense", sp.LIF(0.8, 0.7))
    rule = sp.SigProp(optimizer=optimizer, homeostasis=None)
    state = rule.initial_state(network, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(40):
        answer, state = rule.learn(network, rule.begin(state), inputs, LABELS)
        losses.append(float(answer.loss.sum()))
    assert min(losses[-5:]) < 0.9 * losses[0]


def test_collapse_does_not_happen() -> None:
    """Without negatives everything collapses to one point; class responses must end further apart than they began."""
    from spikeprop.prediction import class_responses, directions

    data = sp.data.load("digits")
    network = mlp(data.input_shape, [64, 64], 10)
    sp.fit(network, sp.SigProp(), data, num_steps=8, epochs=3, progress=False)
    responses = class_responses(network, 8)
    unit = directions(network, responses, responses)[1]
    similarity = unit @ unit.T - torch.eye(10)
    assert similarity.max() < 0.7


def test_the_target_synapses_learn_unless_fixed() -> None:
    network, inputs = make_network("dense", sp.LIF(0.8, 0.7))
    for target, moves in ((sp.LearnedProjection(), True), (sp.FixedProjection(), False)):
        trained = copy.deepcopy(network)
        rule = sp.SigProp(target=target)
        state = rule.initial_state(trained, generator=torch.Generator().manual_seed(0))
        before = trained.target.weight.clone()
        rule.learn(trained, rule.begin(state), inputs, LABELS)
        assert torch.equal(before, trained.target.weight) != moves


@pytest.mark.parametrize(
    ("neuron", "learn_on"), [(sp.Rate(), sp.ReLU()), (sp.Binary(0.5), sp.ATan()), (sp.Binary(0.5), sp.Membrane(clip=2.0))]
)
def test_one_rule_for_continuous_and_binary_layers(neuron, learn_on) -> None:
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [128, 128], 10, neuron=neuron)
    adam = partial(torch.optim.Adam, lr=4e-3 / neuron.unit)  # rates are in units of the threshold
    sp.fit(network, sp.SigProp(learn_on, optimizer=adam), data, num_steps=1, epochs=10, progress=False)
    assert sp.evaluate(network, data.test, 1).accuracy["readout"] > 0.9  # seeds 0 to 2: .910 to .927, by either path


@pytest.mark.parametrize(
    ("loss", "floor"), [(sp.Pairwise(), 0.93), (sp.SimilarityCrossEntropy(0.1, "dot"), 0.88), (sp.Hebbian(), 0.8)]
)
def test_the_other_losses_learn(loss, floor) -> None:
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [64, 64], 10)
    sp.fit(network, sp.SigProp(loss=loss), data, num_steps=8, epochs=6, progress=False)
    assert sp.evaluate(network, data.test, 8).accuracy["readout"] > floor


def test_regression_by_the_delta_rule_readout() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(600, 6, generator=generator)
    targets = torch.stack([inputs[:, :3].sum(1) - 1.5, inputs[:, 0] * inputs[:, 5]], 1)
    data = sp.data.from_arrays(train=(inputs[:500], targets[:500]), test=(inputs[500:], targets[500:]))
    network = mlp((6,), [64, 64], 2, regression=True)
    sp.fit(network, sp.SigProp(), data, num_steps=8, epochs=25, progress=False)
    found = sp.evaluate(network, data.test, 8)
    assert found.accuracy == {}
    assert found.error < 0.25 * float(targets[500:].var(0).mean())


def learn(network: sp.Network, inputs: Tensor, labels: Tensor, **settings: object) -> None:
    rule = sp.SigProp(**settings)
    rule.learn(network, rule.initial_state(network), inputs, labels)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda n, x: learn(n, x[:, :1], LABELS[:1], loss=sp.Pairwise()), InputError, "batch of 1 has no pairs"),
        (lambda n, x: learn(n, x, LABELS, optimizer=torch.optim.LBFGS), UnsupportedError, "LBFGS calls the loss again"),
        (lambda n, x: learn(n, x, LABELS, update_every=0), InputError, "update_every = 0 must be at least 1"),
        (lambda n, x: learn(n, x, LABELS, read_every=0), InputError, "read_every = 0 must be at least 1, or None"),
        (
            lambda n, x: learn(n, x, LABELS, read_every=4, update_every=3),
            InputError,
            "read_every = 4 must be at least 1 and at most update_every = 3",
        ),
        (lambda n, x: learn(n, x, LABELS, regions=0), InputError, "regions = 0 must be at least 1, or None"),
        (lambda n, x: learn(n, x, LABELS + 2), InputError, "label 4 lies outside 0..3"),
        (lambda n, x: learn(n, x, LABELS - 1), InputError, "label -1 lies outside 0..3"),
        (lambda n, x: learn(n, x, LABELS[:3]), InputError, r"labels have shape \(3,\), expected \[B\] = \(7,\)"),
        (lambda n, x: learn(n, x, LABELS.double()), InputError, "built for integer classes"),
        (lambda n, x: learn(n, x * torch.nan, LABELS), InputError, "NaN or infinite"),
        (lambda n, x: learn(n, x[0], LABELS), InputError, "time axis comes first"),
        (lambda n, x: n.run(x[..., :5]), InputError, r"shape \(6, 7, 5\), the network expects \[T, B, 9\]"),
        (lambda n, x: n.run(x[:0]), InputError, "no time step or no sample"),
        (lambda n, x: n.run(x.long()), InputError, "convert it with inputs.float()"),
        (lambda n, x: sp.Homeostasis(lowest=0.3, highest=0.2), InputError, "must satisfy 0 < lowest < highest < 1"),
        (lambda n, x: sp.Membrane(clip=0.0), InputError, "clip = 0.0 must be above 0"),
        (
            lambda n, x: learn(mlp((9,), [4], CLASSES, neuron=sp.Rate()).double(), x, LABELS),
            InputError,
            r"rate neurons have none; use SigProp\(learn_on=ReLU\(\)\)",
        ),
    ],
)
def test_bad_input_is_named(act, error, message) -> None:
    network, inputs = make_network("dense", sp.LIF(0.8, 0.7))
    with pytest.raises(error, match=message):
        act(network, inputs)


def test_a_batch_that_changes_within_a_sequence_is_named() -> None:
    network, inputs = make_network("dense", sp.LIF(0.8, 0.7))
    rule = sp.SigProp()
    _, state = rule.learn(network, rule.initial_state(network), inputs, LABELS)
    with pytest.raises(InputError, match=r"began with a batch of 7 and goes on with one of 3; call rule\.begin"):
        rule.learn(network, state, inputs[:, :3], LABELS[:3])


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("trace", ["shared", "exact"])
def test_credit_reaches_back_across_windows(alpha: float, trace: str) -> None:
    """Two windows whose update changes nothing (rate 0) must ask for what one window of both asks for: always so for the
    shared trace, and for the exact one where no neuron spiked in the first window (no reset lies in what is shared)."""
    network, inputs = make_network("dense", sp.LIF(0.8, 1000.0, alpha=alpha))
    network.attach_target(generator=torch.Generator().manual_seed(5))
    asked: list[dict[str, Tensor]] = []
    for update_every in (STEPS, STEPS // 2):
        trained = copy.deepcopy(network)
        rule = sp.SigProp(
            sp.Membrane(clip=None),
            trace=trace,
            update_every=update_every,
            homeostasis=None,
            optimizer=partial(torch.optim.SGD, lr=0.0),
        )
        state = rule.initial_state(trained)
        total: dict[str, Tensor] = {}

        def note(*_, trained=trained, total=total, share=update_every) -> None:
            for name, parameter in trained.named_parameters():
                if parameter.grad is not None and not name.startswith("readout"):
                    total[name] = total.get(name, 0.0) + parameter.grad * share

        state.optimizer.register_step_pre_hook(note)
        state = rule.begin(state)
        for start in range(0, STEPS, update_every):
            for layer in trained.layers:
                layer.rate.copy_(network.layers[0].rate if layer is trained.layers[0] else network.layers[1].rate)
            _, state = rule.learn(trained, state, inputs[start : start + update_every], LABELS)
        asked.append(total)
    assert len(asked[0]) >= 4
    for name, tensor in asked[0].items():
        assert torch.allclose(tensor, asked[1][name], rtol=1e-8, atol=1e-12), name


@pytest.mark.parametrize("similarity_of", ["input rows", "contexts"])
def test_what_differs_from_the_mean_by_rounding_alone_has_no_direction(similarity_of) -> None:
    """Otherwise a single sequence with constant input would hand gradients of 10^4 to the optimiser's moments."""
    generator = torch.Generator().manual_seed(0)
    noise = 1.0 + 1e-6 * torch.randn(1, 5, 200, generator=generator)
    clear = torch.randn(1, 5, 200, generator=generator)
    h, t = (noise, clear) if similarity_of == "input rows" else (clear, noise)
    loss, dh, dt = sp.SimilarityCrossEntropy()(h, t, torch.arange(5).view(1, 5), None)
    assert torch.isfinite(loss).all()
    assert torch.equal(dh, torch.zeros_like(h)) and torch.equal(dt, torch.zeros_like(t))
    _, dh, dt = sp.SimilarityCrossEntropy()(clear, clear.flip(1), torch.arange(5).view(1, 5), None)
    assert float(dh.norm()) > 0.01 < float(dt.norm())
