"""Folders of checkpoints: tensors and a manifest, replaced at once and checked when they are read."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import re
import shutil
import socket
import stat
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, final

import torch
from torch import Tensor

from kasmina_core.checkpoints.atomic import flush
from kasmina_core.checkpoints.migrations import upgraded
from kasmina_core.errors import CheckpointError, warn_caller
from kasmina_core.growth.plain_data import FORMAT_VERSION, LARGEST_TEXT, parse

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT: Final = "kasmina checkpoint"
MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "weights.safetensors"
TRAINING: Final = "training.safetensors"

_NUMBERS: Final = itertools.count()
DISTRIBUTED: Final = "kasmina distributed checkpoint"

_OWN_NAME: Final = re.compile(r"manifest\.json|(weights|training)\.safetensors|\.metadata|__\d+_\d+\.distcp")
"""Names of a checkpoint's own files; no other is ever removed or renamed."""

_Read = TypeVar("_Read")

_POSIX: Final = os.name == "posix"

_HELD: Final[set[str]] = set()
"""Folders in which this process puts a checkpoint in place now."""

_AT_WORK: Final[set[str]] = set()
"""Names of the folders that this process is filling now, in whatever thread."""

_SWAP: Final = threading.RLock()
"""One thread at a time renames; a signal's handler that saves in the midst of it must not wait for itself."""


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, named: Path | None = None
) -> tuple[dict[str, str], int]:
    """Write tensors in the safetensors format, each storage once.

    Args:
        file: Where to.
        tensors: By name; of any device and layout.
        metadata: Text that goes into the file's head.
        named: What an error calls the file; default its own name.

    Returns:
        The names that were left out because their tensor is another's, with the other's name; and the CRC-32 of what
        was written.

    Raises:
        CheckpointError: If a tensor has no values of its own here, as on the meta device or spread over processes, or
            is of a dtype that the format has no name for.
    """
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
    beside = file.with_name(f".{file.name}.writing")  # who reads the file that is there goes on reading it
    try:
        sum_ = _write_safetensors(beside, written, metadata)
        os.replace(beside, file)
    except (ValueError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        raise CheckpointError(f"The tensors cannot be written to {named or file.name}: {error}") from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return same, sum_


_DTYPES: Final = {
    getattr(torch, name): text
    for name, text in {
        "float64": "F64",
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e4m3fnuz": "F8_E4M3FNUZ",
        "float8_e5m2": "F8_E5M2",
        "float8_e5m2fnuz": "F8_E5M2FNUZ",
        "float8_e8m0fnu": "F8_E8M0",
        "complex64": "C64",
        "int64": "I64",
        "int32": "I32",
        "int16": "I16",
        "int8": "I8",
        "uint64": "U64",
        "uint32": "U32",
        "uint16": "U16",
        "uint8": "U8",
        "bool": "BOOL",
    }.items()
    if hasattr(torch, name)
}
_LARGEST_HEAD: Final = 100_000_000
"""Bytes of a head that safetensors reads at most."""


def _write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write contiguous tensors in the safetensors format, and return the CRC-32 of the file.

    A sum that is taken while each tensor is at hand spares reading the file again.

    Source: https://github.com/huggingface/safetensors#format
    """
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    # The widest come first, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        tensor = tensors[name]
        if name in head:
            raise ValueError(f"{name!r} is no name for a tensor")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"'{name}' is of {tensor.dtype}, which the format has no name for")
        begin, end = end, end + tensor.nbytes
        head[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEAD:
        raise ValueError(f"its head of {len(text):,} bytes is longer than {_LARGEST_HEAD:,}")
    begun = len(text).to_bytes(8, "little") + text
    sum_ = zlib.crc32(begun)
    with file.open("wb") as opened:
        opened.write(begun)
        for name in order:
            values = tensors[name].cpu().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy()
            if sys.byteorder == "big":
                # A complex number is two, each with its own order of bytes.
                size = tensors[name].element_size() // (1 + tensors[name].is_complex())
                values = values.view(f"u{size}").byteswap().view("u1")
            sum_ = zlib.crc32(values.data, sum_)
            opened.write(values.data)
    return sum_


def read_tensors(file: Path, metadata: Mapping[str, str], *, apart: bool = False) -> dict[str, Tensor]:
    """Return what `write_tensors` wrote, on the CPU.

    Args:
        file: Where from.
        metadata: What the file's head must say.
        apart: Whether the tensors are copied, so that the file may be replaced later.

    Raises:
        CheckpointError: If the file is damaged, or of another checkpoint.
    """
    found, named = open_tensors(file)
    for key, value in metadata.items():
        if found.get(key) != value:
            raise CheckpointError(
                f"{file.name} does not belong to this checkpoint.\n"
                f"  {key} in {MANIFEST}: {value!r:.80}\n"
                f"  {key} in {file.name}: {found.get(key)!r:.80}"
            )
    return {name: t.clone() for name, t in named.items()} if apart else named


def open_tensors(file: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    """Return the text in a safetensors file's head, and its tensors, which lean on the file.

    Raises:
        CheckpointError: If the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.lexists(file):
        raise CheckpointError(f"There is no file {file}.")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            return opened.metadata() or {}, tensors
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def with_shared(tensors: dict[str, Tensor], shared: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return tensors with those that `write_tensors` left out."""
    for name, other in shared.items():
        if other not in tensors or name in tensors:
            raise CheckpointError(
                f"The manifest is damaged: {name!r:.80} cannot be the same as {other!r:.80}."
            )
    return tensors | {name: tensors[other].clone() for name, other in shared.items()}


class InterruptedSave(UserWarning):
    """A save was interrupted just before its last step; the checkpoint before it is loaded."""


class NewFolder:
    """A folder that is filled under another name and put in place at once.

    As a context: `path` is where to write; when the block ends well the files are flushed to the disk and the folder
    takes its place; otherwise it is removed. At every instant the target, or ``<target>.previous`` while it is being
    replaced, is a whole checkpoint. Files in the target that are none of a checkpoint's keep their place.

    Args:
        target: The folder's name in the end. What is there becomes ``<target>.previous``.
        keep_previous: Whether the one before is kept then.

    Raises:
        CheckpointError: If something that is no checkpoint is in the way.
    """

    def __init__(self, target: Path, keep_previous: bool) -> None:
        self._named = target
        self._keep_previous = keep_previous
        self._number = next(_NUMBERS)
        with _SWAP, as_checkpoint_error(f"The checkpoint {target}"):
            self._target = Path(os.path.realpath(target))
            if not self._target.name:
                raise CheckpointError(f"{target} has no name, so a checkpoint cannot take its place.")
            self._previous = previous_of(self._target)
            for folder in (self._target, self._previous):
                if os.path.lexists(folder) and _foreign(folder) is None:
                    raise CheckpointError(
                        f"{folder} is there and is no checkpoint, so it is not replaced. "
                        "Choose another folder, or remove it."
                    )
            both = os.path.lexists(self._target)
            for entry in (_foreign(self._previous) if both else None) or []:
                # An interrupted save may have left a second name of it here.
                _drop_second_name(entry, self._target / entry.name)
                if os.path.lexists(entry):
                    raise CheckpointError(
                        f"{entry} is none of a checkpoint's files, and its folder has to go. Put it elsewhere."
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
                with _alone_in(self._target.parent):
                    self._put_in_place()
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        finally:
            _AT_WORK.discard(self.path.name)

    def _put_in_place(self) -> None:
        gone = self._beside("removing")
        # Without a target an interrupted save left the previous one alone, with what others had put there.
        source = self._target if os.path.lexists(self._target) else self._previous
        foreign = _foreign(source) or []
        for entry in foreign:
            _give_second_name(entry, self.path / entry.name)
        if self._target.is_dir() and (foreign or any(self._target.iterdir())):
            # The previous one is out of the way before the present one takes its name: one of them is always there.
            if os.path.lexists(self._previous):
                os.rename(self._previous, gone)
            os.rename(self._target, self._previous)
        elif self._target.is_dir():
            self._target.rmdir()
        os.rename(self.path, self._target)
        flush(self._target.parent)
        for entry in foreign:
            _drop_second_name(self._previous / entry.name, self._target / entry.name)
        _remove(gone)
        if not self._keep_previous:
            last = self._previous
            if _foreign(last) == []:
                # Killed while it is removed, half of it must not stay under a name at which saves and loads look.
                os.rename(last, gone)
                last = gone
            _remove(last)

    def _beside(self, what: str) -> Path:
        name = f".{self._target.name}.{what}-{socket.gethostname()}-{os.getpid()}-{self._number}"
        return self._target.parent / name

    def _clear_away(self) -> None:
        """Remove what saves of this machine that go on no more left behind."""
        for left in _saves_of(self._target, "writing"):
            shutil.rmtree(left, ignore_errors=True)  # other people's files in it have another name elsewhere
        for left in _saves_of(self._target, "removing"):
            _remove(left)


def being_replaced(target: Path) -> bool:
    """Whether a save to this folder seems to be going on."""
    start = f".{target.name}.writing-"
    dead = {left.name for left in _saves_of(target, "writing")}
    return any(one.name.startswith(start) and one.name not in dead for one in target.parent.iterdir())


def _saves_of(target: Path, what: str) -> list[Path]:
    """Return the folders that dead processes of this machine left beside a folder."""
    start = f".{target.name}.{what}-{socket.gethostname()}-"
    found = []
    for left in target.parent.iterdir():
        number = left.name.removeprefix(start).partition("-")[0]
        if left.name.startswith(start) and number.isdecimal() and not _goes_on(left.name, int(number)):
            found.append(left)
    return found


def _goes_on(name: str, process: int) -> bool:
    return name in _AT_WORK if process == os.getpid() else _lives(process)


def _foreign(folder: Path) -> list[Path] | None:
    """Return what lies in a checkpoint's folder and is none of its files; ``None`` if the folder is no checkpoint."""
    if not folder.is_dir():
        return None
    entries = sorted(folder.iterdir())
    if not entries:
        return []
    try:
        data = parse((folder / MANIFEST).read_bytes(), MANIFEST)
    except (OSError, CheckpointError):
        return None
    if not isinstance(data, dict) or data.get("format") not in (FORMAT, DISTRIBUTED):
        return None
    files = data.get("files")
    own = {MANIFEST, *(files if isinstance(files, dict) else [one.name for one in entries])}
    return [one for one in entries if one.name not in own or not _OWN_NAME.fullmatch(one.name)]


def _give_second_name(entry: Path, name: Path) -> None:
    """Let a file, or all in a folder, be found under a second name too: a hard link."""
    if entry.is_dir() and not entry.is_symlink():
        name.mkdir()
        for inside in entry.iterdir():
            _give_second_name(inside, name / inside.name)
    else:
        os.link(entry, name, follow_symlinks=False)


def _drop_second_name(entry: Path, name: Path) -> None:
    """Undo `_give_second_name`: what has no other name stays where it is."""
    if entry.is_dir() and not entry.is_symlink():
        for inside in entry.iterdir():
            _drop_second_name(inside, name / inside.name)
        with suppress(OSError):  # something has come since
            entry.rmdir()
    elif os.path.lexists(name) and os.path.lexists(entry) and os.path.samestat(entry.lstat(), name.lstat()):
        entry.unlink()


def _remove(folder: Path) -> None:
    """Remove a checkpoint's own files, and its folder if that is then empty."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if _OWN_NAME.fullmatch(entry.name):
                entry.unlink()
        folder.rmdir()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Run the block while no other thread, or process that asks too, is in it.

    Raises:
        OSError: If another process stays in it for a long time.
    """
    with _SWAP:
        if str(folder) in _HELD or fcntl is None:  # a signal's handler that saves in the midst of a save
            yield
            return
        handle = os.open(folder, os.O_RDONLY)
        _HELD.add(str(folder))
        try:
            _lock(handle)
            yield
        finally:
            _HELD.discard(str(folder))
            os.close(handle)


def _lock(handle: int) -> None:
    for _ in range(1000):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            return  # a file system without locks
    raise TimeoutError("another process has been putting a checkpoint in place for ten seconds")


@contextmanager
def plain_refusals() -> Iterator[None]:
    """Make the messages of refusals safe for a terminal: control characters are escaped, long lines and lists are cut."""
    try:
        yield
    except CheckpointError as error:
        lines = str(error).replace("\t", "    ").split("\n")
        clean = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line[:500]) for line in lines[:40]]
        cut = [line if len(line) <= 320 else f"{line[:319]}…" for line in clean]
        error.args = ("\n".join([*cut, *(["…"] if len(lines) > 40 else [])]),)
        raise


@contextmanager
def as_checkpoint_error(what: str, done: str = "written") -> Iterator[None]:
    """Turn an OSError about a temporary file into a CheckpointError about what the user named."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{what} cannot be {done}: {reason}.") from error


def previous_of(folder: Path) -> Path:
    """Return where the checkpoint before the one in ``folder`` is kept."""
    return folder.parent / f"{folder.name}.previous"


def new_id() -> str:
    """Return a text that no other checkpoint has; it draws on no random numbers of the program's."""
    return uuid.uuid4().hex


def write_manifest(folder: Path, text: str, sums: Mapping[str, int] | None = None) -> None:
    """Write the manifest, with the sizes of the files that are there.

    Args:
        folder: Where to.
        text: What else it says: a JSON object.
        sums: The CRC-32 of each file by its name; ``None`` for a distributed checkpoint, whose files one process would
            have to read again.
    """
    kind = DISTRIBUTED if sums is None else FORMAT
    head: dict[str, Any] = {"format": kind, "version": FORMAT_VERSION}
    head["files"] = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    if sums is not None:
        head["crc32"] = dict(sums)
    (folder / MANIFEST).write_bytes(sealed(f"{json.dumps(head)[:-1]}, {text[1:]}"))


def sealed(text: str) -> bytes:
    """Return the text of a JSON object with a checksum over itself as its last entry."""
    above = text.rstrip()[:-1].encode()
    return above + f', "crc32_of_the_above": {zlib.crc32(above)}}}\n'.encode()


_SEAL: Final = re.compile(rb', "crc32_of_the_above": (\d+)\}\n\Z')

UNSEALED: Final = {"crc32_of_the_rest": "0" * 10}
"""What the head of a safetensors file says before `seal_tensors`."""

_SEAL_IN_HEAD: Final = re.compile(rb'(?<="crc32_of_the_rest":")\d{10}(?=")')


def seal_tensors(file: Path) -> None:
    """Put the checksum of all other bytes of a safetensors file into its head, in place of what `UNSEALED` has there.

    Raises:
        CheckpointError: If there is no such place.
    """
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as content:
        place, found = _sum_of_the_rest(file, content)
        content[place] = b"%010d" % found


def demand_seal(file: Path) -> None:
    """Check that no byte of a file that `seal_tensors` sealed has changed.

    Raises:
        CheckpointError: If one has, or the checksum is missing.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place, found = _sum_of_the_rest(file, content)
        _same_sum(file, int(content[place]), found)


def _sum_of_the_rest(file: Path, content: mmap.mmap) -> tuple[slice, int]:
    """Return where the checksum stands in a safetensors file, and what it has to be."""
    head = content[: min(len(content), 8 + int.from_bytes(content[:8], "little"))]
    if (seal := _SEAL_IN_HEAD.search(head)) is None:
        raise CheckpointError(f"{file} is damaged: its checksum is missing.")
    with memoryview(content) as whole, whole[: seal.start()] as before, whole[seal.end() :] as after:
        return slice(*seal.span()), zlib.crc32(after, zlib.crc32(before))


def checksum(opened: BinaryIO) -> int:
    """Return the CRC-32 of a file, which a bit that turned on the disk or on the way changes; closes it."""
    with opened:
        if not os.fstat(opened.fileno()).st_size:
            return 0
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return zlib.crc32(content)


@final
class Unchanged:
    """Computes in a thread whether files are as they were written, while they are read.

    Args:
        folder: Where the files are; they are opened at once.
        sums: Their checksums as the manifest has them, by name.
    """

    def __init__(self, folder: Path, sums: Mapping[str, object]) -> None:
        beside = ThreadPoolExecutor(1)
        self._sums = [
            (folder / name, sum_, beside.submit(checksum, (folder / name).open("rb")))
            for name, sum_ in sums.items()
        ]
        beside.shutdown(wait=False)

    def demand(self) -> None:
        """Wait for the answer.

        Raises:
            CheckpointError: If a file is another than was written.
        """
        for file, written, computed in self._sums:
            _same_sum(file, written, computed.result())


def _same_sum(file: Path, written: object, found: int) -> None:
    if found != written:
        raise CheckpointError(
            f"{file} is not as it was written: its bytes have changed since.\n"
            f"  crc32 written: {written!r:.40}\n  crc32 found:   {found}"
        )


def read_one_version(folder: Path, read: Callable[[Path], _Read]) -> _Read:
    """Return what ``read`` returns, all of it of one version, also if the checkpoint is replaced meanwhile.

    ``read`` opens all its files; what it returns must not open them again.
    """
    for _ in range(1000):
        place = present(folder)
        before = identity(place)
        try:
            with as_checkpoint_error(f"The checkpoint {place}", "read"):
                found = read(place)
        except CheckpointError:
            if place == present(folder) and before == identity(place):
                raise
        else:
            if before == identity(place):
                return found
        time.sleep(0.002)
    raise CheckpointError(f"The checkpoint {folder} is replaced faster than it can be read.")


def present(folder: Path) -> Path:
    """Return the folder, or the previous one if the process ended while it was being replaced."""
    target = Path(os.path.realpath(folder))
    previous = previous_of(target)
    for _ in range(500):
        if target.exists():
            return folder if os.path.lexists(folder) else target
        if not previous.is_dir():
            return folder
        if not being_replaced(target):
            break
        time.sleep(0.002)
    if target.exists():
        return folder
    warn_caller(
        f"{folder} was being replaced when the process ended; {previous}, the checkpoint before it, is loaded.",
        InterruptedSave,
    )
    return previous


def identity(folder: Path) -> tuple[Any, ...]:
    """Return what differs between two checkpoints that replaced each other at one place."""
    try:
        stats = [os.stat(folder), *(entry.stat() for entry in sorted(folder.iterdir()))]
    except OSError:
        return ()
    return tuple((one.st_dev, one.st_ino, one.st_mtime_ns, one.st_size) for one in stats)


def read_manifest(folder: Path, kind: str = FORMAT) -> dict[str, Any]:
    """Return the parsed manifest of a checkpoint whose files all exist and are whole.

    Raises:
        CheckpointError: If there is none, or it is truncated, changed, foreign, newer or leads elsewhere.
    """
    file = folder / MANIFEST
    with as_checkpoint_error(f"The checkpoint {folder}", "read"):
        if not folder.is_dir():
            if folder.exists():
                raise CheckpointError(
                    f"{folder} is a file, and a checkpoint is the folder that save_checkpoint wrote."
                )
            raise CheckpointError(f"There is no checkpoint at {folder}.")
        if not os.path.lexists(file):
            raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}.")
        size = _size_of(file)
        if size > LARGEST_TEXT:
            raise CheckpointError(f"{file} is {size:,} bytes long; at most {LARGEST_TEXT:,} are read.")
        content = file.read_bytes()
    seal = _SEAL.search(content, max(0, len(content) - 64))
    if seal is not None:
        _same_sum(file, int(seal[1]), zlib.crc32(content[: seal.start()]))
    raw = parse(content, str(file))
    if not isinstance(raw, dict) or raw.get("format") != kind:
        raise CheckpointError(f"{file} is no manifest of a {kind}.")
    name = "checkpoint" if kind == FORMAT else "distributed"
    data = dict(upgraded(name, raw, f"The checkpoint in {folder}"))
    if seal is None and raw.get("version") != 1:
        raise CheckpointError(f"{file} is damaged: its checksum is missing.")
    files, needed = data.get("files"), WEIGHTS if kind == FORMAT else ".metadata"
    if files is None and raw.get("version") == 1 and kind == DISTRIBUTED:
        return data
    if not isinstance(files, dict) or needed not in files or not all(map(_OWN_NAME.fullmatch, files)):
        raise CheckpointError(f"{file} names other files than a checkpoint has: {files!r:.160}.")
    for name, bytes_ in files.items():
        if not os.path.lexists(folder / name):
            raise CheckpointError(f"The checkpoint in {folder} lacks {name}.")
        if (found := _size_of(folder / name)) != bytes_:
            raise CheckpointError(
                f"{folder / name} is not as it was written; it was cut off or replaced.\n"
                f"  written: {bytes_!r:.40} bytes\n  found:   {found} bytes"
            )
    sums = data.get("crc32")
    if kind == FORMAT and (not isinstance(sums, dict) or sums.keys() != files.keys()):
        raise CheckpointError(f"{file} is damaged: crc32 cannot be {sums!r:.80}.")
    return data


def _size_of(file: Path) -> int:
    with as_checkpoint_error(str(file), "read"):
        found = os.lstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(
            f"{file} is no regular file; files are read from a checkpoint's own folder alone."
        )
    return found.st_size


def _lives(process: int) -> bool:
    if _POSIX:  # elsewhere signal 0 is Ctrl-C
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
    return True
