"""The demo and its report: complete, self-contained, well-formed, and honest about what did not run."""

import builtins
import copy
import json
import re
import struct
from html.parser import HTMLParser

import pytest
import torch

from spikeprop import demo, report, runs
from spikeprop.backends import lava, loihi
from spikeprop.cli import main
from spikeprop.errors import BackendError

VOID = {"meta", "path", "br", "img", "use", "rect", "image"}  # without an end tag, or closed in themselves


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The demo with one epoch, as the command runs it: its folder."""
    folder = tmp_path_factory.mktemp("demo")
    status = main(
        ["demo", "--epochs", "1", "--samples", "50", "--out", str(folder), "--picture", str(folder / "demo.png"), "--json"]
    )
    assert status == (0 if lava.available() else 1)
    return folder


@pytest.fixture
def content(shown):
    return json.loads((shown / "report.json").read_text())


def again(shown, monkeypatch, **options):
    """The demo once more, on the networks that it has trained already."""
    monkeypatch.setattr(demo, "_train", lambda folder, rule, epochs: runs.load_run(shown / rule))
    return demo.run(shown.parent / "again", **options)


class Outline(HTMLParser):
    """Tags in balance, attributes that point elsewhere, and the text of every table cell."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.cells, self.tags, self.ids = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action", "srcset")]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def outline(text):
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_report_is_one_self_contained_well_formed_page(shown):
    text = (shown / "report.html").read_text()
    page = outline(text)
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert {name for name in re.findall(r"url\(#([^)]*)\)", text)} <= set(page.ids)
    assert page.tags.count("svg") == 4 + 2 * 2 and page.tags.count("table") == 5
    assert "#0072b2" not in text.split("</style>")[1], "a colour that would not follow the reader's setting"
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert len(text) < 500_000


def test_report_says_what_was_measured(shown, content):
    cells = outline((shown / "report.html").read_text()).cells
    for training in content["trainings"]:
        run = runs.load_run(shown / training["rule"])
        assert training["accuracy"] == run.result["accuracy"] and training["epochs"] == run.history.epochs
        assert all(f"{100 * share:.2f} %" in cells for share in training["accuracy"].values())
        assert f"{training['peak_memory_mib']:.0f} MiB" in cells
    for layer in content["hardware"]["integer"]["layers"]:
        assert f"{layer['spikes']:,}" in cells and f"{layer['differing']:,}" in cells
    for layer in content["hardware"]["report"]["layers"]:
        assert f"{layer['scale']:.1f}" in cells and str(layer["threshold_register"]) in cells


def test_parity_on_the_whole_test_set(shown, content, monkeypatch):
    hardware, run = content["hardware"], runs.load_run(shown / "sigprop-membrane")
    inputs, labels = run.data().test
    chip = loihi.quantize(run.network)
    spikes = loihi.simulate(chip, loihi.encode(chip, inputs, 8)).spikes
    assert hardware["integer"]["samples"] == len(labels) == 355
    assert [layer["spikes"] for layer in hardware["integer"]["layers"]] == [int(layer.sum()) for layer in spikes]
    with torch.inference_mode():
        predicted = run.network.readout(torch.from_numpy(spikes[-1]).float().mean(0)).argmax(1)
    assert hardware["accuracy"]["integer"] == pytest.approx(float((predicted == labels).double().mean()))
    assert hardware["accuracy"]["float"] == pytest.approx(run.result["accuracy"]["readout"])


@pytest.mark.skipif(not lava.available(), reason="Lava is not installed")
def test_lava_agrees_spike_for_spike(content):
    real = content["hardware"]["lava"]
    assert real["samples"] == 50 and all(layer["differing"] == 0 and layer["spikes"] > 0 for layer in real["layers"])
    assert content["hardware"]["accuracy"]["lava"] == real["accuracy_integer"]


def test_activity_is_that_of_the_network(shown, content):
    activity, run = content["activity"], runs.load_run(shown / "sigprop-membrane")
    x = run.data().test.inputs[:1].expand(8, 1, 1, 8, 8)
    chip = run.quantize()
    registers = loihi.simulate(chip, loihi.encode(chip, x), record="all").membranes
    for index, (layer, expected) in enumerate(zip(activity["layers"], run.network.run(x), strict=True)):
        assert layer["spikes"] == expected.spikes[:, 0].nonzero().tolist()
        assert 1 <= len(layer["traces"]) <= 3
        for trace in layer["traces"]:
            assert trace["membrane"] == expected.membrane[:, 0, trace["neuron"]].tolist()
            assert trace["spikes"] == expected.spikes[:, 0, trace["neuron"]].int().tolist()
            scale = 64 * chip.layers[index].scale
            assert trace["integer"] == pytest.approx((registers[index][:, 0, trace["neuron"]] / scale).tolist())


def test_missing_lava_is_said_and_fails(shown, monkeypatch):
    monkeypatch.setattr(lava, "available", lambda: False)
    found = again(shown, monkeypatch)
    assert found.status == 1 and "not run" in found.text and lava.install_command() in found.text
    assert found.summary["lava"] is None and "not installed" in found.summary["lava_not_run"]
    text = (shown.parent / "again" / "report.html").read_text()
    assert "not run" in outline(text).cells and "Lava is not installed" in text


def test_lava_that_does_not_answer_is_said_and_fails(shown, monkeypatch):
    def hang(*_, timeout, **__):
        raise BackendError(f"Lava did not finish within {timeout:g} seconds")

    monkeypatch.setattr(lava, "run", hang)
    found = again(shown, monkeypatch)
    assert found.status == 1 and "did not finish within 120 seconds" in found.text


def test_a_spike_that_differs_fails(shown, monkeypatch):
    def other(chip, messages, **_):
        spikes = loihi.simulate(chip, messages).spikes
        spikes[1][0, 0, 0] ^= 1
        return lava.LavaRun(spikes, [], 1.0)

    monkeypatch.setattr(lava, "run", other)
    found = again(shown, monkeypatch, samples=3)
    assert found.status == 1 and [layer["differing"] for layer in found.summary["lava"]["layers"]] == [0, 1]


def test_missing_matplotlib_is_said_before_anything_is_trained(monkeypatch, tmp_path, capsys):
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 'pip install "spikeprop[report]"' in error
    assert list(tmp_path.iterdir()) == []


def test_picture_is_1200_pixels_wide_and_small(shown):
    picture = (shown / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and struct.unpack(">I", picture[16:20]) == (1200,) and len(picture) < 300_000


def test_text_is_escaped_and_odd_data_are_drawn(content):
    """Dead, silent and single-epoch networks; a name that would break the page."""
    odd = copy.deepcopy(content)
    for training in odd["trainings"]:
        training["rule"] = "<b>&rule"
        training["epochs"] = training["epochs"][:1]
        for layer in training["layers"]:
            layer.update(dead=1.0, nearly_dead=1.0, rate=0.0)
    for layer in odd["activity"]["layers"]:
        layer["spikes"], layer["traces"] = [], layer["traces"][:1]
    page = outline(report.page(odd, report.figures(odd)))
    assert "b" not in page.tags[page.tags.index("table") :]
    assert "256 of 256" in page.cells


def test_spikes_input_is_described(content):
    content["hardware"]["report"]["inputs"] = "spikes"
    assert "Inputs enter as spikes" in report.page(content, report.figures(content))
