"""The forms of the linearised twin: what features are taken of a pair, and what an anchor holds besides them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Trainer

from foretune import processes
from foretune.dynamics.anchors import Known, write_tangent, write_weight_space, write_whole_weights
from foretune.dynamics.arguments import check_coordinatewise
from foretune.errors import UserError
from foretune.features.coordinates import Coordinates, sample_coordinates
from foretune.features.pair_gradients import measure_gradients, read_gradients, trainable_names
from foretune.features.store import ShardStore
from foretune.features.token_factors import AdaptedLayer, adapted_layers, layers_alike, measure_factors, read_factors
from foretune.features.weight_factors import measure_weight_factors, read_weight_factors
from foretune.models.encoding import EncodedPair
from foretune.verbs.job import Job


class Form(Protocol):
    """How margins follow from parameters, around those that the model has."""

    @property
    def settings(self) -> Sequence[Any]:
        """What features depend on besides model, parameters and pairs."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """What is simulated, as the model has it now, float32."""
        ...

    def measure(
        self, pairs: Sequence[EncodedPair], store: ShardStore, *, packed: bool, progress: Callable[[int], None]
    ) -> NDArray[np.float64]:
        """Write the features of all pairs; their margins, shape (pairs,)."""
        ...

    def write(self, store: ShardStore, known: Known) -> None:
        """Write the anchor that `read_anchor` reads; arguments as of `write_weight_space`."""
        ...


class WeightSpaceForm(NamedTuple):
    """Margins linear in each adapted layer's weight change; attributes as of `measure_factors`."""

    model: nn.Module
    layers: Sequence[AdaptedLayer]
    rank: int

    @property
    def settings(self) -> Sequence[Any]:
        """The factors' rank."""
        return (self.rank,)

    def parameters(self) -> dict[str, Tensor]:
        """The adapters."""
        return {name: value.float() for name, value in _trained(self.model).items()}

    def measure(
        self, pairs: Sequence[EncodedPair], store: ShardStore, *, packed: bool, progress: Callable[[int], None]
    ) -> NDArray[np.float64]:
        """Write the factors of all pairs; their margins, shape (pairs,)."""
        measure_factors(self.model, pairs, self.layers, store, rank=self.rank, packed=packed, progress=progress)
        return read_factors(store, len(pairs), len(layers_alike(self.model, self.layers))).margin

    def write(self, store: ShardStore, known: Known) -> None:
        """Write the anchor."""
        write_weight_space(store, self.parameters(), known, layers_alike(self.model, self.layers))


class WholeWeightsForm(NamedTuple):
    """Margins linear in whole weights, of whose gradients a few outer products are kept.

    Attributes:
        model: whose parameters that require gradients are simulated.
        rank: as of `measure_weight_factors`.
    """

    model: nn.Module
    rank: int

    @property
    def settings(self) -> Sequence[Any]:
        """The factors' rank."""
        return ("whole weights", self.rank)

    def parameters(self) -> dict[str, Tensor]:
        """All that is trained."""
        return {name: value.float() for name, value in _trained(self.model).items()}

    def measure(
        self, pairs: Sequence[EncodedPair], store: ShardStore, *, packed: bool, progress: Callable[[int], None]
    ) -> NDArray[np.float64]:
        """Write the factors of all pairs; their margins, shape (pairs,)."""
        names = trainable_names(self.model)
        measure_weight_factors(self.model, pairs, names, store, rank=self.rank, packed=packed, progress=progress)
        return read_weight_factors(store, len(pairs), []).margin

    def write(self, store: ShardStore, known: Known) -> None:
        """Write the anchor."""
        write_whole_weights(store, self.parameters(), known, _decayed(self.model))


class TangentForm(NamedTuple):
    """Margins linear in the trainable parameters.

    Attributes:
        model: whose parameters that require gradients are simulated.
        sampled: of those parameters that are too large together: which coordinates are, and what each stands for.
    """

    model: nn.Module
    sampled: dict[str, Coordinates]

    @property
    def settings(self) -> Sequence[Any]:
        """The coordinates."""
        return tuple((name, own.index.cpu().numpy().tobytes()) for name, own in self.sampled.items())

    def parameters(self) -> dict[str, Tensor]:
        """The whole parameters, or the sampled coordinates of one."""
        return {
            name: (value.flatten()[self.sampled[name].index] if name in self.sampled else value).float()
            for name, value in _trained(self.model).items()
        }

    def measure(
        self, pairs: Sequence[EncodedPair], store: ShardStore, *, packed: bool, progress: Callable[[int], None]
    ) -> NDArray[np.float64]:
        """Write the gradients of all pairs; their margins, shape (pairs,)."""
        index = {name: own.index for name, own in self.sampled.items()}
        names = trainable_names(self.model)
        measure_gradients(self.model, pairs, names, store, sampled=index, packed=packed, progress=progress)
        return read_gradients(store, len(pairs)).margin

    def write(self, store: ShardStore, known: Known) -> None:
        """Write the anchor."""
        write_tangent(store, self.parameters(), known, self.sampled, _decayed(self.model))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach() for name in trainable_names(model)}


def _decayed(model: nn.Module) -> list[str]:
    return Trainer.get_decay_parameter_names(None, model)  # pyright: ignore


def form_of(job: Job, model: nn.Module, pairs: Sequence[EncodedPair], *, packed: bool) -> Form:
    """The form that the job asks for.

    Args:
        job: whose `twin` it is.
        model: that the run trains, at its start.
        pairs: that features will be taken of.
        packed: compute each prompt once.

    Raises:
        UserError: adapters that the form does not fit; what a sample of coordinates cannot simulate.
    """
    if job.twin == "weight_space" and job.trainable != "lora":
        return WholeWeightsForm(model, job.ours.factor_rank)
    if job.twin == "weight_space":
        return WeightSpaceForm(model, adapted_layers(model), job.ours.factor_rank)
    names = trainable_names(model)
    number, budget = sum(model.get_parameter(name).numel() for name in names), job.ours.twin_coordinates
    if number > budget:
        check_coordinatewise(job.training)
        if job.ours.relinearise_every or job.ours.relinearise_tolerance:
            raise UserError(
                f"features cannot be taken anew at simulated weights, of which {budget} coordinates in {number} are "
                "known: simulate them all (--twin weight_space, in the memory that training takes), or leave out "
                "--relinearise_every and --relinearise_tolerance and forecast from a --pilot_fraction."
            )
    sampled = processes.on_main(
        lambda: sample_coordinates(model, pairs, names, budget=budget, packed=packed, seed=job.training.seed)
    )
    device = next(model.parameters()).device
    return TangentForm(model, {name: Coordinates(*(part.to(device) for part in own)) for name, own in sampled.items()})
