"""Answers drawn from a model, two to a prompt: what is measured of preference pairs can be measured of them."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from foretune.models.encoding import EncodedPair
from foretune.models.evaluating import evaluating

PROMPTS_AT_ONCE = 16


@torch.no_grad()
def draw_pairs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    seed: int,
) -> list[EncodedPair]:
    """Two answers to each prompt, drawn from the model at temperature 1, as pairs in the order of the prompts.

    Args:
        model: a causal language model.
        prompts: token ids.
        tokenizer: names the end-of-sequence and padding tokens.
        max_tokens: of an answer; it ends earlier with the end-of-sequence token, which is part of it.
        seed: of the draws; the caller's random numbers are not touched.
    """
    end, pad, device = tokenizer.eos_token_id, tokenizer.pad_token_id, next(model.parameters()).device
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max_tokens, num_return_sequences=2, eos_token_id=end, pad_token_id=pad
    )
    pairs = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(model):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            block = prompts[start : start + PROMPTS_AT_ONCE]
            longest = max(map(len, block))
            ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in block])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in block])
            drawn = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
            answers = [_until(answer, end) for answer in drawn[:, longest:].tolist()]
            pairs += [
                EncodedPair(start + row, "", "", 1.0, list(prompt), answers[2 * row], answers[2 * row + 1], False)
                for row, prompt in enumerate(block)
            ]
    return pairs


def _until(answer: list[int], end: int) -> list[int]:
    """The answer up to its first end-of-sequence token, inclusive."""
    return answer[: answer.index(end) + 1] if end in answer else answer
