"""Feature shards on disk: safetensors written atomically, checked on reading, one shard a block of pairs."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
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
        write_tensors(self.path(index), tensors, {"key": self.key})

    def read(self, index: int, name: str, num_rows: int) -> Tensor:
        """A named tensor of shard `index`, memory-mapped: a page is read from the disk when it is touched.

        Raises:
            UserError: the shard is missing, truncated, of another computation, or has other than `num_rows` rows.
        """
        fault = "belongs to another computation"
        try:
            with safe_open(self.path(index), framework="pt") as file:
                if (file.metadata() or {}).get("key") == self.key:
                    tensor = file.get_tensor(name)
                    if len(tensor) == num_rows:
                        return tensor
                    fault = f"has {len(tensor)} rows of {name} instead of {num_rows}"
        except (OSError, SafetensorError) as error:
            fault = f"cannot be read ({error})"
        raise UserError(f"{self.path(index)} {fault}: repeat the command, which computes again what is missing.")

    def discard_foreign(self, count: int) -> None:
        """Remove shards beyond `count` or of another key, and leftovers of killed writers."""
        for file in self._files():
            index = file.stem.removeprefix("states-")
            if not (index.isdigit() and int(index) < count and self.has(int(index))):
                file.unlink(missing_ok=True)

    def _files(self) -> Iterator[Path]:
        yield from self.folder.glob("states-*.safetensors")
        yield from self.folder.glob("states-*.partial")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file so that it is either complete or absent, also when the process is killed."""
    scratch = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        scratch.unlink(missing_ok=True)
        raise UserError(
            f"cannot write features to {path.parent} ({error}): free some space or choose another --output_dir; "
            "what was written so far is kept."
        ) from error


class ShardColumn:
    """Rows of one named tensor, read from the shards when they are asked for.

    Args:
        store: where the shards are.
        name: of the tensor.
        bounds: where each shard's rows begin, and where the last one's end, shape (shards + 1,).
    """

    def __init__(self, store: ShardStore, name: str, bounds: NDArray[np.int64]) -> None:
        """Read the first shard's shape alone."""
        self._store, self._name, self._bounds = store, name, bounds
        self.shape = (len(self), *self._shard(0).shape[1:])

    def __len__(self) -> int:
        """Number of rows in all shards."""
        return int(self._bounds[-1])

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows with these indices, in any order, as float32."""
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else rows
        found = np.empty((len(rows), *self.shape[1:]), dtype=np.float32)
        shard = np.searchsorted(self._bounds, rows, side="right") - 1
        for index in np.unique(shard):
            here = shard == index
            wanted = torch.from_numpy(rows[here] - self._bounds[index])
            found[here] = self._shard(index)[wanted].float().numpy()
        return found

    def tensor(self) -> Tensor:
        """All rows in memory, in the dtype they are stored in."""
        return torch.cat([self._shard(index) for index in range(len(self._bounds) - 1)])

    def _shard(self, index: int) -> Tensor:
        return self._store.read(index, self._name, int(self._bounds[index + 1] - self._bounds[index]))
