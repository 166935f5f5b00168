"""A checkpoint's folder: tensors and a manifest, written beside and put in place at once, read with every doubt."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import shutil
import socket
import stat
import threading
import uuid
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from kasmina_core.checkpoints.migrations import upgraded
from kasmina_core.errors import CheckpointError
from kasmina_core.files import flush
from kasmina_core.plain_data import FORMAT_VERSION, LARGEST_TEXT, parse

FORMAT: Final = "kasmina checkpoint"
MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "weights.safetensors"
TRAINING: Final = "training.safetensors"

_NUMBERS: Final = itertools.count()
_AT_WORK: Final[set[str]] = set()
"""Names of the folders that this process is filling now, in whatever thread."""

_SWAP: Final = threading.RLock()
"""One thread at a time renames; a signal's handler that saves in the midst of it must not wait for itself."""


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, named: Path | None = None
) -> dict[str, str]:
    """Write tensors in the safetensors format, each storage once.

    Args:
        file: Where to.
        tensors: By name; of any device and layout.
        metadata: Text that goes into the file's head.
        named: What an error calls the file; default its own name.

    Returns:
        The names that were left out because their tensor is another's, with the other's name.

    Raises:
        CheckpointError: If a tensor has no values of its own here, as on the meta device or spread over processes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    written: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[Any, ...]] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if type(tensor) is not Tensor or tensor.device.type == "meta" or tensor.layout is not torch.strided:
            raise CheckpointError(
                f"'{name}' cannot be written: it is a {type(tensor).__name__} on {tensor.device}, {tensor.layout}.\n"
                "Plain tensors with values can. Gather tensors that are spread over processes first, or use "
                "torch.distributed.checkpoint."
            )
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        place = (*storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in places:
            same[name] = places[place]
            continue
        places[place] = name
        # Views that overlap are written apart: the format has no place for what is shared.
        written[name] = tensor.clone() if storage in storages and tensor.numel() else tensor.contiguous()
        storages.add(storage)
    file.touch()  # where a file cannot be at all, the system says why more clearly than safetensors
    mode = file.stat().st_mode
    try:
        save_file(written, file, dict(metadata))
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The tensors cannot be written to {named or file.name}: {error}") from error
    file.chmod(mode)  # safetensors makes a file of its own, which nobody else may read
    return same


def read_tensors(file: Path, metadata: Mapping[str, str], *, apart: bool = False) -> dict[str, Tensor]:
    """Return what `write_tensors` wrote, on the CPU.

    Args:
        file: Where from.
        metadata: What the file's head must say.
        apart: Whether the tensors shall not lean on the file, which may be replaced later.

    Raises:
        CheckpointError: If the file is damaged, or of another checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            found = opened.metadata() or {}
            for key, value in metadata.items():
                if found.get(key) != value:
                    raise CheckpointError(
                        f"{file.name} does not belong to this checkpoint.\n"
                        f"  {key} in {MANIFEST}: {value!r:.80}\n"
                        f"  {key} in {file.name}: {found.get(key)!r:.80}"
                    )
            named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            return {name: t.clone() for name, t in named.items()} if apart else named
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def with_shared(tensors: dict[str, Tensor], shared: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return tensors with those that `write_tensors` left out.

    Raises:
        CheckpointError: If there is no such tensor.
    """
    for name, other in shared.items():
        if other not in tensors or name in tensors:
            raise CheckpointError(
                f"The manifest is damaged: {name!r:.80} cannot be the same as {other!r:.80}."
            )
    return tensors | {name: tensors[other].clone() for name, other in shared.items()}


class NewFolder:
    """A folder that is filled under another name and put in place at once.

    As a context: `path` is where to write; when the block ends well the files are flushed to the disk and the folder
    takes its place; otherwise it is removed. At every instant the target, or ``<target>.previous`` while it is being
    replaced, is a whole checkpoint.

    Args:
        target: The folder's name in the end. What is there becomes ``<target>.previous``.
        keep_previous: Whether the one before is kept then.

    Raises:
        CheckpointError: If something that is no checkpoint is in the way.
    """

    def __init__(self, target: Path, keep_previous: bool) -> None:
        self._named = target
        self._target = Path(os.path.realpath(target))
        self._previous = previous_of(self._target)
        self._keep_previous = keep_previous
        self._number = next(_NUMBERS)
        with _SWAP, as_checkpoint_error(f"The checkpoint {target}"):
            for folder in (self._target, self._previous):
                if os.path.lexists(folder) and not _is_checkpoint(folder):
                    raise CheckpointError(
                        f"{folder} is there and is no checkpoint, so it is not replaced. "
                        "Choose another folder, or remove it."
                    )
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._clear_away()
        self.path = self._beside("writing")

    def __enter__(self) -> Path:
        _AT_WORK.add(self.path.name)
        try:
            with as_checkpoint_error(f"The checkpoint {self._named}"):
                self.path.mkdir()
        except BaseException:
            _AT_WORK.discard(self.path.name)
            raise
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            with as_checkpoint_error(f"The checkpoint {self._named}"):
                if error is not None:
                    raise error
                for file in sorted(self.path.iterdir()):
                    flush(file)
                flush(self.path)
                with _SWAP:
                    self._put_in_place()
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        finally:
            _AT_WORK.discard(self.path.name)

    def _put_in_place(self) -> None:
        gone = self._beside("removing")
        if self._target.exists() and _is_checkpoint(self._target) and any(self._target.iterdir()):
            # The previous one is out of the way before the present one takes its name: one of them is always there.
            if os.path.lexists(self._previous):
                os.rename(self._previous, gone)
            os.rename(self._target, self._previous)
        os.rename(self.path, self._target)
        flush(self._target.parent)
        shutil.rmtree(gone, ignore_errors=True)
        if not self._keep_previous:
            shutil.rmtree(self._previous, ignore_errors=True)

    def _beside(self, what: str) -> Path:
        name = f".{self._target.name}.{what}-{socket.gethostname()}-{os.getpid()}-{self._number}"
        return self._target.parent / name

    def _clear_away(self) -> None:
        """Remove what saves of this machine that go on no more left behind."""
        for what in ("writing", "removing"):
            start = f".{self._target.name}.{what}-{socket.gethostname()}-"
            for left in self._target.parent.glob(f"{_literal(start)}*"):
                number = left.name.removeprefix(start).partition("-")[0]
                if number.isdecimal() and not _goes_on(left.name, int(number)):
                    shutil.rmtree(left, ignore_errors=True)


def _goes_on(name: str, process: int) -> bool:
    return name in _AT_WORK if process == os.getpid() else _lives(process)


@contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Say of what the user named that it cannot be written, and not of a file beside that the user never saw.

    Raises:
        CheckpointError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{what} cannot be written: {reason}.") from error


def previous_of(folder: Path) -> Path:
    """Return where the checkpoint before the one in ``folder`` is kept."""
    return folder.with_name(f"{folder.name}.previous")


def new_id() -> str:
    """Return a text that no other checkpoint has; it draws on no random numbers of the program's."""
    return uuid.uuid4().hex


def write_manifest(folder: Path, text: str) -> None:
    """Write the manifest, with the sizes and checksums of the files that are there, which are flushed meanwhile."""
    written = sorted(folder.iterdir())
    with ThreadPoolExecutor(1) as beside:  # neither the disk nor the sum waits for the other
        sums = [beside.submit(checksum, file) for file in written]
        for file in written:
            flush(file)
    sizes = {file.name: file.stat().st_size for file in written}
    checksums = {file.name: found.result() for file, found in zip(written, sums, strict=True)}
    head = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "files": sizes, "crc32": checksums})
    (folder / MANIFEST).write_text(f"{head[:-1]}, {text[1:]}\n", encoding="utf-8")


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file, which a bit that turned on the disk or on the way changes."""
    if not file.stat().st_size:
        return 0
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return zlib.crc32(content)


@final
class Unchanged:
    """Computes in a thread whether files are as they were written, while they are read.

    Args:
        folder: Where the files are.
        sums: Their checksums as the manifest has them, by name.
    """

    def __init__(self, folder: Path, sums: Mapping[str, object]) -> None:
        beside = ThreadPoolExecutor(1)
        self._sums = [
            (folder / name, sum_, beside.submit(checksum, folder / name)) for name, sum_ in sums.items()
        ]
        beside.shutdown(wait=False)

    def demand(self) -> None:
        """Wait for the answer.

        Raises:
            CheckpointError: If a file is another than was written.
        """
        for file, written, computed in self._sums:
            if (found := computed.result()) != written:
                raise CheckpointError(
                    f"{file} is not as it was written: its bytes have changed since.\n"
                    f"  crc32 written: {written!r:.40}\n"
                    f"  crc32 found:   {found}"
                )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are all there and whole, as `plain_data.parse` gives it.

    Raises:
        CheckpointError: If there is none, or it is truncated, foreign, newer or leads elsewhere.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint at {folder}.")
    if not os.path.lexists(file):
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}.")
    size = _size_of(file)
    if size > LARGEST_TEXT:
        raise CheckpointError(f"{file} is {size:,} bytes long; at most {LARGEST_TEXT:,} are read.")
    data = parse(file.read_bytes(), str(file))
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no manifest of a {FORMAT}.")
    data = dict(upgraded("checkpoint", data, f"The checkpoint in {folder}"))
    files = data.get("files")
    if not isinstance(files, dict) or not files.keys() <= {WEIGHTS, TRAINING} or WEIGHTS not in files:
        raise CheckpointError(f"{file} names other files than a checkpoint has: {files!r:.160}.")
    for name, bytes_ in files.items():
        if not os.path.lexists(folder / name):
            raise CheckpointError(f"The checkpoint in {folder} lacks {name}.")
        if (found := _size_of(folder / name)) != bytes_:
            raise CheckpointError(
                f"{folder / name} is not as it was written; it was cut off or replaced.\n"
                f"  written: {bytes_!r:.40} bytes\n"
                f"  found:   {found} bytes"
            )
    sums = data.get("crc32")
    if not isinstance(sums, dict) or sums.keys() != files.keys():
        raise CheckpointError(f"{file} is damaged: crc32 cannot be {sums!r:.80}.")
    return data


def _size_of(file: Path) -> int:
    found = os.lstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(
            f"{file} is no regular file; a checkpoint's files are read from its own folder alone."
        )
    return found.st_size


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder may be replaced: it has a manifest, or nothing at all."""
    return folder.is_dir() and ((folder / MANIFEST).is_file() or not any(folder.iterdir()))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _literal(name: str) -> str:
    import glob

    return glob.escape(name)
