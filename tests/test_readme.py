"""The README's ten lines run as they stand, its links point at files, its figures are those of the benchmarks."""

import json
import re
from pathlib import Path

import pytest

from spikeprop.backends import lava

ROOT = Path(__file__).parent.parent


def test_the_ten_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line]
    assert len(lines) <= 10
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec("\n".join(lines), scope)
    printed = capsys.readouterr().out
    accuracy = re.search(r"accuracy readout (\S+)  nearest (\S+)  tree (\S+) over 355 samples", printed)
    assert accuracy is not None, printed
    assert float(accuracy[1]) > 0.95
    assert (tmp_path / "digits.safetensors").exists()
    if lava.available():  # the lines on Loihi go on where these end
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        (on_loihi,) = [block for block in blocks if "lava.run" in block]
        exec(on_loihi, scope)
        assert all(spikes.any() for spikes in scope["ours"].spikes)  # type: ignore[attr-defined]


def test_links_and_pictures_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


LABELS = {"digits": "digits, `mlp:256,256`, T = 8, 20 epochs"}
TASKS = {
    "mnist-mlp": "MNIST, `mlp:512,512`, T = 8, 12 epochs",
    "fashion-mnist-mlp": "Fashion-MNIST, `mlp:512,512`, T = 8, 16 epochs",
    "nmnist": "N-MNIST (1,100 recordings), `mlp:256,256`, T = 20, 100 epochs",
}


@pytest.mark.parametrize("task", TASKS)
def test_the_figures_are_those_of_the_evidence(task: str) -> None:
    text = (ROOT / "README.md").read_text()
    rows = json.loads((ROOT / "benchmarks" / "results" / f"evidence-{task}.json").read_text())["summary"]
    kinds = [("bptt", "off"), ("bptt", "on"), ("sigprop-surrogate", "on"), ("sigprop-membrane", "on")]
    shown = [row for row in rows if row["seeds"] == [0, 1, 2] and (row["rule"], row["homeostasis"]) in kinds]
    assert len(shown) == len(kinds)
    for row in shown:
        name = f"`{row['rule']}`" + (f", homeostasis {row['homeostasis']}" if row["rule"] == "bptt" else "")
        figures = " | ".join(f"{each['mean']:.4f} ± {each['std']:.4f}" for each in (row["accuracy"]["readout"], row["loihi"]))
        line = f"| {TASKS[task]} | {name} | {figures} | {row['worst']['dead']:.1%} | {row['worst']['rate']:.2f} |"
        assert line in text, line


@pytest.mark.parametrize("data", LABELS)
def test_the_figures_are_those_of_the_benchmarks(data: str) -> None:
    summary = json.loads((ROOT / "benchmarks" / "results" / f"accuracy-{data}.json").read_text())["summary"]
    for rule, found in summary.items():
        accuracies = " | ".join(
            f"{found['mean'][option]:.4f} ± {found['std'][option]:.4f}" for option in ("readout", "nearest", "tree")
        )
        worst = found["worst"]
        row = f"| {LABELS[data]} | `{rule}` | {accuracies} | {worst['dead']:.1%} | {worst['rate']:.2f} |"
        assert row in (ROOT / "README.md").read_text(), row


def test_the_figures_of_the_loihi_table_are_those_of_the_benchmarks() -> None:
    """Every number of the table is formed anew from the committed results."""
    text, results = (ROOT / "README.md").read_text(), ROOT / "benchmarks" / "results"
    parity, speed = (json.loads((results / f"loihi-{name}.json").read_text())["summary"] for name in ("parity", "speed"))
    assert f"0 of {parity['compared_spikes']:,} spikes and as many membranes differ on {parity['networks']} random" in text
    times = speed["times_lava"]
    assert f"{times['batch_512']:.0f} times Lava's throughput at batch 512, {times['batch_1']:.0f} times at batch 1" in text
    for data, name in (("mnist", "MNIST"), ("digits", "digits")):
        rules = json.loads((results / f"loihi-accuracy-{data}.json").read_text())["summary"].values()
        few, many = ("4 bits, trained on", "8 bits")
        lost = {kind: max(0.0, *(rule[kind]["lost"] for rule in rules)) for kind in (few, many)}
        agree = {kind: min(rule[kind]["prediction_agreement"] for rule in rules) for kind in (few, many)}
        wanted = f"{name}: 8 bits at most {lost[many]:.2%} of accuracy, 4 bits after training on at most {lost[few]:.2%}; "
        wanted += f"predictions agree on {agree[many]:.1%} and {agree[few]:.1%}"
        assert wanted in text, wanted


def test_the_figures_of_speed_and_memory_are_those_of_the_benchmarks() -> None:
    """Of the slower, or the larger, of SigProp's two options."""
    text, results = " ".join((ROOT / "README.md").read_text().split()), ROOT / "benchmarks" / "results"
    ours = ("sigprop-surrogate", "sigprop-membrane")
    speed = json.loads((results / "speed.json").read_text())["cells"]
    cells = {cell["work"]: cell for cell in speed if cell["precision"] == "medium" and cell["threads"] == 1}
    step = {work: max(cell["ms"][name]["median"] for name in ours) for work, cell in cells.items()}
    ratio = {
        (work, other): min(cell["times"][name][other]["median"] for name in ours)
        for work, cell in cells.items()
        for other in ("snntorch", "BPTT by hand, bfloat16")
    }
    short, long, maps = "mlp, T = 25", "mlp, T = 100", "conv, T = 10"
    assert f"takes {step[short]:.0f} and {step[long]:.0f} ms on one core" in text
    for works, tail in (((short, long), ""), ((maps,), " (`benchmarks/speed.py`")):
        peer, by_hand = (
            " and ".join(f"{ratio[work, other]:.1f}" for work in works) for other in ("snntorch", "BPTT by hand, bfloat16")
        )
        if tail:
            assert f"network is {peer} and {by_hand} times as fast{tail}" in text
        else:
            assert f"{peer} times as fast as snnTorch and {by_hand} times as fast as BPTT written by hand" in text
    memory = json.loads((results / "memory.json").read_text())["cells"]
    peak = {
        steps: max(
            cell["peak_mib"]
            for cell in memory
            if (cell["mode"], cell["num_steps"], len(cell["hidden"])) == ("stream", steps, 2) and cell["rule"] in ours
        )
        for steps in (10, 1000)
    }
    assert f"at batch 128 peak at {peak[1000]:.1f} MiB over the imports, 10 steps at {peak[10]:.1f} " in text
