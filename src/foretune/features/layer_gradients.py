"""Gradients of layers by pair, from what is caught during one backward pass over a batch."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foretune.errors import UserError
from foretune.features.caught import PairTokens, catching

# (layer, name of its parameter, a of shape (pairs, tokens, …), δ of shape (pairs, tokens, …)) → (pairs, *parameter)
Rule = Callable[[nn.Module, str, Tensor, Tensor], Tensor]


class LayerGradients:
    """Pair by pair gradients of chosen parameters, summed over all layers that share a parameter.

    Args:
        model: the model whose layers are watched.
        names: parameters, as `model.named_parameters()` calls them.
        tokens: whose they are.
        dtype: of the gradients.

    Raises:
        UserError: a name that the model does not have, or a layer that does not keep tokens apart.
    """

    def __init__(self, model: nn.Module, names: Collection[str], tokens: PairTokens, *, dtype: torch.dtype) -> None:
        """Find the layers that own the parameters."""
        parameters = dict(model.named_parameters())
        if missing := sorted(set(names) - set(parameters)):
            raise UserError(f"the model has no parameter '{missing[0]}': choose from model.named_parameters().")
        if not names:
            raise UserError("no parameter to take gradients of: name some, or let some require gradients.")
        self.names = list(names)
        self._tokens = tokens
        self._dtype = dtype
        self._found: dict[str, Tensor] = {}
        self._name_of = {id(parameters[name]): name for name in names}
        self._owned: dict[nn.Module, dict[str, str]] = defaultdict(dict)
        for module in model.modules():
            for own, parameter in module.named_parameters(recurse=False):
                if name := self.name_of(parameter):
                    self._owned[module][own] = name
        self._rules = {module: _rule_of(module, next(iter(own.values()))) for module, own in self._owned.items()}

    def name_of(self, parameter: Tensor | None) -> str | None:
        """The chosen name of a parameter, None where it is not chosen."""
        return self._name_of.get(id(parameter))

    def add(self, name: str, gradient: Tensor) -> None:
        """Add one layer's share of a parameter's gradients, shape (pairs, *parameter)."""
        gradient = gradient.flatten(1).to(self._dtype)
        self._found[name] = self._found[name] + gradient if name in self._found else gradient

    def finished(self) -> dict[str, Tensor]:
        """By name, shape (pairs, coordinates)."""
        for name in self.names:
            if name not in self._found:
                raise _refusal(name, "no layer that the scores depend on takes it as its own weight")
        return {name: self._found[name] for name in self.names}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the layers during a forward pass and its backward pass."""
        with catching(self._owned, self._receive, input_of=_input_of):
            yield

    def _receive(self, layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> None:
        name = next(iter(self._owned[layer].values()))
        if not self._tokens.fit(inputs) or inputs.ndim < (3 if inputs.is_floating_point() else 2):
            raise _refusal(name, f"it is applied to an input of shape {tuple(inputs.shape)}, not token by token")
        a, delta = self._tokens.by_pair(inputs), self._tokens.by_pair(output_gradient)
        for own, own_name in self._owned[layer].items():
            self.add(own_name, self._rules[layer](layer, own, a, delta))


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
