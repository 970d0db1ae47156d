"""Weights on disk and their identity: safetensors out, safetensors or safe torch files in."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from unsc_plugin.errors import CheckpointError

CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "weights")
WRAPPERS = ("module.", "_orig_mod.")
SHOWN = 4


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the state of `model` as safetensors, through a temporary file and a rename.

    Tied weights are written once per name, so that the file loads key by key everywhere.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load `path` into `model`: safetensors, or a torch file that holds tensors only.

    Names may be the classifier's or the bare backbone's, and may carry the prefixes of data
    parallelism or compilation. Everything is compared before anything is written.

    Raises:
        CheckpointError: truncated, unsafe, or not of this architecture; the model is unchanged.
    """
    path = Path(path)
    found = _read(path)
    target = model.state_dict()
    renamed = max(_spellings(found), key=lambda state: len(state.keys() & target.keys()))
    _restore_tied(renamed, target)
    faults = _differences(target, renamed)
    if faults:
        raise CheckpointError(
            f"{path}: expected {len(target)} tensors of this {type(model).__name__}, found "
            f"{len(renamed)} that do not fit:\n"
            + "\n".join(faults)
            + "\nload them into the backbone they belong to (same id, classes, channels, stem)"
        )
    model.load_state_dict(renamed)


def state_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of every tensor's name, dtype, shape and bytes, in order of names.

    >>> layer = nn.Linear(2, 2)
    >>> state_sha256(layer) == state_sha256(nn.Linear(2, 2))
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"expected a file of weights at {path}, found none; check the path")
    if path.suffix == ".safetensors":
        try:
            return dict(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: expected a whole safetensors file, got {error}; copy it again"
            ) from None
    return _tensors(_read_torch(path), path)


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise CheckpointError(
            f"{path}: expected tensors only, found pickled objects or damage ({reason}); nothing "
            "was executed. Save `model.state_dict()` as safetensors and load that"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise CheckpointError(
            f"{path}: expected a whole torch file, got {reason}; copy it again"
        ) from None


def _tensors(tree: Any, path: Path) -> dict[str, Tensor]:
    for name in CONTAINERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(name), Mapping):
            tree = tree[name]
            break
    if not isinstance(tree, Mapping) or not all(isinstance(v, Tensor) for v in tree.values()):
        raise CheckpointError(
            f"{path}: expected a state dict (names and tensors), got {type(tree).__name__}; "
            "save `model.state_dict()`"
        )
    return dict(tree)


def _spellings(found: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the state as it is and as the other ways of saving the same model spell it."""
    bare = found
    for prefix in WRAPPERS:
        bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
    return [found, bare, {f"backbone.{name}": tensor for name, tensor in bare.items()}]


def _restore_tied(found: dict[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Fill in names whose storage another, present name shares."""
    present = {
        (tensor.data_ptr(), tuple(tensor.shape)): name
        for name, tensor in target.items()
        if name in found and tensor.numel()
    }
    for name, tensor in target.items():
        twin = present.get((tensor.data_ptr(), tuple(tensor.shape)))
        if name not in found and twin is not None:
            found[name] = found[twin]


def _differences(target: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in target if name not in found]
    unexpected = [name for name in found if name not in target]
    shaped = [
        f"{name} expected {tuple(target[name].shape)} found {tuple(found[name].shape)}"
        for name in target
        if name in found and target[name].shape != found[name].shape
    ]
    typed = [
        f"{name} expected {target[name].dtype} found {found[name].dtype}"
        for name in target
        if name in found and target[name].is_floating_point() != found[name].is_floating_point()
    ]
    groups = {"missing": missing, "unexpected": unexpected, "shape": shaped, "type": typed}
    return [
        f"  {kind}: {', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for kind, names in groups.items()
        if names
    ]
