"""What every benchmark records: versions, the commit, the command, and a result file that is written whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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


Key = tuple[Any, ...]
Cells = dict[Key, dict[str, Any]]


class ResultFile:
    """The cells of a benchmark, each written as soon as it is done, by one process or several with the same command.

    Args:
        path: of the result file. A lock file stands beside it; its locks are gone when the process ends, however it ends.
        names: the entries of a cell that identify it, for example ``("rule", "seed")``; a key has their values.
        settings: what a cell of that key would be made with, or None where it is not asked for.
        whole: all that is written, of all cells.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        names: Sequence[str],
        settings: Callable[[Key], dict[str, Any] | None],
        whole: Callable[[Cells], dict[str, Any]],
    ) -> None:
        self.path, self.names, self.settings, self.whole = Path(path), tuple(names), settings, whole
        self.commit = commit()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._locks = open(self.path.with_name(f".{self.path.name}.lock"), "w")  # noqa: SIM115 - closing it would free the locks

    def cells(self, say: Callable[[str], None] = lambda line: None) -> Cells:
        """The cells in the file, but for those made with other settings. What was not asked for stays as it is."""
        found = {}
        for cell in (read_json(self.path) or {"cells": []})["cells"]:
            key = tuple(cell[name] for name in self.names)
            if self.settings(key) in (None, cell["settings"]):
                found[key] = cell
                say(f"{self.title(key)}: kept, made at commit {cell['commit'][:12]}")
            else:
                say(f"{self.title(key)}: dropped, made with other settings")
        return found

    def fill(self, order: Iterable[Key], make: Callable[[Key], dict[str, Any]]) -> Cells:
        """Make the missing cells in this order, without those that another process is at; returns what the file then holds."""
        self.cells(print)
        for key in order:
            with self._locked(self.title(key), wait=False) as mine:
                if not mine or key in self.cells():
                    continue
                print(f"{self.title(key)}:", flush=True)
                cell = dict(zip(self.names, key, strict=True)) | {"settings": self.settings(key), "commit": self.commit}
                cell |= make(key)
                with self._locked("", wait=True):  # another process may have written since
                    write_json(self.path, self.whole(self.cells() | {key: cell}))
        return self.cells()

    def title(self, key: Key) -> str:
        """A key as it is printed, for example "bptt, homeostasis off, weights, level 0.8, seed 0"."""
        pairs = zip(self.names, key, strict=True)
        return ", ".join(str(value) if name in ("rule", "dial") else f"{name} {value}" for name, value in pairs)

    @contextmanager
    def _locked(self, what: str, wait: bool) -> Iterator[bool]:
        """Lock one byte of the lock file, which stands for ``what``; False where another process has it and we do not wait."""
        place = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "big")
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation of the values that are not None; None where there are too few."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.mean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
    }
