"""Runs a worker script that may hang or die, and leaves no process behind. Standard library only: bundles carry a copy.

Lava starts one operating-system process per Lava process, and waits for ever if one of them fails. So a run of it is a process
group of its own, which is ended as a whole on a time-out, an error, an interrupt, and when this process dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

SHOWN_LINES = 12  # of the worker's stderr in an error: a traceback's end


class WorkerError(RuntimeError):
    """The worker hung, failed, or was killed; the message ends with its last words."""


def run_worker(worker: Path, folder: Path, network: Path, timeout: float) -> None:
    """Run ``worker`` on ``network`` and ``messages.npz`` in ``folder``; it writes ``out.npz`` there.

    Raises WorkerError if it does not end well within ``timeout`` seconds.
    """
    command = [sys.executable, str(worker), str(network), "messages.npz", "out.npz", "--follow-parent"]
    # Lava's many processes multiply small integer matrices; a pool of threads in each would only fight over the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with open(folder / "stderr.txt", "wb") as errors:
        # Files, not pipes: a process that stayed behind would keep a pipe open and its reader waiting. stdin is a pipe on
        # purpose: it closes when this process dies, and the worker takes that as its sign to end.
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=errors, stderr=errors, env=environment, start_new_session=True
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise WorkerError(
                f"Lava did not finish within {timeout:g} seconds and was stopped; "
                f"raise timeout, or send fewer samples or steps{last_lines(folder)}"
            ) from None
        finally:
            _end_group(process)
    if status != 0:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
        raise WorkerError(f"the Lava run {how}{last_lines(folder)}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the process's session, and reap it. Harmless if all have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def last_lines(folder: Path) -> str:
    """The end of what the worker said, ready to follow an error message."""
    lines = (folder / "stderr.txt").read_text(errors="replace").strip().splitlines()
    return "\n  ".join(["; its last words:", *lines[-SHOWN_LINES:]]) if lines else ""
