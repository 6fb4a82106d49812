"""Anchors on the disk: parameters of a run at some step, with the features taken there, to simulate from again.

A forecast leaves them in its run folder, so that other questions about the same run need neither model nor data.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foretune.dynamics.linearised import LayerStack, Tangent, WeightSpace, WholeWeights, weight_space, whole_weights
from foretune.dynamics.margin_model import Looked
from foretune.errors import UserError
from foretune.features.coordinates import Coordinates
from foretune.features.pair_gradients import read_gradients
from foretune.features.store import ShardColumn, ShardStore, write_tensors
from foretune.features.token_factors import AdaptedLayer, read_factors
from foretune.features.weight_factors import read_weight_factors

# Features of at most so many numbers are kept in memory, 2 GB in bfloat16.
LARGEST_FEATURES = 2**30
FILE = "anchor.safetensors"

AnyForm = WeightSpace | WholeWeights | Tangent


class Known(NamedTuple):
    """What an anchor knows of pairs, besides their features.

    Attributes:
        margin: of the measured pairs against the reference, shape (m,).
        place: the measured pair that each pair is, or that stands for it, shape (n,).
        looked: pairs without features.
    """

    margin: NDArray[np.float64]
    place: NDArray[np.int64]
    looked: Looked


def anchor_store(run_folder: Path, step: int, key: str) -> ShardStore:
    """Where the features after `step` are."""
    return ShardStore(run_folder / "features" / f"step-{step:06d}", key)


def write_weight_space(
    store: ShardStore, parameters: dict[str, Tensor], known: Known, groups: list[list[AdaptedLayer]]
) -> None:
    """Write what the features of a finished `measure_factors` belong to.

    Args:
        store: of the features.
        parameters: at which they were taken, by name.
        known: of the pairs.
        groups: of `layers_alike`.
    """
    _write(store, parameters, known, {}, {"groups": json.dumps(groups)})


def write_whole_weights(
    store: ShardStore, parameters: dict[str, Tensor], known: Known, decayed: Collection[str]
) -> None:
    """Write what the features of a finished `measure_weight_factors` belong to.

    Args:
        store: of the features.
        parameters: at which they were taken, by name.
        known: of the pairs.
        decayed: names of the parameters that weight decay acts on.
    """
    matrices = [name for name, value in parameters.items() if value.ndim > 1]
    about = {"matrices": json.dumps(matrices), "decayed": json.dumps([*decayed])}
    _write(store, parameters, known, {}, about)


def write_tangent(
    store: ShardStore,
    parameters: dict[str, Tensor],
    known: Known,
    sampled: Mapping[str, Coordinates],
    decayed: Collection[str],
) -> None:
    """Write what the features of a finished `measure_gradients` belong to.

    Args:
        store: of the features.
        parameters: at which they were taken, by name; the sampled coordinates of one, shape (c,).
        known: of the pairs.
        sampled: which coordinates they are, of those parameters that are not whole.
        decayed: names of the parameters that weight decay acts on.
    """
    drawn = {f"{part}/{name}": value for name, own in sampled.items() for part, value in own._asdict().items()}
    about = {"sampled": json.dumps([*sampled]), "decayed": json.dumps([*decayed])}
    _write(store, parameters, known, drawn, about)


def _write(
    store: ShardStore,
    parameters: dict[str, Tensor],
    known: Known,
    more: dict[str, Tensor],
    about: dict[str, str],
) -> None:
    arrays = {**known._asdict(), **{f"looked_{part}": value for part, value in known.looked._asdict().items()}}
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items() if name != "looked"}
    tensors |= {name: value.cpu() for name, value in more.items()}
    tensors |= {f"parameter/{name}": value.cpu() for name, value in parameters.items()}
    write_tensors(store.folder / FILE, tensors, about | {"key": store.key, "names": json.dumps([*parameters])})


def read_anchor(store: ShardStore, device: torch.device) -> AnyForm:
    """Margins in first order around an anchor that was written, its parameters on `device`.

    Raises:
        UserError: it is missing, damaged, or of another computation.
    """
    try:
        with safe_open(store.folder / FILE, framework="pt", device=str(device)) as file:
            about = file.metadata()
            parameters = {name: file.get_tensor(f"parameter/{name}") for name in json.loads(about["names"])}
            margin, place = file.get_tensor("margin").float(), file.get_tensor("place").cpu().numpy()
            looked = Looked(*(file.get_tensor(f"looked_{part}").cpu().numpy() for part in Looked._fields))
            sampled = {
                name: Coordinates(file.get_tensor(f"index/{name}"), file.get_tensor(f"weight/{name}"))
                for name in json.loads(about.get("sampled", "[]"))
            }
    except (OSError, SafetensorError) as error:
        raise UserError(f"{store.folder} holds no features that can be read ({error}): forecast again.") from error
    if about["key"] != store.key:
        raise UserError(f"{store.folder} holds the features of another forecast: forecast again.")
    if "groups" in about:
        groups = [[AdaptedLayer(*layer) for layer in group] for group in json.loads(about["groups"])]
        factors = read_factors(store, len(margin), len(groups))
        stacks = [LayerStack(own, _kept(u), _kept(v)) for own, (u, v) in zip(groups, factors.stacks, strict=True)]
        return weight_space(parameters, margin, stacks, place)._replace(looked=looked)
    decayed = json.loads(about["decayed"])
    if "matrices" in about:
        found = read_weight_factors(store, len(margin), json.loads(about["matrices"]))
        matrices = {name: (_kept(left), _kept(right)) for name, (left, right) in found.matrices.items()}
        return whole_weights(parameters, margin, matrices, _kept(found.vectors), decayed, place)._replace(looked=looked)
    gradient = _kept(read_gradients(store, len(margin)).gradient)
    return Tangent(parameters, margin, gradient, sampled, decayed, place, looked)


class Anchors:
    """Stored anchors by step, read when they are asked for; the last ones stay in memory as far as they fit.

    Args:
        run_folder: where they are.
        keys: of their features, by step.
        device: where their parameters go.
    """

    def __init__(self, run_folder: Path, keys: Mapping[int, str], device: torch.device) -> None:
        """Read nothing yet."""
        self._folder, self._keys, self._device = run_folder, dict(keys), device
        self._read: dict[int, AnyForm] = {}

    @property
    def first(self) -> int:
        """The first step."""
        return min(self._keys)

    def get(self, step: int) -> AnyForm | None:
        """The anchor of a step, None where there is none."""
        if step not in self._keys:
            return None
        if step not in self._read:
            found = read_anchor(anchor_store(self._folder, step, self._keys[step]), self._device)
            while self._read and sum(own.num_numbers() for own in [*self._read.values(), found]) > LARGEST_FEATURES:
                del self._read[next(iter(self._read))]
            self._read[step] = found
        return self._read[step]


def discard_anchors(run_folder: Path, *, but: Collection[int]) -> None:
    """Remove the features of all steps but these."""
    for folder in run_folder.glob("features/step-*"):
        if int(folder.name.removeprefix("step-")) not in but:
            shutil.rmtree(folder, ignore_errors=True)


def _kept(column: ShardColumn) -> ShardColumn | Tensor:
    return column.tensor() if np.prod(column.shape) <= LARGEST_FEATURES else column
