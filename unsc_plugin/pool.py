"""Originals and retrained models: trained once, kept under a key of all that determines them.

A member is a folder named by its key: `model.safetensors`, `meta.json` (seconds, work, versions,
device, SHA-256 of every file) and, per frame it was observed on, `outputs-<frame>.safetensors` with
its numbers and hash. Folders appear whole, by one rename; a claim file keeps two workers from
training the same member.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unsc_plugin import engine, evaluation
from unsc_plugin.errors import CacheMismatch
from unsc_plugin.evaluation import Frame, Outputs
from unsc_plugin.method import Progress
from unsc_plugin.rows import Rows
from unsc_plugin.runtime import WorkCounter, sealed, state_sha256, warm_up
from unsc_plugin.spec import Recipe, canonical_json, derive, fingerprint

SCHEMA = 1
UNKNOWN_SECONDS = 900.0
"""How long a claim of a foreign machine is respected when no member tells how long training is."""


def default_root() -> Path:
    """Return `$UNSC_CACHE`, or `~/.cache/unsc_plugin`."""
    given = os.environ.get("UNSC_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "unsc_plugin"


@dataclass(frozen=True)
class Member:
    """One trained model of the cache."""

    key: str
    folder: Path
    meta: dict[str, Any]

    def load_into(self, model: nn.Module) -> nn.Module:
        """Return `model` with the member's weights, in eval mode."""
        model.load_state_dict(load_file(self.folder / "model.safetensors"))
        return model.eval()


@dataclass(frozen=True)
class Pool:
    """The cache folder and who may write to it.

    `device` is the accelerator; with several processes all of them train together and the main one
    writes.
    """

    root: Path
    device: Any = None
    micro_batches: int = 1

    def member(
        self,
        *,
        identity: dict[str, Any],
        build: Callable[[int], nn.Module],
        rows: Rows,
        recipe: Recipe,
        seed: int,
        progress: Callable[[Progress], None] | None = None,
    ) -> Member:
        """Return the model of `identity`, trained on `rows` by `recipe` unless it is cached.

        `identity` names data and backbone; recipe, rows, weights and seed are added to the key.
        `build(seed)` gives the untrained model. The training is that of the method `retrain`: the
        same seed gives the same bits.

        Raises:
            CacheMismatch: a cached file is not the one that was written.
            DivergedError: the training diverged.
        """
        parts = {
            "schema": SCHEMA,
            "fit": engine.FIT_VERSION,
            "rows": hashlib.sha256(rows.index.numpy().tobytes()).hexdigest(),
            "labels": hashlib.sha256(rows.labels.numpy().tobytes()).hexdigest(),
            "weights": hashlib.sha256(rows.weight.numpy().tobytes()).hexdigest(),
            "recipe": recipe.model_dump(mode="json"),
            "seed": seed,
            "micro_batches": self.micro_batches,
            "precision": getattr(self.device, "mixed_precision", "no"),
            **identity,
        }
        key = fingerprint(parts)
        folder = self.root / "models" / key[:2] / key
        with self._claimed(folder) as mine:
            if mine:
                alive = _heartbeat(_claim_file(folder), progress)
                self._train(folder, parts, build, rows, recipe, seed, alive)
        return self._open(key, folder)

    def outputs(
        self, member: Member, frame: Frame, build: Callable[[int], nn.Module], *, relearn_seed: int
    ) -> Outputs:
        """Return what a member does on a frame; observed once, then read from the cache.

        Raises:
            CacheMismatch: a cached file is not the one that was written.
        """
        name = f"outputs-{fingerprint([frame.identity(), relearn_seed])[:24]}"
        path = member.folder / f"{name}.safetensors"
        if not engine.broadcast(path.is_file(), self.device):
            model = member.load_into(build(0))
            if self.device is not None:
                model = model.to(self.device.device)
            with sealed(relearn_seed):
                found = evaluation.observe(
                    model, frame, relearn_seed=relearn_seed, device=self.device
                )
            if self._main:
                self._publish_outputs(found, member.folder, name)
            self._wait()
        return Outputs.load(path)

    # -- training and writing

    @property
    def _main(self) -> bool:
        return self.device is None or bool(self.device.is_main_process)

    def _wait(self) -> None:
        if self.device is not None:
            self.device.wait_for_everyone()

    def _train(
        self,
        folder: Path,
        parts: dict[str, Any],
        build: Callable[[int], nn.Module],
        rows: Rows,
        recipe: Recipe,
        seed: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        counter = WorkCounter()
        with sealed(seed):
            warm_up()
            model = build(derive(seed, "init"))
            if self.device is not None:
                model = model.to(self.device.device)
            counter.watch(model)
            context = engine.train(
                model,
                rows,
                recipe,
                seed=seed,
                device=self.device,
                micro_batches=self.micro_batches,
                progress=progress,
            )
            counter.forget(model)
        here = torch.tensor(counter.samples, device=context.device)
        work = int(engine.reduce_sum(here, self.device))
        if not self._main:
            return
        meta = {
            "parts": parts,
            "seconds": context.clock.seconds,
            "steps": context.steps,
            "work": work,
            "device": device_name(self.device),
            "sha256": state_sha256(model),
        }
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
        state = {
            name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()
        }
        save_file(state, temporary / "model.safetensors")
        meta["files"] = {"model.safetensors": _file_sha256(temporary / "model.safetensors")}
        (temporary / "meta.json").write_text(json.dumps(meta, sort_keys=True, indent=2))
        temporary.chmod(0o755)  # made private by mkdtemp; a cache may be shared
        try:
            temporary.rename(folder)
        except OSError:
            shutil.rmtree(temporary)
            if not folder.is_dir():
                raise
            # another machine was first: its member stands

    def _publish_outputs(self, found: Outputs, folder: Path, name: str) -> None:
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as scratch:
            found.save(Path(scratch) / f"{name}.safetensors")
            os.replace(Path(scratch) / f"{name}.safetensors", folder / f"{name}.safetensors")

    def _open(self, key: str, folder: Path) -> Member:
        try:
            meta = json.loads((folder / "meta.json").read_text())
            expected_files = dict(meta["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheMismatch(
                f"{folder / 'meta.json'}: expected what was written beside the model, got "
                f"{type(error).__name__}: {error}; delete the folder to train this model again"
            ) from None
        for name, expected in expected_files.items():
            path = folder / name
            found = _file_sha256(path) if path.is_file() else "no file"
            if found != expected:
                raise CacheMismatch(
                    f"{folder / name}: expected SHA-256 {expected}, found {found}; delete the "
                    "folder to train this model again"
                )
        return Member(key, folder, meta)

    # -- claims

    @contextlib.contextmanager
    def _claimed(self, folder: Path) -> Iterator[bool]:
        """Yield whether this process (group) has to train; wait while another one does."""
        mine = self._claim(folder) if self._main else False
        mine = bool(engine.broadcast(mine, self.device))
        try:
            yield mine
        finally:
            if mine and self._main:
                _claim_file(folder).unlink(missing_ok=True)
            self._wait()

    def _claim(self, folder: Path) -> bool:
        folder.parent.mkdir(parents=True, exist_ok=True)
        claim = _claim_file(folder)
        while not folder.is_dir():
            try:
                descriptor = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                if _stale(claim):
                    claim.unlink(missing_ok=True)
                else:
                    time.sleep(0.05)
                continue
            with os.fdopen(descriptor, "w") as handle:
                me = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
                handle.write(canonical_json(me))
            if folder.is_dir():  # finished between the look and the claim
                claim.unlink(missing_ok=True)
                return False
            return True
        return False


def _heartbeat(
    claim: Path, progress: Callable[[Progress], None] | None
) -> Callable[[Progress], None]:
    """Return a progress callback that keeps the claim young for as long as epochs go by."""

    def beat(told: Progress) -> None:
        if told.epoch_end:
            with contextlib.suppress(FileNotFoundError):
                os.utime(claim)
        if progress is not None:
            progress(told)

    return beat


def _claim_file(folder: Path) -> Path:
    return folder.with_suffix(".claim")


def _stale(claim: Path) -> bool:
    """Return whether the claimant is gone: dead on this machine, or too old on another one."""
    try:
        age = time.time() - claim.stat().st_mtime
        holder = json.loads(claim.read_text() or "{}")
    except FileNotFoundError:
        return False
    except json.JSONDecodeError:
        return age > 5  # killed while writing it
    if holder.get("host") == socket.gethostname() and "pid" in holder:
        pid = int(holder["pid"])
        return not _alive(pid) or _born(pid) != holder.get("born")
    return age > (5 if not holder else UNKNOWN_SECONDS)


def _born(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if it has ended.

    A process number is given out again, and an ended process keeps its own until it is waited for.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = status.rpartition(")")[2].split()  # from field 3 on; the name before may hold spaces
    return None if fields[0] in "ZX" else fields[19]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _file_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def device_name(device: Any) -> str:
    """Return a name of the device and the number of processes, for comparing times."""
    where = device.device if device is not None else torch.device("cpu")
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
    else:
        name = f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
    count = device.num_processes if device is not None else 1
    return name if count == 1 else f"{count} x {name}"
