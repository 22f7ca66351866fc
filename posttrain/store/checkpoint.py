"""Atomic, verified checkpoints.

`ckpt/step_0000020/` holds one safetensors file per group of tensors (model, optim, …), `state.json` and `MANIFEST.json`
with the size and sha256 of each. A save writes a hidden folder, fsyncs every file and name, and publishes the folder
with a single rename; only then are old checkpoints removed. So at any moment, even after power loss, the newest folder
whose manifest verifies is either the previous checkpoint or the new one. Only safetensors and JSON are read, so loading
a checkpoint cannot run code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

from posttrain.store import durable
from posttrain.store.durable import DiskError
from posttrain.store.failpoints import failpoint
from posttrain.types import DataError, Json, JsonView, ResumeError

FORMAT = 1
"""Version of the folder layout, recorded in every manifest."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAME = re.compile(r"step_(\d{7,})(\.old)?")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A fully verified checkpoint. `skipped` has one line for each newer checkpoint that was damaged."""

    step: int
    path: Path
    skipped: tuple[str, ...] = ()


def save(
    run_folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: JsonView,
    keep: int,
    also: Sequence[int] = (),
) -> Path:
    """Saves groups of named tensors and a JSON state as the checkpoint of `step`, then keeps the newest `keep` and
    those of the steps in `also`.

    Returns the checkpoint's folder, which survives power loss from then on. Saving a step again (a replay after a
    kill) keeps the existing folder if its contents are identical. Tensors may be on any device and have any layout;
    they are copied to memory one at a time. Raises DiskError (exit code 8), with every earlier checkpoint intact, if
    less than twice the checkpoint's size is free or the disk fails midway, and DataError if JSON would change the
    state.
    """
    text = _state_text(state)
    files = [(_file_name(group), _safetensors(tensors[group])) for group in sorted(tensors)]
    files.append(("state.json", iter([text.encode()])))
    need = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) + len(text)
    root = run_folder / "ckpt"
    hidden = root / f".tmp-step_{step:07d}-{os.getpid()}"
    try:
        durable.make_folder(root)
        _remove_leftovers(root)  # only the process with the run's lock saves, so these are from one that died
        _check_space(run_folder, step, need)
        _write_hidden(hidden, step, files)
        final = _publish(hidden, root / f"step_{step:07d}")
    except OSError as error:
        with suppress(OSError):  # the first error is the one to report; the next save cleans up again
            _remove_leftovers(root)
        raise DiskError(
            f"saving the checkpoint of step {step} in {run_folder} failed: {error.strerror or error}. "
            "Earlier checkpoints are intact. Free some space or check the disk, then resume."
        ) from error
    try:
        _retain(root, final, keep, also)
    except OSError as error:
        raise DiskError(
            f"the checkpoint of step {step} in {run_folder} was saved, but removing older ones failed: "
            f"{error.strerror or error}. Check the disk, then resume."
        ) from error
    return final


def folders(run_folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first, without verification."""
    found: list[tuple[int, bool, Path]] = []
    if (run_folder / "ckpt").is_dir():
        for path in (run_folder / "ckpt").iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def latest(run_folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose sizes and hashes verify, or None if none was ever saved.

    Damaged checkpoints are skipped and listed in `skipped`. Raises ResumeError if all are damaged, because starting
    again from step 0 is the user's decision.
    """
    skipped: list[str] = []
    for step, path in folders(run_folder):
        try:
            _verify(path, deep=True)
        except ResumeError as error:
            skipped.append(str(error))
        else:
            return Checkpoint(step, path, tuple(skipped))
    if skipped:
        raise ResumeError(
            f"{run_folder} has no usable checkpoint: {' '.join(skipped)} "
            f"Restore one from a backup, or remove {run_folder / 'ckpt'} to start again from step 0."
        )
    return None


def load(
    checkpoint: Checkpoint | Path, only: Sequence[str] | None = None
) -> tuple[dict[str, dict[str, torch.Tensor]], Json]:
    """Loads (tensors by group on the CPU, state). A folder given as a path is verified first; `only` selects groups.

    Raises ResumeError if the folder is damaged or lacks a group in `only`.
    """
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint
    sizes = _verify(path, deep=isinstance(checkpoint, Path))
    groups = [name.removesuffix(".safetensors") for name in sizes if name.endswith(".safetensors")]
    for name in only or ():
        if name not in groups:
            raise ResumeError(f"checkpoint {path} has no group {name!r}; it has {', '.join(groups) or 'none'}.")
    wanted = groups if only is None else only
    try:
        tensors = {name: load_file(path / _file_name(name)) for name in wanted}
        return tensors, json.loads((path / "state.json").read_text("utf-8"))
    except Exception as error:  # safetensors raises its own class for files that another program wrote
        raise ResumeError(f"checkpoint {path} cannot be read: {error}") from error


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes; independent of the tensors' order, device and layout."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, _dtype(name, tensor), list(tensor.shape)]).encode() + b"\n")
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _write_hidden(hidden: Path, step: int, files: list[tuple[str, Iterator[bytes | memoryview]]]) -> None:
    """Writes all files and the manifest, and fsyncs them and the folder."""
    durable.make_folder(hidden)
    manifest: dict[str, dict[str, int | str]] = {}
    for name, chunks in files:
        digest = durable.write_file(hidden / name, chunks, lambda: failpoint("checkpoint:file-written"))
        manifest[name] = {"size": (hidden / name).stat().st_size, "sha256": digest}
        failpoint("checkpoint:fsynced")
    document = json.dumps({"format": FORMAT, "step": step, "files": manifest}, indent=1)
    durable.write_file(hidden / "MANIFEST.json", [document.encode()], lambda: failpoint("checkpoint:manifest"))
    durable.sync_folder(hidden)
    failpoint("checkpoint:before-rename")


def _publish(hidden: Path, final: Path) -> Path:
    """Renames the hidden folder to its final name. An existing checkpoint of that step stays readable throughout."""
    if final.exists():
        if _same(hidden, final):
            durable.remove_folder(hidden)  # creating it fsynced the parent, so the name of `final` is durable as well
            return final
        old = final.with_name(final.name + ".old")  # `latest` reads this name too, so one of the two always exists
        if old.exists():
            durable.remove_folder(old)
        durable.rename(final, old)
    durable.rename(hidden, final)
    failpoint("checkpoint:after-rename")
    return final


def _same(hidden: Path, final: Path) -> bool:
    """Whether the published folder is intact and identical to the one just written."""
    try:
        _verify(final, deep=True)
    except ResumeError:
        return False
    return (hidden / "MANIFEST.json").read_bytes() == (final / "MANIFEST.json").read_bytes()


def _retain(root: Path, final: Path, keep: int, also: Sequence[int]) -> None:
    """Removes all checkpoints but `final`, the newest others, up to `keep` in total, and those of steps in `also`.

    `final` is known to be intact, so one good checkpoint always remains. The others count if their sizes match their
    manifest; their hashes are checked before loading, so that a save does not have to read every byte.
    """
    kept = {int(cast(re.Match[str], _NAME.fullmatch(final.name))[1])}
    for step, path in folders(root.parent):
        if path == final:
            continue
        if step not in kept and (len(kept) < keep or step in also) and _is_whole(path):
            kept.add(step)
        else:
            failpoint("checkpoint:retention")
            durable.remove_folder(path)


def _is_whole(path: Path) -> bool:
    try:
        _verify(path, deep=False)
    except ResumeError:
        return False
    return True


def _verify(path: Path, deep: bool) -> dict[str, int]:
    """File name → size of an intact checkpoint. Raises ResumeError naming the damage. `deep` also checks hashes."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_bytes())
        if manifest["format"] != FORMAT:
            raise ResumeError(f"{path} has format {manifest['format']!r}, but this version reads {FORMAT}.")
        if manifest["step"] != int(path.name.removesuffix(".old").removeprefix("step_")):
            raise ResumeError(f"{path} is damaged: its manifest says step {manifest['step']!r}.")
        sizes: dict[str, int] = {}
        for name, entry in manifest["files"].items():
            sizes[_plain(name, path)] = size = (path / name).stat().st_size
            if size != entry["size"]:
                raise ResumeError(f"{path} is damaged: {name} has {size} bytes, expected {entry['size']}.")
            if deep and _file_digest(path / name) != entry["sha256"]:
                raise ResumeError(f"{path} is damaged: the sha256 of {name} does not match its manifest.")
        if "state.json" not in sizes:
            raise ResumeError(f"{path} is damaged: its manifest does not list state.json.")
        return sizes
    except FileNotFoundError as error:
        raise ResumeError(f"{path} is damaged: {Path(str(error.filename)).name} is missing.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(f"{path} is damaged: its manifest cannot be read ({type(error).__name__}).") from error


def _plain(name: str, path: Path) -> str:
    if name != Path(name).name:
        raise ResumeError(f"{path} is damaged: its manifest lists {name!r}, which is not a plain file name.")
    return name


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(root: Path) -> None:
    for path in list(root.glob(".tmp-*")):
        durable.remove_folder(path)


def _check_space(run_folder: Path, step: int, need: int) -> None:
    free = durable.free_bytes(run_folder)
    if free < 2 * need:
        raise DiskError(
            f"the checkpoint of step {step} needs {2 * need / 1e6:.1f} MB free in {run_folder} (twice its size), but "
            f"only {free / 1e6:.1f} MB are. Nothing was written and earlier checkpoints are intact. Free some space, "
            "then resume."
        )


def _state_text(state: JsonView) -> str:
    """The state as JSON. Raises DataError unless it reads back unchanged."""
    try:
        text = json.dumps(dict(state), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"checkpoint state is not JSON: {error}. Pass tensors as tensors and use finite numbers."
        ) from None
    back = json.loads(text)
    for name, value in state.items():
        if name not in back or back[name] != value:
            raise DataError(f"checkpoint state {name!r} would change when read back. Use lists and string keys.")
    return text


def _file_name(group: str) -> str:
    if not _GROUP.fullmatch(group):
        raise DataError(f"checkpoint group {group!r} cannot be a file name. Use letters, digits, - and _.")
    return f"{group}.safetensors"


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in chunks. Equal tensors give equal bytes, and only one tensor is copied at a time."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header: Json = {}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _dtype(name, tensor), "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return itertools.chain([len(text).to_bytes(8, "little") + text], (_bytes(tensors[name]) for name in order))


def _dtype(name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in _DTYPES or name == "__metadata__":
        raise DataError(f"tensor {name!r} of dtype {tensor.dtype} cannot be stored in a safetensors file.")
    return _DTYPES[tensor.dtype]


def _bytes(tensor: torch.Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")  # an empty tensor may have strides that cannot be viewed as bytes
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
