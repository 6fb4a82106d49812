"""Score preference batches with the prompt computed once and logits only where a response token is scored.

TRL's DPO trainer asks its model for `model(..., labels=labels, fused_lm_head=True)` and reads per-token
log-probabilities and a few metrics from the answer. This module answers in the same form, to rounding, with less work:
chosen and rejected of a pair share one pass over their prompt, and no logits are computed for prompt or padding. So do
all responses of a ranking, whose batches say how many responses each one has.
"""

import types
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from foretune.models import attention
from foretune.models.batches import states_of, supports_packing, targets_of
from foretune.models.encoding import EncodedRanking
from foretune.models.forward_pass import ForwardPass
from foretune.models.head import Head, head_of, trunk
from foretune.models.kernels import FrozenKernels
from foretune.models.sharded import is_sharded
from foretune.scores.log_probs import states_at_once


def add_shared_prompt_head(model: PreTrainedModel, *, exact: bool = False, pack: bool = True) -> None:
    """Answer TRL's `fused_lm_head=True` calls on preference batches in this way; other calls are left as they are.

    Args:
        model: the transformers model, inside any PEFT wrapper.
        exact: compute logits in float32, outside autocast.
        pack: compute prompts once (False: still no logits at prompt and padding).
    """
    original = model.forward
    packed = pack and supports_packing(model)
    if packed:
        model.config.get_text_config()._attn_implementation = attention.NAME

    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        scores_only: bool = False,
        num_responses: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        rows = rows_of_trees(len(kwargs["input_ids"]), num_responses)
        trees = trees_of_batch(kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"], rows)
        if not all(tree.prompt_ids for tree in trees):
            return original(*args, fused_lm_head=True, **kwargs)
        return _score(self, trees, rows, kwargs["labels"], exact=exact, packed=packed, scores_only=scores_only)

    model.forward = types.MethodType(forward, model)


def _score(
    model: PreTrainedModel,
    trees: list[EncodedRanking],
    rows: list[list[int]],
    labels: Tensor,
    *,
    exact: bool,
    packed: bool,
    scores_only: bool,
) -> FusedCausalLMOutput:
    inner = trunk(model)  # this is inside `model`'s own forward, where FSDP's hooks have run
    if torch.is_grad_enabled() or is_sharded(model):  # sharded: every process must call the trunk equally often
        # a recomputed pass would run outside the context, and must save what the first one saved
        with nullcontext() if _is_checkpointing(model) else FrozenKernels():
            states = states_of(inner, trees, packed=packed)
    else:
        states = ForwardPass(inner, packed=packed).states(trees)
    targets = targets_of(trees)
    state, token = targets.state.to(states.device), targets.token.to(states.device)
    head = head_of(model, live=True)
    step = states_at_once(head)
    with torch.autocast(states.device.type, enabled=False) if exact else nullcontext():
        parts = [
            checkpoint(
                _token_scores,
                head,
                states[state[start : start + step]],
                token[start : start + step],
                exact,
                scores_only,
                use_reentrant=False,
            )
            for start in range(0, len(token), step)
        ]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]  # pyright: ignore
    mask = labels[:, 1:] != -100
    # targets come tree by tree, whatever the order of the batch
    row_of_response = torch.tensor([row for own in rows for row in own])
    order = torch.argsort(row_of_response[targets.response], stable=True).to(states.device)
    grid = [column.new_zeros(mask.shape).masked_scatter(mask, column[order]) for column in columns]
    log_probs, *metrics = grid
    entropy, mean_logits, is_top1, log_sum_sq_probs = metrics or [None] * 4
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / mask.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=entropy,
        log_sum_sq_probs=log_sum_sq_probs,
        mean_logits=mean_logits,
        is_top1=is_top1,
        label_mask=mask,
        aux_loss=None,
    )


def _is_checkpointing(model: PreTrainedModel) -> bool:
    """As transformers' own property, which has another name since 5.20."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _token_scores(head: Head, states: Tensor, token: Tensor, exact: bool, scores_only: bool) -> tuple[Tensor, ...]:
    logits = head.logits(states.float() if exact else states).float()
    if scores_only:
        return (logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1),)
    log_probs = torch.log_softmax(logits, -1)
    with torch.no_grad():
        probabilities = log_probs.exp()
        metrics = (
            -(probabilities * log_probs).sum(-1),
            logits.mean(-1),
            logits.argmax(-1) == token,
            probabilities.square().sum(-1).log(),
        )
    return log_probs.gather(1, token[:, None])[:, 0], *metrics


def rows_of_trees(num_rows: int, num_responses: Tensor | None) -> list[list[int]]:
    """Which rows of a batch are responses to one prompt: in halves, as TRL's collator makes it, or one after another.

    >>> rows_of_trees(4, None), rows_of_trees(5, torch.tensor([2, 3]))
    ([[0, 2], [1, 3]], [[0, 1], [2, 3, 4]])
    """
    if num_responses is None:
        return [[pair, num_rows // 2 + pair] for pair in range(num_rows // 2)]
    return [own.tolist() for own in torch.arange(num_rows).split(num_responses.tolist())]


def trees_of_batch(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor, rows: list[list[int]]
) -> list[EncodedRanking]:
    """The prompts of a padded batch, each with the responses of its rows."""
    lengths = attention_mask.sum(1).tolist()
    scored = (labels != -100).sum(1).tolist()
    tokens = input_ids.tolist()
    trees = []
    for own in rows:
        start = lengths[own[0]] - scored[own[0]]
        trees.append(EncodedRanking(tokens[own[0]][:start], [tokens[row][start : lengths[row]] for row in own]))
    return trees
