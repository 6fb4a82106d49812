"""Feature shards on disk: safetensors written atomically, checked on reading, one shard a block of pairs."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foretune.errors import UserError


class ShardStore:
    """Shards of named tensors in one folder, all computed from the same `key`.

    Args:
        folder: where the shards are.
        key: hash of everything the shards depend on; a shard with another key counts as missing.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Open the folder, creating it if it is missing."""
        self.folder = folder
        self.key = key
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        """The file of shard `index`."""
        return self.folder / f"states-{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether shard `index` is there, complete, and of this key."""
        try:
            with safe_open(self.path(index), framework="pt") as file:
                return (file.metadata() or {}).get("key") == self.key
        except (OSError, SafetensorError):
            return False

    def write(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write shard `index` so that it is either complete or absent, also when the process is killed."""
        scratch = self.path(index).with_suffix(f".{os.getpid()}.partial")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, {"key": self.key})
            os.replace(scratch, self.path(index))
        except (OSError, SafetensorError) as error:
            scratch.unlink(missing_ok=True)
            raise UserError(
                f"cannot write features to {self.folder} ({error}): free some space or choose another --output_dir; "
                "what was written so far is kept."
            ) from error

    def read(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The named tensors of shard `index`, memory-mapped."""
        with safe_open(self.path(index), framework="pt") as file:
            if (file.metadata() or {}).get("key") != self.key:
                raise ValueError(f"{self.path(index)} belongs to another computation.")
            return {name: file.get_tensor(name) for name in names}

    def concatenated(self, count: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The named tensors of shards 0..count−1, joined along the first axis."""
        parts = [self.read(index, names) for index in range(count)]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def discard_foreign(self, count: int) -> None:
        """Remove shards beyond `count` or of another key, and leftovers of killed writers."""
        for file in self._files():
            index = file.stem.removeprefix("states-")
            if not (index.isdigit() and int(index) < count and self.has(int(index))):
                file.unlink(missing_ok=True)

    def _files(self) -> Iterator[Path]:
        yield from self.folder.glob("states-*.safetensors")
        yield from self.folder.glob("states-*.partial")
