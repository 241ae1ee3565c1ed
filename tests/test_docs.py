"""The pages under docs/ that hold code: every Python block runs, in one namespace per page, and prints what the page shows."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

import spikeprop as sp

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md") if "```python" in page.read_text())
NEEDS = {"tutorial.md": "SPIKEPROP_DATA"}  # without it the page's code runs on other data than its figures are from
NUMBER = r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"


def blocks(page: str) -> list[tuple[str, str]]:
    """Kind and text of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def compare(shown: str, printed: str) -> None:
    """The same words in the same places; numbers within a tenth, or 0.03: other machines round otherwise."""
    words, found = (re.sub(NUMBER, "#", text).split() for text in (shown, printed))
    assert words == found, f"the page shows\n{shown}\nbut the code prints\n{printed}"
    for wanted, number in zip(re.findall(NUMBER, shown), re.findall(NUMBER, printed), strict=True):
        assert float(number) == pytest.approx(float(wanted), rel=0.1, abs=0.03), f"{shown}\nbut\n{printed}"


@pytest.mark.parametrize("page", PAGES)
def test_the_code_runs_and_prints_what_the_page_shows(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": page}
    printed, outputs = "", 0
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(text, page, "exec"), scope)
            printed += capsys.readouterr().out
        elif kind == "text":
            outputs += 1
            if page not in NEEDS or NEEDS[page] in os.environ:
                compare(text, printed)
            assert printed
            printed = ""
    assert outputs > 0
    assert not printed, f"the page does not show\n{printed}"
    if page == "tutorial.md":
        check_what_the_tutorial_teaches(scope)


def check_what_the_tutorial_teaches(scope: dict[str, Any]) -> None:
    """On any data."""
    last = {name: angles[-1] for name, (_, _, angles) in scope["trained"].items()}
    assert last["backpropagation"] < 1.0 < last["Kolen-Pollack"] < 25.0
    assert 40.0 < last["feedback alignment"] < 80.0 < last["weight perturbation"] < last["readout alone"] == 90.0
    assert 0.7 < scope["variance"] / (len(scope["gradient"]) + 1) < 1.3
    accuracy = {
        name: sp.evaluate(network, scope["data"].validation, num_steps=1).accuracy["readout"]
        for name, (network, _, _) in scope["trained"].items()
    }
    assert max(accuracy, key=accuracy.__getitem__) == "backpropagation"
    assert min(accuracy, key=accuracy.__getitem__) == "readout alone"
    assert accuracy["weight perturbation"] < accuracy["feedback alignment"] - 0.05


def test_both_pages_are_here() -> None:
    assert {"tutorial.md", "write-your-own-rule.md"} <= set(PAGES)


def test_the_rule_has_twelve_lines() -> None:
    (rule,) = [text for kind, text in blocks("write-your-own-rule.md") if "(LayerwiseRule):" in text]
    assert len(rule.splitlines()) == 12


def test_differences_are_seen() -> None:
    compare("accuracy 0.93 after 5", "accuracy 0.94 after 5\n")
    for other in ("accuracy 0.70 after 5", "accuracy 0.93 after 9", "precision 0.93 after 5", "accuracy 0.93"):
        with pytest.raises(AssertionError):
            compare("accuracy 0.93 after 5", other)
