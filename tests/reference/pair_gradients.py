"""Pair gradients the slow, obvious way: one pair at a time, each response alone, autograd over everything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foretune.models.encoding import EncodedPair


def log_prob(model: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(response)[:, None]).sum()


def pair_gradients(model: torch.nn.Module, pairs: Sequence[EncodedPair], names: Sequence[str]) -> dict[str, Tensor]:
    """By parameter name, shape (pairs, coordinates)."""
    model.eval()
    parameters = dict(model.named_parameters())
    chosen = [parameters[name].requires_grad_(True) for name in names]
    rows = []
    for pair in pairs:
        margin = log_prob(model, pair.prompt_ids, pair.chosen_ids) - log_prob(model, pair.prompt_ids, pair.rejected_ids)
        rows.append([part.flatten() for part in torch.autograd.grad(margin, chosen)])
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
