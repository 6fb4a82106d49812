"""Forward passes in which the prompt is computed once for all responses.

A pair is a small tree: the prompt, and two branches; a ranking has K of them. It is packed into one sequence, prompt +
chosen + rejected, whose attention mask keeps the branches from seeing each other and whose position ids restart at the
end of the prompt. The last token of a branch predicts nothing, so it is not computed. Where a model cannot take such a
mask, the branches are computed as separate sequences.
"""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from foretune.models.attention import NAME, Layout
from foretune.models.encoding import Tree
from foretune.models.head import causal_model
from foretune.models.product_attention import added
from foretune.models.sharded import final_states

# Less padding than this share costs less than moving tokens between a line and a grid for attention.
LITTLE_PADDING = 0.04
# Batches of fewer tokens are not worth dividing among workers.
LEAST_BUDGET = 256


class Targets(NamedTuple):
    """What is scored: one entry a response token, response by response (chosen first, then rejected), pair by pair.

    Attributes:
        state: index of the hidden state that predicts the token, into the states of the same pairs.
        token: the token's id.
        pair: index of the pair.
        sign: what the token's log-probability counts in the margin: +1 in the chosen response, −1 in the rejected one,
            divided by the response's length where scores are means over tokens.
        response: number of the response among those of all pairs.
    """

    state: Tensor
    token: Tensor
    pair: Tensor
    sign: Tensor
    response: Tensor


def num_states(pair: Tree) -> int:
    """Distinct hidden states that predict the pair's response tokens; the first is common to all responses."""
    return 1 + sum(max(len(ids) - 1, 0) for ids in pair.responses)


def targets_of(pairs: Sequence[Tree]) -> Targets:
    """The scored tokens of `pairs`, states numbered in the order in which `states_of` returns them."""
    state, token, owner, sign, response = [], [], [], [], []
    offset = number = 0
    for index, pair in enumerate(pairs):
        start = offset + 1
        for place, ids in enumerate(pair.responses):
            branch = [offset, *range(start, start + max(len(ids) - 1, 0))]
            direction = -1.0 if place else 1.0
            state += branch[: len(ids)]
            token += ids
            owner += [index] * len(ids)
            sign += [direction / len(ids) if pair.per_token else direction] * len(ids)
            response += [number] * len(ids)
            start, number = start + len(branch) - 1, number + 1
        offset = start
    return Targets(*map(torch.tensor, (state, token, owner, sign, response)))


def token_batches(
    pairs: Sequence[Tree], *, budget: int = 2048, shared: int = 0, multiple_of: int = 1
) -> Iterator[list[int]]:
    """Indices of `pairs` in batches of similar length, each of at most `budget` tokens with its padding.

    Args:
        pairs: any number.
        budget: tokens of a batch; a longer pair is a batch of its own.
        shared: tokens at the beginning of each pair that are not computed with it.
        multiple_of: make about a multiple of so many batches, of like sizes, for as many workers.
    """
    lengths = [packed_length(pair) - shared for pair in pairs]
    if multiple_of > 1 and lengths:
        rounds = ceil(sum(lengths) / (budget * multiple_of))
        budget = min(budget, max(sum(lengths) // (rounds * multiple_of) + max(lengths), LEAST_BUDGET))
    batch: list[int] = []
    for index in sorted(range(len(pairs)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def packed_length(pair: Tree) -> int:
    """Tokens that the packed sequence of a pair has."""
    return len(pair.prompt_ids) + num_states(pair) - 1


def states_of(
    model: torch.nn.Module,
    pairs: Sequence[Tree],
    *,
    packed: bool = True,
    shared: int = 0,
) -> Tensor:
    """Final hidden states that predict the response tokens, shape (Σ num_states, hidden), pair by pair.

    Args:
        model: a causal language model, plain or with PEFT adapters.
        pairs: one batch; it is padded to its longest member.
        packed: compute the prompt once (False: separate sequences, the slow way).
        shared: tokens at the beginning of all pairs that an active `Beginning` stands for (packed only).
    """
    assert all(len(pair.prompt_ids) > shared for pair in pairs), "a response needs a prompt token that predicts it"
    return _packed_states(model, pairs, shared) if packed else _separate_states(model, pairs)


def supports_packing(model: torch.nn.Module) -> bool:
    """Whether the architecture is known to take a four-dimensional mask; the probe on real rows has the last word.

    Attention sinks, which transformers calls `sinks` wherever it has them, are not in `foretune_tree`.
    """
    inner = causal_model(model)
    config = inner.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    takes_masks = config._attn_implementation in {"sdpa", "eager", NAME} and inner._supports_attention_backend
    has_sinks = any(name.endswith(".sinks") for name, _ in inner.named_parameters())
    return takes_masks and kinds <= {"full_attention", "sliding_attention"} and not has_sinks


def _packed_states(model: torch.nn.Module, pairs: Sequence[Tree], shared: int) -> Tensor:
    device = next(model.parameters()).device
    length = max(packed_length(pair) for pair in pairs) - shared
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    positions = torch.zeros(len(pairs), length, dtype=torch.long)
    real = torch.zeros(len(pairs), length, dtype=torch.bool)
    scored = torch.zeros(len(pairs), length, dtype=torch.bool)
    visible = torch.tril(torch.ones(length, length, dtype=torch.bool)).repeat(len(pairs), 1, 1)
    for row, pair in enumerate(pairs):
        tokens = list(pair.prompt_ids[shared:])
        start, places = len(tokens), [*range(len(tokens))]
        for response in pair.responses:
            visible[row, len(tokens) :, start : len(tokens)] = False  # nothing of the branches before
            tokens += response[:-1]
            places += range(start, start + len(response[:-1]))
        ids[row, : len(tokens)] = torch.tensor(tokens)
        positions[row, : len(tokens)] = torch.tensor(places) + shared
        real[row, : len(tokens)] = True
        scored[row, start - 1 : len(tokens)] = True
        # the padding sees itself alone, so that its softmax is defined; nothing sees it
        visible[row, len(tokens) :, : len(tokens)] = False
    masks = _masks(model, visible, positions, shared)
    layout, of_trees = None, causal_model(model).config.get_text_config()._attn_implementation == NAME
    if of_trees and real.float().mean() < 1 - LITTLE_PADDING:
        layout = Layout(real.sum(1).tolist(), real.flatten().nonzero()[:, 0].to(device))
        ids, positions, scored = ids[real][None], positions[real][None], scored[real][None]
    if not of_trees or device.type == "cpu":  # products of the CPU add the mask in float32
        dtype = torch.float32 if of_trees else next(model.parameters()).dtype
        masks = {kind: added(mask, dtype) for kind, mask in masks.items()}
    masks = {kind: mask.to(device) for kind, mask in masks.items()}
    for mask in masks.values():
        mask.grid = layout  # pyright: ignore
    output = final_states(
        model,
        input_ids=ids.to(device),
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        position_ids=positions.to(device),
    )
    return output[scored.to(device)]


def _masks(model: torch.nn.Module, visible: Tensor, positions: Tensor, shared: int) -> dict[str, Tensor]:
    """Which keys each query sees, for each kind of layer that the model has; shape (rows, 1, tokens, shared + tokens).

    Args:
        model: whose windows are needed.
        visible: which own tokens see which, shape (rows, tokens, tokens).
        positions: of the own tokens, shape (rows, tokens).
        shared: how many tokens the beginning has; all see it.
    """
    config = causal_model(model).config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])
    sees = torch.nn.functional.pad(visible, (shared, 0), value=True)
    found = {"full_attention": sees[:, None]}
    if window is not None and "sliding_attention" in kinds:
        before = torch.arange(shared).expand(len(positions), -1)
        distance = positions[:, :, None] - torch.cat([before, positions], 1)[:, None, :]
        found["sliding_attention"] = (sees & (distance < window))[:, None]
    return {kind: found[kind] for kind in kinds}


def _separate_states(model: torch.nn.Module, pairs: Sequence[Tree]) -> Tensor:
    device = next(model.parameters()).device
    sequences = [pair.prompt_ids + ids for pair in pairs for ids in pair.responses]
    length = max(len(tokens) for tokens in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    output = final_states(model, input_ids=ids.to(device), attention_mask=mask.to(device))
    picked, row = [], 0
    for pair in pairs:
        start = len(pair.prompt_ids) - 1
        picked.append(output[row, start : start + 1])
        for ids in pair.responses:
            picked.append(output[row, start + 1 : start + max(len(ids), 1)])
            row += 1
    return torch.cat(picked)
