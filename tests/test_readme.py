"""The README's ten lines run as they stand, its links point at files, its figures are those of the benchmarks."""

import json
import re
from pathlib import Path

import pytest

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


def test_links_and_pictures_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


LABELS = {"digits": "digits, `mlp:256,256`, T = 8, 20 epochs", "mnist": "MNIST, `mlp:512,512`, T = 8, 6 epochs"}


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
