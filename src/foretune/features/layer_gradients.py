"""Gradients of layers by pair, caught by hooks during one backward pass over a batch.

A row of the batch belongs to one pair, so with a layer's input a and the gradient δ at its output, both by row, the
gradient of a weight for one pair is Σ δ aᵀ over the tokens of its rows (Goodfellow, arXiv 1510.01799).
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foretune.errors import UserError

# (layer, name of its parameter, a of shape (pairs, tokens, …), δ of shape (pairs, tokens, …)) → (pairs, *parameter)
Rule = Callable[[nn.Module, str, Tensor, Tensor], Tensor]


class LayerGradients:
    """Pair by pair gradients of chosen parameters, summed over all layers that share a parameter.

    Args:
        model: the model whose layers are watched.
        names: parameters, as `model.named_parameters()` calls them.
        num_pairs: pairs of the batch.
        num_rows: rows of the batch, as many for each pair, one pair after another.
        dtype: of the gradients.

    Raises:
        UserError: a name that the model does not have, or a layer that does not keep rows apart.
    """

    def __init__(
        self, model: nn.Module, names: Collection[str], *, num_pairs: int, num_rows: int, dtype: torch.dtype
    ) -> None:
        """Find the layers that own the parameters."""
        parameters = dict(model.named_parameters())
        if missing := sorted(set(names) - set(parameters)):
            raise UserError(f"the model has no parameter '{missing[0]}': choose from model.named_parameters().")
        if not names:
            raise UserError("no parameter to take gradients of: name some, or let some require gradients.")
        self.names = list(names)
        self.num_pairs = num_pairs
        self._num_rows = num_rows
        self._dtype = dtype
        self._found: dict[str, Tensor] = {}
        self._inside_rule = False
        self._name_of = {id(parameters[name]): name for name in names}
        self._owned: dict[nn.Module, dict[str, str]] = defaultdict(dict)
        for module in model.modules():
            for own, parameter in module.named_parameters(recurse=False):
                if name := self.name_of(parameter):
                    self._owned[module][own] = name

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
    def hooks(self) -> Iterator[None]:
        """Watch the layers. The graph of a forward pass in which nothing else requires gradients starts at them."""
        handles = [module.register_forward_hook(self._watch, with_kwargs=True) for module in self._owned]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if self._inside_rule:
            return None
        name = next(iter(self._owned[module].values()))
        rule = _rule_of(module)
        if rule is None:
            raise _refusal(name, f"a {type(module).__name__} does not keep the tokens of a row together")
        inputs = _direction(kwargs, output) if rule is _dora else args[0]

        def receive(inputs: Tensor, output_gradient: Tensor) -> None:
            if len(inputs) != self._num_rows or inputs.ndim < (3 if inputs.is_floating_point() else 2):
                raise _refusal(name, f"it is applied to an input of shape {tuple(inputs.shape)}, not row by row")
            a, delta = (part.unflatten(0, (self.num_pairs, -1)).flatten(1, 2) for part in (inputs, output_gradient))
            self._inside_rule = True
            try:
                for own, own_name in self._owned[module].items():
                    self.add(own_name, rule(module, own, a, delta))
            finally:
                self._inside_rule = False

        return _Catch.apply(output, inputs, torch.empty(0, requires_grad=True), receive)


class _Catch(torch.autograd.Function):
    """The identity on a layer's output; its backward hands over the layer's input and the output's gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, start: Tensor, receive: Callable) -> Tensor:
        # `start` requires gradients, hence so does what is returned, whether or not anything before it does
        ctx.save_for_backward(inputs)
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple:  # pyright: ignore
        ctx.receive(ctx.saved_tensors[0], output_gradient)
        return output_gradient, None, None, None


def _rule_of(module: nn.Module) -> Rule | None:
    if isinstance(module, (nn.Linear, Conv1D)):
        return _linear
    if type(module) is DoraLinearLayer:
        return _dora
    elementwise = not list(module.children()) and all(own.ndim == 1 for own in module.parameters(recurse=False))
    return _recomputed if elementwise or isinstance(module, nn.Embedding) else None


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


def _direction(kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """DoRA adds (m/n − 1)·W x + (m/n)·s·B A x with a constant n: times m, its derivative by m is this plus W x."""
    base, bias = kwargs["base_result"].detach(), kwargs["base_layer"].bias
    return output.detach() + (base if bias is None else base - bias)


def _refusal(name: str, why: str) -> UserError:
    return UserError(f"cannot tell the gradients of '{name}' apart by pair ({why}): leave it out of the parameters.")
