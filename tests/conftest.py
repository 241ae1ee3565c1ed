"""What several tests share."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the suite runs in several processes; small networks gain nothing from more threads


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that ask for it are skipped where there is none."""
    root = os.environ.get("SPIKEPROP_DATA")
    if not root:
        pytest.skip("set SPIKEPROP_DATA to the folder that holds the data sets")
    return Path(root)
