"""Encoded pairs in little memory: numbers in arrays, token ids in a temporary file."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from foretune.models.encoding import EncodedPair

PAIRS_AT_ONCE = 1024


class EncodedPairs(Sequence[EncodedPair]):
    """A sequence of `EncodedPair`: about 50 bytes of memory a pair, however long its texts.

    Args:
        pairs: read once, in their order.

    Attributes:
        names: the behaviours, sorted.
        behaviour: index into `names`, shape (n,).
        is_train: whether a pair is of the split "train" ("test" otherwise), shape (n,).
        pair_id: shape (n,).
        weight: shape (n,).
        truncated: shape (n,).
        lengths: tokens of prompt, chosen and rejected, shape (n, 3).
    """

    def __init__(self, pairs: Iterable[EncodedPair]) -> None:
        """Write the tokens to a file that goes with the object, also when the process is killed."""
        self._tokens = tempfile.TemporaryFile(prefix="foretune-pairs-")
        number: dict[str, int] = {}
        parts = [self._written(block, number) for block in _blocks(pairs)]
        self._tokens.flush()
        columns = np.concatenate([np.empty(0, COLUMNS), *parts])
        self.names = sorted(number)
        order = np.array([self.names.index(name) for name in number], dtype=np.int32)
        self.behaviour: NDArray[np.int32] = order[columns["behaviour"]] if number else columns["behaviour"]
        self.is_train: NDArray[np.bool_] = columns["is_train"].copy()
        self.pair_id: NDArray[np.int64] = columns["pair_id"].copy()
        self.weight: NDArray[np.float64] = columns["weight"].copy()
        self.truncated: NDArray[np.bool_] = columns["truncated"].copy()
        self.lengths: NDArray[np.int32] = columns["lengths"].copy()
        self._first = np.concatenate([[0], np.cumsum(self.lengths.sum(1, dtype=np.int64))])

    @property
    def behaviour_of(self) -> NDArray[np.object_]:
        """Each pair's behaviour, shape (n,); the names themselves are shared."""
        return np.array([*self.names, None], dtype=object)[self.behaviour]

    @property
    def split_of(self) -> NDArray[np.object_]:
        """Each pair's split, shape (n,)."""
        return np.where(self.is_train, np.array("train", dtype=object), np.array("test", dtype=object))

    @property
    def num_states(self) -> NDArray[np.int64]:
        """Distinct hidden states that each pair is scored on (`foretune.models.batches.num_states`), shape (n,)."""
        return 1 + np.maximum(self.lengths[:, 1:].astype(np.int64) - 1, 0).sum(1)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pair_id)

    @overload
    def __getitem__(self, index: int) -> EncodedPair: ...

    @overload
    def __getitem__(self, index: slice) -> list[EncodedPair]: ...

    def __getitem__(self, index: int | slice) -> EncodedPair | list[EncodedPair]:
        """One pair, or a list of consecutive ones."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._read(start, stop) if step == 1 else [self[place] for place in range(start, stop, step)]
        place = range(len(self))[index]
        return self._read(place, place + 1)[0]

    def __iter__(self) -> Iterator[EncodedPair]:
        """All pairs, some at a time from the file."""
        for start in range(0, len(self), PAIRS_AT_ONCE):
            yield from self[start : start + PAIRS_AT_ONCE]

    def _written(self, block: list[EncodedPair], number: dict[str, int]) -> NDArray:
        """The columns of a block whose tokens have been written; new behaviours are added to `number`."""
        tokens = [token for pair in block for ids in pair[4:7] for token in ids]
        self._tokens.write(np.array(tokens, dtype=np.int32).tobytes())
        rows = [
            (
                number.setdefault(pair.behaviour, len(number)),
                pair.split == "train",
                pair.pair_id,
                pair.weight,
                pair.truncated,
                tuple(map(len, pair[4:7])),
            )
            for pair in block
        ]
        return np.array(rows, dtype=COLUMNS)

    def _read(self, start: int, stop: int) -> list[EncodedPair]:
        first = self._first[start : stop + 1]
        if stop <= start or first[0] == first[-1]:
            tokens = []
        else:
            # mapped for this call alone: what stays mapped counts as resident
            shape = (int(first[-1] - first[0]),)
            tokens = np.memmap(self._tokens, np.int32, "r", offset=4 * int(first[0]), shape=shape).tolist()
        pairs, place = [], 0
        for index in range(start, stop):
            ids = []
            for length in self.lengths[index].tolist():
                ids.append(tokens[place : place + length])
                place += length
            pairs.append(
                EncodedPair(
                    int(self.pair_id[index]),
                    self.names[self.behaviour[index]],
                    "train" if self.is_train[index] else "test",
                    float(self.weight[index]),
                    *ids,
                    bool(self.truncated[index]),
                )
            )
        return pairs


COLUMNS = np.dtype(
    [
        ("behaviour", np.int32),
        ("is_train", np.bool_),
        ("pair_id", np.int64),
        ("weight", np.float64),
        ("truncated", np.bool_),
        ("lengths", np.int32, (3,)),
    ]
)


def _blocks(pairs: Iterable[EncodedPair]) -> Iterator[list[EncodedPair]]:
    block: list[EncodedPair] = []
    for pair in pairs:
        block.append(pair)
        if len(block) == PAIRS_AT_ONCE:
            yield block
            block = []
    if block:
        yield block
