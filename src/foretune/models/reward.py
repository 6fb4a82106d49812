"""Reward models: r(x, y) = w·h, where h is the decoder's final hidden state at the last token of prompt and response.

As in transformers' sequence classifiers, the last token is the rightmost one that is not the padding token: where a
tokenizer pads with its end-of-sequence token, that is the token before the end.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, set_seed

from foretune.errors import UserError, first_line
from foretune.models.batches import supports_packing
from foretune.models.encoding import EncodedPair
from foretune.models.evaluating import evaluating
from foretune.models.forward_pass import ForwardPass
from foretune.models.load import LoadedModel, check_finite, pad_with_end, resolve_name, weights_hash

TOKENS_AT_ONCE = 4096


class LoadedReward(NamedTuple):
    """A reward model in evaluation mode.

    Attributes:
        loaded: decoder with a linear score head, and its tokenizer.
        has_new_head: whether the head is random, because the weights that were loaded have none.
    """

    loaded: LoadedModel
    has_new_head: bool


def load_reward_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> LoadedReward:
    """Load a decoder as a reward model; a missing head is drawn as TRL's `RewardTrainer` draws it.

    Args:
        name: hub id, local folder, GGUF file, or the embedded model.
        dtype: of the weights.
        seed: of a missing head.
        revision: of the hub.
        trust_remote_code: run code that comes with the model.
        attn_implementation: as transformers takes it.

    Raises:
        UserError: unknown name, no decoder with a linear score head, or weights that are not finite.
    """
    folder, note = resolve_name(name)
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    set_seed(seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"cannot load '{name}' as a reward model ({first_line(error)}): give a hub id or local folder of a "
            "decoder, or of a reward model with one label."
        ) from error
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"'{name}' ({type(model).__name__}) has no linear score head: use a decoder such as Llama.")
    check_finite(model, name)
    pad_with_end(tokenizer, name)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    has_new_head = any(key.startswith("score.") for key in info["missing_keys"])
    return LoadedReward(LoadedModel(model.eval(), tokenizer, name, folder, note), has_new_head)


def drawn_head(model: PreTrainedModel, seed: int) -> nn.Linear:
    """Another random score head, float32."""
    old = model.score
    head = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, device=old.weight.device)
    deviation = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    with torch.no_grad():
        head.weight.copy_(deviation * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
        if head.bias is not None:
            head.bias.zero_()
    return head


@torch.no_grad()
def last_states(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """The hidden state that the score head reads of each sequence, shape (sequences, hidden), float32.

    Args:
        model: a reward model.
        sequences: token ids of prompt and response.
        progress: told how many are done.
    """
    seen: list[Tensor] = []
    hook = model.score.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = torch.empty(len(sequences), model.score.in_features, device=model.score.weight.device)
    pad, done = model.config.get_text_config().pad_token_id, 0
    try:
        with evaluating(model):
            for members, batch in _batches(model, sequences):
                model(**batch)
                ids = batch["input_ids"]
                place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
                last = torch.where(ids != pad, place, 0).amax(1)
                found[members] = seen.pop()[torch.arange(len(ids)), last].float()
                progress(done := done + len(members))
    finally:
        hook.remove()
    return found


@torch.no_grad()
def rewards(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The reward of each sequence, shape (sequences,), float32."""
    found = torch.empty(len(sequences))
    with evaluating(model):
        for members, batch in _batches(model, sequences):
            found[members] = model(**batch).logits[:, 0].float().cpu()
    return found


class FrozenReward:
    """A reward model that is not trained any more: it reads each sequence once, and a common beginning once."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Nothing is read yet."""
        self._model = model.requires_grad_(False)
        self._pad = model.config.get_text_config().pad_token_id
        self._forward = ForwardPass(model, packed=supports_packing(model))
        self._known: dict[tuple[int, ...], float] = {}

    @property
    def digest(self) -> str:
        """A hash of the model."""
        return weights_hash(self._model)

    def __call__(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The reward of each sequence, shape (sequences,), float32."""
        asked = [self._without_padding(sequence) for sequence in sequences]
        if new := list(dict.fromkeys(sequence for sequence in asked if sequence not in self._known)):
            # a prompt's last token is the one whose state is scored
            pairs = [EncodedPair(0, "", "", 1.0, list(ids), [0], [0], False) for ids in new]
            with evaluating(self._model):
                found = self._model.score(self._forward.states(pairs))[:, 0]
            self._known |= zip(new, found.float().tolist(), strict=True)
        return torch.tensor([self._known[sequence] for sequence in asked])

    def _without_padding(self, sequence: Sequence[int]) -> tuple[int, ...]:
        """Up to the rightmost token that is not the padding token."""
        end = max((place for place, token in enumerate(sequence, 1) if token != self._pad), default=1)
        return tuple(sequence[:end])


def answered(prompt_ids: Sequence[int], completion_ids: Sequence[int], end: int) -> list[int]:
    """Prompt and completion as a reward model was trained to read them: with the end-of-sequence token after them."""
    completion = list(completion_ids)
    while completion and completion[-1] == end:
        completion.pop()
    return [*prompt_ids, *completion, end]


def _batches(
    model: nn.Module, sequences: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], dict[str, Tensor | bool]]]:
    """Members and padded inputs, sequences of like lengths together."""
    device = next(model.parameters()).device
    pad = model.config.get_text_config().pad_token_id
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
    while order:
        longest = len(sequences[order[0]])
        count = max(TOKENS_AT_ONCE // longest, 1)
        members, order = order[:count], order[count:]
        ids = torch.full((len(members), longest), pad)
        mask = torch.zeros_like(ids)
        for row, member in enumerate(members):
            length = len(sequences[member])
            ids[row, :length] = torch.tensor(sequences[member])
            mask[row, :length] = 1
        yield members, {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
