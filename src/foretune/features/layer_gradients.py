"""Gradients of layers by pair, from what is caught during one backward pass over a batch."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foretune.errors import UserError
from foretune.features.caught import PairTokens, catching
from foretune.features.head_gradient import HeadReceiver
from foretune.models.head import Head

# (layer, name of its parameter, a of shape (pairs, tokens, …), δ of shape (pairs, tokens, …)) → (pairs, *parameter)
Rule = Callable[[nn.Module, str, Tensor, Tensor], Tensor]

T = TypeVar("T")

# Products of inputs and output gradients that exist at any one time.
PRODUCTS_AT_ONCE = 2**22


class LayerGradients:
    """Pair by pair gradients of chosen parameters, summed over all layers that share a parameter.

    Args:
        model: the model whose layers are watched.
        names: parameters, as `model.named_parameters()` calls them.
        tokens: whose they are.
        sampled: by name, which coordinates are wanted (row-major, ascending); all of those that are missing here.
        dtype: of the gradients.

    Raises:
        UserError: a name that the model does not have, or a layer that does not keep tokens apart.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Collection[str],
        tokens: PairTokens,
        *,
        sampled: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Find the layers that own the parameters."""
        parameters = dict(model.named_parameters())
        if missing := sorted(set(names) - set(parameters)):
            raise UserError(f"the model has no parameter '{missing[0]}': choose from model.named_parameters().")
        if not names:
            raise UserError("no parameter to take gradients of: name some, or let some require gradients.")
        self.names = list(names)
        self._tokens = tokens
        self._sampled = sampled
        self._dtype = dtype
        self._found: dict[str, Tensor] = {}
        self._name_of = {id(parameters[name]): name for name in names}
        self._owned: dict[nn.Module, dict[str, str]] = defaultdict(dict)
        for module in model.modules():
            for own, parameter in module.named_parameters(recurse=False):
                if name := self._name_of.get(id(parameter)):
                    self._owned[module][own] = name
        self._rules = {module: _rule_of(module, next(iter(own.values()))) for module, own in self._owned.items()}

    def receiver_of(self, head: Head) -> HeadReceiver | None:
        """What takes the gradients of the output layer's own parameters; None where they are not chosen."""
        weight, bias = self._name_of.get(id(head.weight)), self._name_of.get(id(head.bias))

        def receive(owner: Tensor, states: Tensor, residual: Tensor) -> None:
            if weight is not None:
                self._receive_head(weight, residual, states, owner)
            if bias is not None:
                total = residual.new_zeros(len(self._tokens.lengths), residual.shape[1])
                self._add(bias, self._wanted(bias, total.index_add(0, owner, residual)))

        return None if weight is None and bias is None else receive

    def _receive_head(self, name: str, residual: Tensor, states: Tensor, owner: Tensor) -> None:
        self._add(name, self._products(name, residual, states, owner))

    def _add(self, name: str, gradient: Tensor) -> None:
        """Add one layer's share of a parameter's gradients, shape (pairs, coordinates)."""
        gradient = gradient.to(self._dtype)
        self._found[name] = self._found[name] + gradient if name in self._found else gradient

    def finished(self) -> dict[str, Tensor]:
        """By name, shape (pairs, coordinates)."""
        return complete(self._found, self.names)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the layers during a forward pass and its backward pass."""
        with catching(self._owned, self._receive, input_of=_input_of):
            yield

    def _receive(self, layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> None:
        name = next(iter(self._owned[layer].values()))
        if not self._tokens.fit(inputs) or inputs.ndim < (3 if inputs.is_floating_point() else 2):
            raise _refusal(name, f"it is applied to an input of shape {tuple(inputs.shape)}, not token by token")
        for own, own_name in self._owned[layer].items():
            self._add(own_name, self._gradient_of(layer, own, inputs, output_gradient))

    def _gradient_of(self, layer: nn.Module, own: str, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        name = self._owned[layer][own]
        if name in self._sampled and layer.get_parameter(own).ndim > 1:
            owner, in_line = self._tokens.owner(inputs), (inputs.flatten(0, 1), output_gradient.flatten(0, 1))
            if isinstance(layer, nn.Embedding):
                return self._looked_up(layer, name, *in_line, owner)
            a, delta = in_line
            left, right = (a, delta) if isinstance(layer, Conv1D) else (delta, a)
            return self._products(name, left, right, owner)
        a, delta = self._tokens.by_pair(inputs), self._tokens.by_pair(output_gradient)
        return self._wanted(name, self._rules[layer](layer, own, a, delta).flatten(1))

    def _wanted(self, name: str, gradient: Tensor) -> Tensor:
        return gradient[:, self._sampled[name]] if name in self._sampled else gradient

    def _products(self, name: str, left: Tensor, right: Tensor, owner: Tensor) -> Tensor:
        """Σ left rightᵀ over each pair's tokens, left (tokens, rows) and right (tokens, columns)."""
        exact = torch.promote_types(left.dtype, torch.float32)
        left, right, count = left.to(exact), right.to(exact), len(self._tokens.lengths)
        if name not in self._sampled:
            found = left.new_zeros(count, left.shape[1], right.shape[1])
            for pair in owner.unique():
                found[pair] = left[owner == pair].T @ right[owner == pair]
            return found.flatten(1)
        index = self._sampled[name]
        row, column = index // right.shape[1], index % right.shape[1]
        found = left.new_zeros(count, len(index))
        for part in torch.arange(len(owner), device=owner.device).split(max(1, PRODUCTS_AT_ONCE // max(1, len(index)))):
            found.index_add_(0, owner[part], left[part][:, row] * right[part][:, column])
        return found

    def _looked_up(self, layer: nn.Embedding, name: str, ids: Tensor, delta: Tensor, owner: Tensor) -> Tensor:
        """Each token adds its δ to the sampled coordinates of its row."""
        weight, index = layer.weight, self._sampled[name]
        row, column = index // weight.shape[1], index % weight.shape[1]
        first, end = torch.searchsorted(row, ids), torch.searchsorted(row, ids, right=True)
        count = torch.where(ids == layer.padding_idx, 0, end - first) if layer.padding_idx is not None else end - first
        token = torch.repeat_interleave(count)
        place = torch.arange(len(token), device=ids.device) - (count.cumsum(0) - count - first)[token]
        exact = torch.promote_types(delta.dtype, torch.float32)
        found = delta.new_zeros(len(self._tokens.lengths), len(index), dtype=exact)
        values = (delta * lookup_scale(layer, ids))[token, column[place]].to(exact)
        return found.index_put_((owner[token], place), values, accumulate=True)


def complete(found: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    """What was found of all parameters, in the order of their names.

    Raises:
        UserError: one is missing.
    """
    for name in names:
        if name not in found:
            raise _refusal(name, "no layer that the scores depend on takes it as its own weight")
    return {name: found[name] for name in names}


def lookup_scale(layer: nn.Embedding, ids: Tensor) -> Tensor:
    """What the embedding multiplies the rows by that it looks up, shape (*ids.shape, 1)."""
    ones = torch.ones_like(layer.weight[:1, :1]).expand_as(layer.weight)
    return torch.func.functional_call(layer, {"weight": ones}, ids)[..., :1]


def _rule_of(module: nn.Module, name: str) -> Rule:
    if isinstance(module, (nn.Linear, Conv1D)):
        return _linear
    if type(module) is DoraLinearLayer:
        return _dora
    elementwise = not list(module.children()) and all(own.ndim == 1 for own in module.parameters(recurse=False))
    if elementwise or isinstance(module, nn.Embedding):
        return _recomputed
    raise _refusal(name, f"a {type(module).__name__} does not keep the tokens of a row together")


def _linear(module: nn.Module, own: str, inputs: Tensor, output_gradient: Tensor) -> Tensor:
    delta = output_gradient.flatten(1, -2)
    if own == "bias":
        return delta.sum(1)
    a = inputs.flatten(1, -2)
    left, right = (a, delta) if isinstance(module, Conv1D) else (delta, a)
    return left.transpose(1, 2) @ right


def _recomputed(module: nn.Module, own: str, inputs: Tensor, output_gradient: Tensor) -> Tensor:
    """Norms and embeddings, whatever their formula: differentiate the layer itself, pair by pair at once."""
    weight = module.get_parameter(own).detach()

    def of_one_pair(inputs: Tensor, output_gradient: Tensor) -> Tensor:
        def call(weight: Tensor) -> Tensor:
            return torch.func.functional_call(module, {own: weight}, (inputs,))

        return torch.func.vjp(call, weight)[1](output_gradient)[0]

    return torch.func.vmap(of_one_pair)(inputs, output_gradient)


def _dora(module: nn.Module, own: str, inputs: Tensor, output_gradient: Tensor) -> Tensor:
    return (output_gradient * inputs).sum(1) / module.get_parameter(own)


def _input_of(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
    return _direction(kwargs, output) if type(layer) is DoraLinearLayer else args[0]


def _direction(kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """DoRA adds (m/n − 1)·W x + (m/n)·s·B A x with a constant n: times m, its derivative by m is this plus W x."""
    base, bias = kwargs["base_result"].detach(), kwargs["base_layer"].bias
    return output.detach() + (base if bias is None else base - bias)


def _refusal(name: str, why: str) -> UserError:
    return UserError(f"cannot tell the gradients of '{name}' apart by pair ({why}): leave it out of the parameters.")
