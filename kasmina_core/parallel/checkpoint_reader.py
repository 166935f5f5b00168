"""Reader of torch.distributed.checkpoint files, whose description is a pickle, that runs nothing from them."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any, Final, final

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from kasmina_core.errors import CheckpointError

_HARMLESS: Final = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}
"""Classes in torch's own description of a checkpoint."""


@final
class CheckpointReader(FileSystemReader):
    """Reads torch's description of a checkpoint, a pickle, if it holds only the classes that torch writes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Harmless(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise CheckpointError(f"{self.path} holds no checkpoint of torch.distributed.checkpoint.")
        for stored in (metadata.storage_data or {}).values():
            where = getattr(stored, "relative_path", None)
            if not isinstance(where, str) or Path(where).name != where:
                raise CheckpointError(f"The checkpoint in {self.path} leads elsewhere: {where!r:.80}.")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def stored_tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return the tensors by name; a CheckpointError if the checkpoint describes more than its files hold."""
        metadata = self.read_metadata()
        described = metadata.state_dict_metadata.items()
        tensors = {name: found for name, found in described if isinstance(found, TensorStorageMetadata)}
        held: Counter[str] = Counter()
        for index, stored in (metadata.storage_data or {}).items():
            held[index.fqn] += max(0, stored.length)
        files = sum(file.stat().st_size for file in Path(self.path).glob("*.distcp"))
        for name, found in tensors.items():
            size = found.size.numel() * found.properties.dtype.itemsize
            if size > held[name] or held.total() > files:
                raise CheckpointError(
                    f"The checkpoint in {self.path} describes more than its files hold.\n"
                    f"  {name:.80}: {size:,} bytes\n  saved: {held[name]:,} bytes, in files of {files:,}"
                )
        return tensors


class _Harmless(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _HARMLESS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise CheckpointError(
            f"The checkpoint's description asks for {module[:40]}.{name[:40]}, which is none of its parts; "
            "nothing of it was run."
        )
