"""What every benchmark records: versions, the commit, the command, and a result file that is written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spikeprop as sp
from spikeprop.storage import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "spikeprop": sp.__version__,
        "cpu": cpu_model(),
        "threads": str(torch.get_num_threads()),
    }


def cpu_model() -> str:
    """The processor's name as Linux gives it, elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit of the working tree, with "+" where tracked files were changed since; "unknown" outside git."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
        return run.stdout.strip()

    try:
        # Results are outputs of the benchmarks, so writing one does not make the code another.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command(name: str, arguments: Sequence[str]) -> str:
    """The command line as anyone could repeat it: without the options that name folders of one machine."""
    kept, skip = [], False
    for argument in arguments:
        local = argument.partition("=")[0] in ("--data-root", "--out")
        if not skip and not local:
            kept.append(argument)
        skip = not skip and local and "=" not in argument
    return " ".join(["python", f"benchmarks/{name}.py", *kept])


def header(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The part that all result files share."""
    return {"benchmark": name, "versions": versions(), "commit": commit(), "command": command(name, arguments)}


def write_json(path: str | os.PathLike[str], results: dict[str, Any]) -> None:
    write_text(path, json.dumps(results, indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The results in a file, or None where there is no such file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
