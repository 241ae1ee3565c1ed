"""Files: networks and checkpoints as safetensors with a JSON header, written whole or not at all. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spikeprop.errors import CheckpointError
from spikeprop.network import Network, network_from_config

FORMAT = 1


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well and disappears when it does not.

    A process killed at any moment leaves either the old file or the new one. Raises CheckpointError where the disk is full or
    the folder cannot be written; the old file is then untouched.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error.strerror or error}); what stood there is unchanged. "
            "Free some space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write named tensors and a JSON header as one safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    payload = save(plain, {"spikeprop": json.dumps({"format": FORMAT, **header})})
    with atomic_write(path) as temporary:
        temporary.write_bytes(payload)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of :func:`write_tensors`. CheckpointError for a file that is missing, damaged, foreign or of a newer format."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); take an older copy or train again"
        ) from None
    if "spikeprop" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file that spikeprop did not write; build the network and load its tensors by hand"
        )
    try:
        header = json.loads(metadata["spikeprop"])
        version = header.get("format")
    except (ValueError, AttributeError):
        raise CheckpointError(f"{path} has a damaged header; take an older copy or train again") from None
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}, this version reads {FORMAT}; install the version that wrote it")
    return tensors, header


def save_network(network: Network, path: str | os.PathLike[str]) -> None:
    """Save a network: architecture, weights, centring means, readout and target synapses, in one safetensors file.

    Raises CheckpointError if the file cannot be written; an earlier file at ``path`` is then unchanged.
    """
    write_tensors(path, network.state_dict(), {"network": network.config()})


def load_network(path: str | os.PathLike[str]) -> Network:
    """Load a network that :func:`save_network` wrote. Raises CheckpointError where that is not what the file holds."""
    tensors, header = read_tensors(path)
    return restore_network(tensors, header, path)


def restore_network(tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: str | os.PathLike[str]) -> Network:
    """Rebuild a network from tensors and header already read from ``path``."""
    if "network" not in header:
        raise CheckpointError(f"{path} holds no network")
    try:
        network = network_from_config(header["network"])
        network.to(tensors["readout.weight"].dtype).load_state_dict(dict(tensors))
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())  # torch reports over several lines
        raise CheckpointError(f"{path}: the tensors do not fit the architecture in its header ({reason})") from None
    return network
