"""The training loop: reproducible, resumable bit for bit, interruptible; the demo's accuracy; homeostasis."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import spikeprop as sp
from spikeprop.catalogue import configure
from spikeprop.errors import CheckpointError, InputError
from spikeprop.models import conv, mlp
from spikeprop.rules.forward_forward import predict_by_goodness
from spikeprop.storage import read_tensors, write_tensors
from spikeprop.training import CHECKPOINT

ADAM = partial(torch.optim.Adam, lr=4e-3)


def fit(network: sp.Network, folder: Path | None = None, **settings) -> sp.History:
    arguments = {"num_steps": 4, "epochs": 4, "seed": 3, "progress": False, **settings}
    return sp.fit(network, sp.SigProp(), sp.data.load("digits"), folder=folder, **arguments)


def small(seed: int = 0) -> sp.Network:
    return mlp((1, 8, 8), [24, 20], 10, seed=seed)


def assert_same(one: sp.Network, other: sp.Network) -> None:
    for (name, tensor), again in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, again), name


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("encoder", [sp.Current(), sp.Poisson(), sp.Latency()])
def test_a_sequence_in_stretches_trains_as_the_whole_does(encoder, chunk) -> None:
    """Updates every two steps, which the stretches cut differently; in float64, as float32 orders sums otherwise."""
    data = sp.data.load("digits")
    data = replace(data, train=sp.data.Split(data.train.inputs[:200], data.train.labels[:200]))
    networks, histories = (small().double(), small().double()), []
    for network, cut in zip(networks, (None, chunk), strict=True):
        rule = sp.SigProp(update_every=2, optimizer=partial(torch.optim.SGD, lr=0.01))
        histories.append(sp.fit(network, rule, data, 5, 2, encoder=encoder, batch_size=50, progress=False, chunk=cut))
    for (name, tensor), other in zip(networks[0].state_dict().items(), networks[1].state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-7, atol=1e-10, msg=name)
    for one, other in zip(histories[0].epochs, histories[1].epochs, strict=True):
        assert one["validation_accuracy"] == other["validation_accuracy"]
        assert one["rate"] == pytest.approx(other["rate"]) and one["dead"] == other["dead"]
    whole, cut = (sp.dead_neurons(networks[0], data.test, 5, encoder=encoder, chunk=size) for size in (None, chunk))
    for one, other in zip(whole.layers, cut.layers, strict=True):
        assert torch.equal(one.spike_counts, other.spike_counts) and torch.equal(one.active_samples, other.active_samples)
        torch.testing.assert_close(one.deficits, other.deficits)


def test_recordings_may_stay_in_a_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    recordings, labels = generator.random((24, 15, 30)) < 0.2, np.arange(24) % 3
    np.save(tmp_path / "x.npy", recordings.astype(np.uint8))
    in_file = np.load(tmp_path / "x.npy", mmap_mode="r")
    networks = [mlp((30,), [20], 3, seed=0).double() for _ in range(2)]
    for network, inputs in zip(networks, (recordings, in_file), strict=True):
        data = sp.data.from_arrays((inputs, labels), temporal=True)
        sp.fit(network, sp.SigProp(update_every=5), data, epochs=2, batch_size=8, progress=False, chunk=4)
    assert np.shares_memory(data.train.inputs.numpy(), in_file)
    assert_same(*networks)
    turned, written = in_file[:, ::-1], np.load(tmp_path / "x.npy", mmap_mode="r+")
    assert torch.equal(sp.data.from_arrays((turned, labels), temporal=True).train.inputs, data.train.inputs.flip(1))
    assert not np.shares_memory(sp.data.from_arrays((written, labels), temporal=True).train.inputs.numpy(), written)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's memory is Linux's")
def test_recordings_larger_than_the_memory_can_be_learned(tmp_path: Path) -> None:
    """A file of 192 MB within 100 MB beyond what the imports take; ten steps of all recordings would take 128 MB."""
    script = """
import resource, sys
import numpy as np, spikeprop as sp, torch
from spikeprop.models import mlp
torch.set_num_threads(1)
file = np.lib.format.open_memmap(sys.argv[1], "w+", np.uint8, (160, 60, 20_000))
file[:, ::10, ::7] = 1
del file
sp.fit(mlp((9,), [4], 2), sp.SigProp(), sp.data.from_arrays((np.ones((4, 9)), [0, 1, 0, 1])), 5, 1, progress=False)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + 100_000_000,) * 2)
data = sp.data.from_arrays((np.load(sys.argv[1], mmap_mode="r"), np.arange(160) % 2), temporal=True)
history = sp.fit(mlp((20_000,), [4], 2), sp.SigProp(update_every=10), data, epochs=1, batch_size=16, progress=False, chunk=10)
print(len(history.epochs))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.npy")], capture_output=True, text=True, timeout=240)
    assert done.stdout == "1\n", done.stderr


class Killed(Exception):
    pass


@pytest.mark.parametrize("encoder", [sp.Current(), sp.Poisson()])
@pytest.mark.parametrize("killed_in", [1, 3])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path, monkeypatch, killed_in: int, encoder) -> None:
    whole, first = small(), small()
    history = fit(whole, encoder=encoder)

    original, calls = sp.training._save, []

    def save_then_die(*arguments: object) -> None:
        original(*arguments)
        calls.append(1)
        if len(calls) == killed_in:
            raise Killed

    monkeypatch.setattr(sp.training, "_save", save_then_die)
    with pytest.raises(Killed):
        fit(first, tmp_path, encoder=encoder)
    monkeypatch.setattr(sp.training, "_save", original)

    resumed = small(seed=99)  # whatever it held is replaced by the checkpoint
    again = fit(resumed, tmp_path, encoder=encoder, resume=True)
    assert_same(whole, resumed)
    assert again.series("loss") == history.series("loss")
    assert again.series("validation_accuracy") == history.series("validation_accuracy")


def test_the_seed_fixes_the_training() -> None:
    one, again, other = small(), small(), small()
    fit(one, epochs=1)
    fit(again, epochs=1)
    fit(other, epochs=1, seed=4)
    assert_same(one, again)
    assert not torch.equal(one.readout.weight, other.readout.weight)


def test_ctrl_c_stops_after_the_batch_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import spikeprop as sp
        from spikeprop.models import mlp
        try:
            sp.fit(mlp((1, 8, 8), [24, 20], 10), sp.SigProp(), sp.data.load("digits"), 4, 10000, folder={str(tmp_path)!r})
        except KeyboardInterrupt as stop:
            print("stopped:", stop)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(2)]
    assert seen[1].startswith("epoch 2/10000")
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    assert f"{CHECKPOINT} holds the epochs before it" in rest
    resumed = mlp((1, 8, 8), [24, 20], 10)
    with pytest.raises(CheckpointError, match="epochs was 10000, is 4"):
        fit(resumed, tmp_path, resume=True)


def test_a_wrong_or_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors does not exist"):
        fit(small(), tmp_path, resume=True)
    with pytest.raises(InputError, match="resume=True needs the folder"):
        fit(small(), resume=True)
    sp.save(small(), tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError, match="is a saved network, not a checkpoint"):
        fit(small(), tmp_path, resume=True)
    fit(small(), tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match=r"other settings \(seed was 3, is 5\)"):
        fit(small(), tmp_path, epochs=1, seed=5, resume=True)
    with pytest.raises(CheckpointError, match="does not fit this network and rule"):
        fit(mlp((1, 8, 8), [24, 21], 10), tmp_path, epochs=1, resume=True)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="damaged"):
        fit(small(), tmp_path, epochs=1, resume=True)


def test_a_checkpoint_of_another_version_is_refused_and_not_misread(tmp_path: Path) -> None:
    """An earlier version stored a setting called noise where there is now one called augment."""
    fit(small(), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    tensors, header = read_tensors(path)
    del header["settings"]["augment"]
    header["settings"]["noise"] = 0.0
    write_tensors(path, tensors, header)
    with pytest.raises(CheckpointError, match=r"other settings \(noise was 0\.0, is unknown; augment was unknown, is \{"):
        fit(small(), tmp_path, resume=True)


def test_data_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match=r"digits has inputs of shape \(1, 8, 8\), the network expects \(64,\)"):
        fit(mlp((64,), [8], 10))
    with pytest.raises(InputError, match="digits has 10 classes, the network 9 classes"):
        fit(mlp((1, 8, 8), [8], 9))
    with pytest.raises(InputError, match="epochs = 0 must be at least 1"):
        fit(small(), epochs=0)
    with pytest.raises(InputError, match="num_steps is missing"):
        fit(small(), num_steps=None)
    with pytest.raises(InputError, match=r"noise = 0\.1 suits inputs fed as a current, not the poisson encoder"):
        fit(small(), augment=sp.Augmentation(noise=0.1), encoder=sp.Poisson())


def test_noise_is_on_the_training_inputs_alone() -> None:
    """Its mean square at the first layer's input, over what the rule is shown, is the square of the deviation asked for."""
    seen: list[torch.Tensor] = []

    class Spy(sp.SigProp):
        def learn(self, network, state, inputs, labels):
            seen.append(inputs[0].clone())
            return super().learn(network, state, inputs, labels)

    data = sp.data.load("digits")
    network = small()
    sp.fit(network, Spy(), data, 2, 1, batch_size=1085, augment=sp.Augmentation(noise=0.25), seed=3, progress=False)
    assert torch.allclose(network.input_mean, data.train.inputs.mean(0), atol=1e-5)
    shown = torch.cat(seen).flatten(1)
    nearest = torch.cdist(shown, data.train.inputs.flatten(1)).amin(1)
    assert nearest.square().mean().item() == pytest.approx(64 * 0.25**2, rel=0.1)
    assert len(shown) == 1085


def test_the_learning_rate_falls_as_half_a_cosine_and_adam_is_torchs_own() -> None:
    rates: list[float] = []

    class Spy(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    rule = sp.SigProp(optimizer=partial(Spy, lr=4e-3))
    sp.fit(small(), rule, sp.data.load("digits"), 2, 2, batch_size=200, progress=False)
    steps = torch.arange(12, dtype=torch.float64)
    assert torch.allclose(torch.tensor(rates, dtype=torch.float64), 2e-3 * (1 + torch.cos(torch.pi * steps / 12)))


@pytest.mark.parametrize("act_on", ["bias", "threshold"])
def test_homeostasis_brings_dead_and_busy_neurons_into_the_band(act_on: str) -> None:
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [64], 10)
    weight = network.layers[0].synapse.weight
    weight[:32] *= 0.02
    weight[32:] = 3.0 * weight[32:].abs()
    start = sp.dead_neurons(network, data.train, 8).layers[0]
    assert start.dead > 0.4
    assert start.rate > 0.4
    rule = sp.SigProp(
        homeostasis=sp.Homeostasis(lowest=0.05, highest=0.2, strength=0.2, act_on=act_on),
        optimizer=partial(torch.optim.SGD, lr=0.0),
    )
    sp.fit(network, rule, data, 8, 12, progress=False)
    end = sp.dead_neurons(network, data.train, 8).layers[0]
    rates = end.spike_counts / (len(data.train.inputs) * 8)
    assert end.dead == 0.0
    assert ((rates > 0.04) & (rates < 0.24)).double().mean() > 0.95


def test_homeostasis_moves_nothing_inside_the_band_and_by_its_formula_outside() -> None:
    layer = mlp((4,), [4], 2).layers[0]
    layer.bias.zero_()
    layer.rate.copy_(torch.tensor([0.0, 0.01, 0.1, 0.6]))
    sp.Homeostasis(lowest=0.02, highest=0.2, strength=0.02).regulate(layer, 128)
    assert layer.bias.tolist() == pytest.approx([0.02, 0.01, 0.0, -0.02])
    sp.Homeostasis(lowest=0.02, highest=0.2, strength=0.02).regulate(layer, 64)
    assert layer.bias.tolist() == pytest.approx([0.03, 0.015, 0.0, -0.03])


def test_homeostasis_wakes_a_neuron_that_has_just_fallen_silent() -> None:
    """Its running rate is that of better days; in few rows silence says nothing."""
    for batch, moved in ((128, [0.02, 0.0, 0.02, -0.02]), (127, [0.0, 0.0, -0.02, -0.02])):
        layer = mlp((4,), [4], 2).layers[0]
        layer.bias.zero_()
        layer.rate.copy_(torch.tensor([0.1, 0.1, 0.6, 0.6]))
        activity = torch.tensor([0.0, 0.1, 0.0, 0.6])
        sp.Homeostasis(lowest=0.02, highest=0.2, strength=0.02).regulate(layer, batch, activity)
        torch.testing.assert_close(layer.bias, torch.tensor(moved) * (batch / 128))


@pytest.mark.parametrize(("biases", "moved"), [("neuron", [[0.0, 0.02], [0.02, 0.01]]), ("channel", [[0.0]])])
def test_in_maps_the_floor_is_the_neurons_and_the_ceiling_the_channels(biases: str, moved: list[list[float]]) -> None:
    layer = conv((1, 4, 4), [2], 2, biases=biases).layers[0]
    layer.bias.zero_()
    layer.rate[0] = torch.tensor([[0.6, 0.0], [0.0, 0.01]])  # 0.15 on average
    layer.rate[1] = torch.tensor([[0.6, 0.3], [0.3, 0.0]])  # 0.3: down, but for the dead neuron
    sp.Homeostasis(lowest=0.02, highest=0.2, strength=0.02).regulate(layer, 128)
    torch.testing.assert_close(layer.bias[0], torch.tensor(moved))
    lowered = torch.tensor([[-0.01, -0.01], [-0.01, 0.02 if biases == "neuron" else -0.01]])
    torch.testing.assert_close(layer.bias[1].expand(2, 2), lowered)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("name", ["sigprop-surrogate", "sigprop-membrane", "sigprop-raw-membrane"])
def test_a_layer_written_in_another_scale_learns_the_same(name: str, kind: str) -> None:
    """Threshold, weights and biases four times as large are the same neurons: bit for bit, since 4 is a power of two.

    (With next to no eps, the one number that Adam compares gradients with.)
    """

    def make() -> sp.Network:
        return mlp((1, 12, 12), [20, 16], 3) if kind == "mlp" else conv((1, 12, 12), [4], 3, hidden=[16])

    def trained(scale: float) -> tuple[sp.Network, torch.Tensor]:
        network, generator = make(), torch.Generator().manual_seed(1)
        for layer in network.layers:
            layer.neuron.threshold *= scale
            for tensor in layer.weights():
                tensor.mul_(scale)
        rule = replace(configure(name, {}), optimizer=partial(torch.optim.Adam, lr=4e-3, eps=1e-30))
        state = rule.initial_state(network, generator=torch.Generator().manual_seed(0))
        for _ in range(12):
            inputs = torch.rand(6, 16, 1, 12, 12, generator=generator)
            answer, state = rule.learn(network, rule.begin(state), inputs, torch.randint(3, (16,), generator=generator))
        return network, answer.outputs

    (network, outputs), (larger, again) = trained(1.0), trained(4.0)
    assert torch.equal(outputs, again)
    for layer, other in zip(network.layers, larger.layers, strict=True):
        for tensor, large in zip(layer.weights(), other.weights(), strict=True):
            assert torch.equal(large, 4.0 * tensor)
    assert not torch.equal(network.layers[0].weights()[0], make().layers[0].weights()[0])


@pytest.mark.parametrize("learn_on", [sp.Membrane(), sp.ATan()])
def test_digits_accuracy(learn_on) -> None:
    """One seed, well under the mean of three that benchmarks/results/accuracy-digits.json records."""
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [256, 256], data.num_classes)
    history = sp.fit(network, sp.SigProp(learn_on), data, 8, 20, progress=False)
    assert sp.evaluate(network, data.test, 8).accuracy["readout"] > 0.96
    health = sp.dead_neurons(network, data.test, 8)
    assert max(health.share("dead")) <= 0.01
    assert max(health.share("rate")) <= 0.25
    assert history.series("loss")[-1][0] < 0.5 * history.series("loss")[0][0]


def test_mnist_learns(data_root: Path) -> None:
    data = sp.data.load("mnist", data_root)
    part = sp.data.from_arrays(
        train=(data.train.inputs[:6000], data.train.labels[:6000]),
        test=(data.validation.inputs[:2000], data.validation.labels[:2000]),
    )
    network = mlp(part.input_shape, [128, 128], 10)
    sp.fit(network, sp.SigProp(), part, 8, 3, progress=False)
    assert sp.evaluate(network, part.test, 8).accuracy["readout"] > 0.9


def test_braille_letters_and_event_data_train(data_root: Path) -> None:
    data = sp.data.load("braille", data_root)
    network = mlp(data.input_shape, [64], data.num_classes, neuron=sp.LIF(0.95))
    sp.fit(network, sp.SigProp(update_every=32), data, epochs=2, progress=False)
    assert sp.evaluate(network, data.validation).accuracy["readout"] > 0.4  # chance is 1/7


def test_a_checkpoint_of_another_rule_is_refused(tmp_path: Path) -> None:
    fit(small(), tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="rule was SigProp, is BPTT"):
        sp.fit(small(), sp.BPTT(), sp.data.load("digits"), 4, 1, seed=3, folder=tmp_path, resume=True, progress=False)


def test_a_last_batch_that_is_too_small_is_refused_before_training() -> None:
    data = sp.data.load("digits")
    data = replace(data, train=sp.data.Split(data.train.inputs[:65], data.train.labels[:65]))
    network = small()
    with pytest.raises(InputError, match="a batch of 1 has no pairs to compare"):
        sp.fit(network, sp.SigProp(loss=sp.Pairwise()), data, 2, 1, batch_size=32, progress=False)
    assert_same(network, small())


def test_one_rule_after_another_leaves_no_stale_target() -> None:
    """Class responses and labels beside the input are different things; what another rule left is not mistaken for them."""
    data, network = sp.data.load("digits"), small()
    inputs = data.train.inputs[:6].expand(2, -1, -1, -1, -1)

    def options() -> list[str]:
        return list(sp.evaluate(network, data.test, 2).accuracy)

    sp.SigProp().initial_state(network)
    assert options() == ["readout", "nearest", "tree"]
    with pytest.raises(InputError, match="no label synapses; train it with ForwardForward first"):
        predict_by_goodness(network, inputs)
    sp.ForwardForward().initial_state(network)
    assert options() == ["readout"] and predict_by_goodness(network, inputs).shape == (6,)
    sp.SigProp().initial_state(network)
    assert options() == ["readout", "nearest", "tree"]
    sp.BPTT().initial_state(network)
    assert options() == ["readout"]
