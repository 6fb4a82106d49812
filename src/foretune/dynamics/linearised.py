"""Margins in first order around an anchor: parameters at which the features of pairs were taken.

Two forms (our own derivations from theory T13). *Tangent*: linear in the trainable parameters themselves, or in a
sample of their coordinates. *Weight space*: linear in each layer's weight change. Of adapters that is ΔW =
s (B A − B₀ A₀), with A and B as they are, so that the growth of the features that B A brings about is kept; of whole
weights it is the tangent form with all coordinates, their gradients kept as a few outer products. All are exact at the
anchor and to first order around it.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretune.dynamics.margin_model import Looked
from foretune.features.coordinates import Coordinates, kernel_error, spread
from foretune.features.token_factors import AdaptedLayer
from foretune.statistics.moments import RowSource

PAIRS_AT_ONCE = 64
# Numbers of the mask that dropout takes stretches of, and of a stretch.
MASK, STRETCH = 2**21, 2**18
# Pairs that the kernel's error is estimated from.
KERNEL_PAIRS = 128


class LayerStack(NamedTuple):
    """Adapted layers of one shape and scaling, and the factors of G = ∂margin/∂W of m measured pairs.

    Attributes:
        layers: the layers, L of them.
        outputs: u, shape (m, L, rank, out), in memory or on the disk.
        inputs: v, shape (m, L, rank, in).
    """

    layers: Sequence[AdaptedLayer]
    outputs: RowSource
    inputs: RowSource

    def change(self, parameters: Mapping[str, Tensor], measured: NDArray[np.int64], *, training: bool) -> Tensor:
        """Σ over layers of s·⟨G, B A⟩ for some measured pairs, shape (len(measured),)."""
        a = torch.stack([parameters[layer.a] for layer in self.layers])
        b = torch.stack([parameters[layer.b].T for layer in self.layers])
        u, v = (_rows(source, measured).transpose(0, 1) for source in (self.outputs, self.inputs))
        read, written = (side.to(a, memory_format=torch.contiguous_format) for side in (v, u))
        if training and self.layers[0].dropout:
            drop_(read, self.layers[0].dropout)
        # matrix libraries are fastest where the few rows of adapters come first and all lines are whole
        products = (a @ read.flatten(1, 2).mT) * (b @ written.flatten(1, 2).mT)
        return self.layers[0].scaling * products.unflatten(2, v.shape[1:3]).sum((0, 1, 3))


class WeightSpace(NamedTuple):
    """Margins linear in the weight changes of adapted layers.

    Attributes:
        anchor: parameters at which the factors were taken.
        offset: margin at the anchor less its linear part there, so that margin = offset + Σ s⟨G, B A⟩, shape (m,).
        stacks: the factors.
        place: the measured pair that each pair is, or that stands for it, shape (n,).
        looked: pairs without features, and what the model made of them there.
    """

    anchor: dict[str, Tensor]
    offset: Tensor
    stacks: Sequence[LayerStack]
    place: NDArray[np.int64]
    looked: Looked = Looked()

    @property
    def sampled(self) -> Mapping[str, Coordinates]:
        """Parameters are whole."""
        return {}

    @property
    def decayed(self) -> None:
        """Names tell."""

    def start(self) -> dict[str, Tensor]:
        """The anchor."""
        return self.anchor

    @property
    def unchanged(self) -> bool:
        """Whether all B are zero at the anchor."""
        return not any(self.anchor[layer.b].any() for stack in self.stacks for layer in stack.layers)

    def starting_at(self, others: Mapping[str, Tensor]) -> "WeightSpace":
        """The same from other matrices A; where all B are zero, they change neither weights nor factors there."""
        return self._replace(anchor={**self.anchor, **others})

    def shifted(self, gap: Tensor) -> "WeightSpace":
        """The same with margins of the measured pairs that are so much greater, shape (m,)."""
        return self._replace(offset=self.offset + gap)

    def num_numbers(self) -> int:
        """Of all features."""
        return sum(int(np.prod(side.shape)) for stack in self.stacks for side in (stack.outputs, stack.inputs))

    def margins(self, parameters: Mapping[str, Tensor], pairs: Tensor, *, training: bool = False) -> Tensor:
        """Margins of some pairs, shape (len(pairs),)."""
        measured = self.place[pairs.numpy()]
        changes = [stack.change(parameters, measured, training=training) for stack in self.stacks]
        return self.offset[torch.from_numpy(measured).to(self.offset.device)] + torch.stack(changes).sum(0)


@torch.no_grad()
def weight_space(
    anchor: dict[str, Tensor], margin: Tensor, stacks: Sequence[LayerStack], place: NDArray[np.int64]
) -> WeightSpace:
    """The weight-space form around `anchor`, where measured pairs have these margins against the reference (m,)."""
    linear = WeightSpace(anchor, torch.zeros_like(margin), stacks, np.arange(len(margin)))
    return linear._replace(offset=margin - _at_anchor(linear, len(margin)), place=place)


class WholeWeights(NamedTuple):
    """Margins linear in the weights of whole layers.

    Attributes:
        anchor: parameters at which the factors were taken.
        offset: margin at the anchor less its linear part there, shape (m,).
        matrices: left (m, k, rows) and right (m, k, columns) by parameter name, in memory or on the disk: the gradient
            of a pair's margin is Σ_k left_k right_kᵀ.
        vectors: gradients of the other parameters, in their order, shape (m, Σ coordinates).
        decayed: names of the parameters that weight decay acts on.
        place: the measured pair that each pair is, or that stands for it, shape (n,).
        looked: pairs without features, and what the model made of them there.
    """

    anchor: dict[str, Tensor]
    offset: Tensor
    matrices: Mapping[str, tuple[RowSource, RowSource]]
    vectors: RowSource
    decayed: Collection[str] | None
    place: NDArray[np.int64]
    looked: Looked = Looked()

    @property
    def sampled(self) -> Mapping[str, Coordinates]:
        """Parameters are whole."""
        return {}

    def start(self) -> dict[str, Tensor]:
        """The anchor."""
        return self.anchor

    def shifted(self, gap: Tensor) -> "WholeWeights":
        """The same with margins of the measured pairs that are so much greater, shape (m,)."""
        return self._replace(offset=self.offset + gap)

    def num_numbers(self) -> int:
        """Of all features and of the anchor, which may be as large."""
        sides = [side for both in self.matrices.values() for side in both]
        return sum(int(np.prod(part.shape)) for part in [*sides, self.vectors, *self.anchor.values()])

    def margins(self, parameters: Mapping[str, Tensor], pairs: Tensor, *, training: bool = False) -> Tensor:
        """Margins of some pairs, shape (len(pairs),); dropout is not simulated in this form."""
        measured = self.place[pairs.numpy()]
        rest = [parameters[name].flatten() for name in self.anchor if name not in self.matrices]
        change = _rows(self.vectors, measured).to(self.offset) @ torch.cat([self.offset.new_zeros(0), *rest])
        for name, both in self.matrices.items():
            left, right = (_rows(side, measured).to(self.offset).flatten(0, 1) for side in both)
            weight = parameters[name]
            # multiplied from the longer side, so that what comes out is short
            tall = weight.shape[0] > weight.shape[1]
            products = (left @ weight) * right if tall else (right @ weight.T) * left
            change = change + products.sum(1).view(len(measured), -1).sum(1)
        return self.offset[torch.from_numpy(measured).to(self.offset.device)] + change


@torch.no_grad()
def whole_weights(
    anchor: dict[str, Tensor],
    margin: Tensor,
    matrices: Mapping[str, tuple[RowSource, RowSource]],
    vectors: RowSource,
    decayed: Collection[str] | None,
    place: NDArray[np.int64],
) -> WholeWeights:
    """The form of whole weights around `anchor`, where measured pairs have these margins against the reference (m,)."""
    linear = WholeWeights(anchor, torch.zeros_like(margin), matrices, vectors, decayed, np.arange(len(margin)))
    return linear._replace(offset=margin - _at_anchor(linear, len(margin)), place=place)


def _at_anchor(linear: WeightSpace | WholeWeights, num_measured: int) -> Tensor:
    parts = torch.arange(num_measured).split(PAIRS_AT_ONCE)
    return torch.cat([linear.margins(linear.anchor, part) for part in parts])


class Tangent(NamedTuple):
    """Margins linear in the trainable parameters.

    Attributes:
        anchor: parameters at which the gradients were taken: whole ones, or sampled coordinates of one, shape (c,).
        margin: at the anchor, against the reference, shape (m,).
        gradient: φ, the coordinates of all parameters in their order, shape (m, Σ c), in memory or on the disk.
        sampled: of those parameters of which some coordinates are there, which they are and what each stands for.
        decayed: names of the parameters that weight decay acts on.
        place: the measured pair that each pair is, or that stands for it, shape (n,).
        looked: pairs without features, and what the model made of them there.
    """

    anchor: dict[str, Tensor]
    margin: Tensor
    gradient: RowSource
    sampled: Mapping[str, Coordinates]
    decayed: Collection[str] | None
    place: NDArray[np.int64]
    looked: Looked = Looked()

    def start(self) -> dict[str, Tensor]:
        """The anchor."""
        return self.anchor

    def shifted(self, gap: Tensor) -> "Tangent":
        """The same with margins of the measured pairs that are so much greater, shape (m,)."""
        return self._replace(margin=self.margin + gap)

    def num_numbers(self) -> int:
        """Of all features."""
        return int(np.prod(self.gradient.shape))

    def margins(self, parameters: Mapping[str, Tensor], pairs: Tensor, *, training: bool = False) -> Tensor:
        """Margins of some pairs, shape (len(pairs),); dropout is not simulated in this form."""
        measured = self.place[pairs.numpy()]
        change = torch.cat([(parameters[name] - start).flatten() for name, start in self.anchor.items()])
        gradient = _rows(self.gradient, measured).to(change)
        there = self.margin[torch.from_numpy(measured).to(self.margin.device)]
        return there + _Weighted.apply(change, gradient, self.weights())  # pyright: ignore

    def redrawn(self, seed: int) -> "Tangent":
        """The same with weights that spread about these as if other coordinates had been drawn."""
        draw = torch.Generator().manual_seed(seed)
        return self._replace(
            sampled={
                name: own._replace(weight=own.weight + spread(own.weight, draw)) for name, own in self.sampled.items()
            }
        )

    def kernel_error(self) -> float:
        """Relative standard error of the kernel that the sample of coordinates brings, from some pairs."""
        some = np.unique(np.linspace(0, len(self.margin) - 1, KERNEL_PAIRS).astype(int))
        return kernel_error(_rows(self.gradient, some).to(self.margin), self.weights())

    def weights(self) -> Tensor:
        """How many coordinates each one stands for, in their order, shape (Σ c,)."""
        return torch.cat(
            [
                self.sampled[name].weight if name in self.sampled else torch.ones_like(start).flatten()
                for name, start in self.anchor.items()
            ]
        )


class _Weighted(torch.autograd.Function):
    """Φ (w ∘ Δθ), whose gradient is Φᵀ g: a sampled coordinate stands for others but has a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, gradient: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return gradient @ (weights * change)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradients[0] @ gradient, None, None


def drop_(values: Tensor, rate: float) -> None:
    """Dropout in place, by random stretches of one long mask: drawing every number costs more than all the rest."""
    mask = _mask(rate, values.device)
    stretches = values.view(-1).split(STRETCH)
    for stretch, start in zip(stretches, torch.randint(len(mask) - STRETCH, (len(stretches),)).tolist(), strict=True):
        stretch.mul_(mask[start : start + len(stretch)])


@cache
def _mask(rate: float, device: torch.device) -> Tensor:
    kept = torch.rand(MASK, generator=torch.Generator().manual_seed(0)) >= rate
    return (kept / kept.double().mean()).float().to(device)


def _rows(source: RowSource, rows: NDArray[np.int64]) -> Tensor:
    if isinstance(source, Tensor):
        return source.index_select(0, torch.from_numpy(rows))
    return torch.from_numpy(source[rows])
