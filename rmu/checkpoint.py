"""Checkpoint surgery: the original folder with exactly the trained tensors changed.

Files that hold no trained tensor are hard-linked or copied; a shard that holds one is copied and the tensor's bytes replaced in
the copy, so memory stays at one tensor and every other byte stays as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rmu.errors import first_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
PARTIAL = ".partial"  # ends the names of folders that are being written
# Weights in any other form would carry the knowledge along into the result.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: ``file[begin:end]``."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def local_folder(model: str | Path, allow_pickle: bool = False) -> Path:
    """The folder of a model given as a folder or a hub id (downloaded to the hub's cache when needed).

    Args:
        allow_pickle: accept a folder with pickle weights only.

    Raises:
        ValueError: neither a folder nor a reachable hub id, or not one that is safe to load: see :func:`weight_files`.
    """
    folder = _local_folder(model)
    if not (allow_pickle and has_only_pickles(folder)):
        weight_files(folder)
    return folder


def _local_folder(model: str | Path) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [
        "*.safetensors",
        "*.json",
        "*.txt",
        "*.model",
        "*.tiktoken",
        "*.jinja",
        "*.py",
        "*.md",
        "LICENSE*",
        "*.bin",
    ]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HFValidationError, OSError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(
            f"model: {str(model)!r} is neither a folder nor a hub id that can be reached ({reason})"
        ) from error


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that ``from_pretrained`` reads from ``folder``.

    Raises:
        ValueError: no safetensors weights (the message says so when there are pickles), a missing shard, or an index that
            points outside the folder.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"model: {folder} has no {CONFIG_FILE}, expected a model folder as save_pretrained writes it"
        )
    check_inside(folder, folder / CONFIG_FILE)
    if (folder / SINGLE_FILE).is_file():
        check_inside(folder, folder / SINGLE_FILE)
        return [SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        names = sorted(set(_weight_map(folder).values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"model: {INDEX_FILE} names {name!r}, expected a file of the same folder")
            if not (folder / name).is_file():
                raise ValueError(f"model: {folder} lacks the shard {name} that {INDEX_FILE} names")
            check_inside(folder, folder / name)
        return names
    if any((folder / name).exists() for name in _PICKLES):
        raise ValueError(
            f"model: {folder} has pickle weights only ({_PICKLES[0]}), which can run code when they are read; "
            "use a folder with safetensors weights; rmu unlearn and rmu eval read them with --allow_pickle"
        )
    raise ValueError(f"model: {folder} has no safetensors weights ({SINGLE_FILE} or {INDEX_FILE})")


def check_inside(folder: Path, path: Path) -> None:
    """Raise ``ValueError`` where ``path``, a file of a model folder, is a link to somewhere else.

    Links of the hub's cache, from ``snapshots/REVISION`` to its own ``blobs``, are as they should be.
    """
    target, home = path.resolve(), folder.resolve()
    places = [home]
    if home.parent.name == "snapshots":
        places.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in places):
        raise ValueError(
            f"model: {path} is a link to {target}, outside the model's folder; put the file itself there"
        )


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of every tensor, as a folder's shard index has it."""
    path = folder / INDEX_FILE
    check_inside(folder, path)
    try:
        files = json.loads(path.read_bytes(), object_pairs_hook=_unique)["weight_map"]
        if not files or not all(isinstance(name, str) and name for name in files.values()):
            raise ValueError("weight_map is not a mapping of tensor names to file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"model: {path} is not a shard index: {error!r}") from error
    return files


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names occur once: of two readers, one could take the first and one the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return found


def has_only_pickles(folder: Path) -> bool:
    """Whether the folder's weights are pickles and nothing else."""
    safe = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    return not safe and any((folder / name).exists() for name in _PICKLES)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name, from the files' headers alone.

    Raises:
        ValueError: a file that is not valid safetensors (its library checks offsets and sizes), a tensor in two files, or a shard
            without a tensor that the index says it has.
    """
    found: dict[str, StoredTensor] = {}
    for name in weight_files(folder):
        for tensor, entry in file_tensors(folder / name).items():
            if tensor in found:
                raise ValueError(f"model: {folder} has {tensor} both in {found[tensor].file} and in {name}")
            found[tensor] = entry
    if not (folder / SINGLE_FILE).is_file():
        for tensor, file in _weight_map(folder).items():
            if tensor not in found or found[tensor].file != file:
                raise ValueError(
                    f"model: {INDEX_FILE} says that {tensor} is in {file}, which has no such tensor"
                )
    return found


def file_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by name, from its header alone.

    Raises:
        ValueError: not a valid safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(start - 8), object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"model: {path} is not a valid safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path.name, entry["dtype"], tuple(entry["shape"]), *(start + n for n in entry["data_offsets"])
        )
        for name, entry in header.items()
    }


def read_tensor(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file; nothing of the file stays in memory but what the tensor holds."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def resolve_names(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> dict[str, StoredTensor]:
    """The stored tensor behind each trained one.

    Args:
        shapes: shape of every trained tensor by its name in the whole causal model.
        prefix: the base model's attribute name with a dot; checkpoints of a bare base model lack it.

    Raises:
        ValueError: a name that the checkpoint does not have, or has in another shape or dtype (the library may have merged or
            renamed tensors while loading); such a result could not be written back.
    """
    stored = stored_tensors(folder)
    resolved = {}
    for name, shape in shapes.items():
        entry = stored.get(name) or stored.get(name.removeprefix(prefix))
        if entry is None or entry.shape != tuple(shape) or entry.dtype not in _DTYPES:
            what = "no such tensor" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise ValueError(
                f"trained_parameters: {name} {list(shape)} cannot be written back: {folder} has {what} under that name"
            )
        resolved[name] = entry
    return resolved


def check_output_folder(output: Path, allowed_prefixes: tuple[str, ...] = ()) -> None:
    """Raise ``ValueError`` unless ``output`` is new, or an empty folder, and can be written.

    Args:
        allowed_prefixes: entries that may be there already (a trainer's own ``checkpoint-N``).
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir: {output} is a file, expected a new or an empty folder")
    if output.is_dir():
        there = [p.name for p in output.iterdir() if not p.name.startswith(allowed_prefixes or ("\0",))]
        if there:
            raise ValueError(
                f"output_dir: {output} exists and is not empty ({sorted(there)[0]}, ...); name a new folder"
            )
    parent = _existing_parent(output)
    if not os.access(parent, os.W_OK):
        raise ValueError(f"output_dir: no permission to write in {parent}")


def check_disk_space(folder: Path, output: Path, touched: Iterable[str], checkpoints: int = 0) -> None:
    """Raise ``ValueError`` when the file system of ``output`` cannot hold the result.

    Args:
        touched: the files of ``folder`` that hold a trained tensor.
        checkpoints: bytes of the checkpoints during training.
    """
    touched = set(touched)
    parent = _existing_parent(output)
    linked = folder.resolve().stat().st_dev == parent.stat().st_dev
    needed = sum(
        path.stat().st_size
        for path in _copied_files(folder)
        if path.name in touched or not _can_link(path, linked)
    )
    free = shutil.disk_usage(parent).free
    if needed + checkpoints > free:
        during = f" and {checkpoints / 1e9:.2f} GB for checkpoints" if checkpoints else ""
        raise ValueError(
            f"output_dir: {needed / 1e9:.2f} GB{during} needed at {output}, {free / 1e9:.2f} GB free"
        )


def save_unlearned(
    folder: Path,
    output: Path,
    tensors: Iterable[tuple[str, Tensor]],
    entries: Mapping[str, StoredTensor],
    extra_files: Mapping[str, bytes],
) -> None:
    """Write the original checkpoint with exactly ``tensors`` changed.

    The folder is built beside ``output`` and renamed into place. Where ``output`` exists already, its files are replaced one by
    one and ``config.json``, without which nothing loads, is taken away first and put back last.

    Args:
        folder: the original model folder.
        tensors: trained values by name, stored in the original dtype (one rounding).
        entries: from :func:`resolve_names`.
        extra_files: further files by name, written as they are.
    """
    touched = {entry.file for entry in entries.values()}
    with staged(output) as staging:
        for path in _copied_files(folder):
            if path.name in extra_files or path.name == CONFIG_FILE:
                continue
            if path.name not in touched and path.suffix == ".safetensors":
                _link_or_copy(path, staging / path.name)
            else:
                shutil.copyfile(path, staging / path.name)
        for name, tensor in tensors:
            _replace_bytes(staging / entries[name].file, tensor, entries[name])
            del tensor
        for name, content in extra_files.items():
            (staging / name).write_bytes(content)
        # Last: until all is there, the folder loads as no model.
        shutil.copyfile(folder / CONFIG_FILE, staging / CONFIG_FILE)


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder to write in, put in the place of ``output`` at the end; after an error nothing is left of it.

    It lies beside ``output`` and is renamed. Inside ``output``, and its files are moved one by one, ``config.json`` last, where
    ``output`` holds something or cannot be renamed over: a link, a mount point, a folder of a parent that is not ours.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    inside = output.is_dir() and (
        any(output.iterdir())
        or output.is_symlink()
        or os.path.ismount(output)
        or not os.access(output.parent, os.W_OK)
    )
    staging = Path(
        tempfile.mkdtemp(prefix=f".{output.name}.", suffix=PARTIAL, dir=output if inside else output.parent)
    )
    try:
        yield staging
        for path in staging.iterdir():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        staging.chmod(0o755)
        if inside:
            (output / CONFIG_FILE).unlink(missing_ok=True)
            for path in sorted(staging.iterdir(), key=lambda p: p.name == CONFIG_FILE):
                os.replace(path, output / path.name)
        else:
            os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def as_safetensors(folder: Path, beside: Path) -> Iterator[Path]:
    """A temporary copy of a pickle-only model folder with safetensors weights, deleted at the end."""
    from transformers import AutoModelForCausalLM

    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", suffix=PARTIAL, dir=beside.parent) as copy:
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False, dtype="auto")
        model.save_pretrained(copy)
        for path in folder.iterdir():
            if path.is_file() and not path.name.endswith(_OTHER_WEIGHTS) and path.name not in _PICKLES:
                shutil.copyfile(path, Path(copy) / path.name)
        del model
        yield Path(copy)


def _copied_files(folder: Path) -> list[Path]:
    weights = set(weight_files(folder))
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and (path.name in weights or not path.name.endswith((*_OTHER_WEIGHTS, ".bin.index.json")))
    ]
    for path in files:
        check_inside(folder, path)
    return files


def _replace_bytes(path: Path, tensor: Tensor, entry: StoredTensor) -> None:
    data = tensor.detach().to("cpu", _DTYPES[entry.dtype]).contiguous().flatten().view(torch.uint8).numpy()
    if data.nbytes != entry.end - entry.begin:
        raise ValueError(f"tensor: got {data.nbytes} bytes for {entry.end - entry.begin} in {path.name}")
    with open(path, "r+b") as stream:
        stream.seek(entry.begin)
        stream.write(data.data)


def _can_link(path: Path, same_device: bool) -> bool:
    return same_device and path.suffix == ".safetensors"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
