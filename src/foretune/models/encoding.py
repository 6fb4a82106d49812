"""Turn preference rows into token ids exactly as TRL 1.16's `DPOTrainer` does (its `_prepare_dataset` and collator)."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from foretune.errors import UserError, first_line

# Characters of a row that a message shows.
SHOWN = 120


class Tree(Protocol):
    """A prompt and responses to it, in token ids."""

    @property
    def prompt_ids(self) -> list[int]:
        """What all responses begin with."""
        ...

    @property
    def responses(self) -> Sequence[list[int]]:
        """Of a pair: chosen, rejected."""
        ...

    @property
    def per_token(self) -> bool:
        """Whether scores are means over a response's tokens instead of sums."""
        ...


class EncodedPair(NamedTuple):
    """One preference pair in token ids, truncated as in training.

    `prompt_ids` are what chosen and rejected have in common according to TRL: the beginning of the encoded prompt
    that both encoded conversations keep. `per_token`: its scores are means over a response's tokens instead of sums.
    """

    pair_id: int
    behaviour: str
    split: str
    weight: float
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    truncated: bool
    per_token: bool = False

    @property
    def responses(self) -> tuple[list[int], list[int]]:
        """Chosen and rejected."""
        return self.chosen_ids, self.rejected_ids


class EncodedRanking(NamedTuple):
    """Responses to one prompt in token ids, best first."""

    prompt_ids: list[int]
    responses: list[list[int]]
    per_token: bool = False


class Lost(NamedTuple):
    """How many pairs were lost or cut, per (behaviour, split)."""

    too_long: Counter[tuple[str, str]]
    promptless: Counter[tuple[str, str]]
    truncated: Counter[tuple[str, str]]

    @classmethod
    def nothing(cls) -> "Lost":
        """Counts of zero."""
        return cls(Counter(), Counter(), Counter())


def encode_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Token ids of prompt, chosen and rejected, not truncated: see `encode_responses`."""
    prompt, (chosen, rejected) = encode_responses(row, [row["chosen"], row["rejected"]], tokenizer)
    return prompt, chosen, rejected


def encode_responses(
    row: Mapping[str, Any], responses: Sequence[Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a row's prompt and of responses to it, not truncated.

    Strings get the end-of-sequence token appended unless they end with it; conversations go through the chat template
    (with the generation prompt after the prompt). An empty response, the one that an unpaired row lacks, has no tokens.
    The prompt is cut where its encoding stops being a prefix of all
    encoded sequences, because tokens may merge across the border.

    Raises:
        UserError: a conversation that the chat template cannot render.
    """
    present = [response for response in responses if response]
    if isinstance(row["prompt"], str):
        eos = tokenizer.eos_token or ""
        answers = [text if text.endswith(eos) else text + eos for text in present]
        prompt = tokenizer(text=row["prompt"])["input_ids"]
        whole = [tokenizer(text=row["prompt"] + answer)["input_ids"] for answer in answers]
    else:
        tools = row.get("tools")
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        }
        prompt = _template(tokenizer, row["prompt"], add_generation_prompt=True, **options)
        whole = [_template(tokenizer, row["prompt"] + response, **options) for response in present]
    shared = min(_common_prefix(prompt, ids) for ids in whole)
    encoded = iter(ids[shared:] for ids in whole)
    return prompt[:shared], [next(encoded) if response else [] for response in responses]


def encode_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt that something will be generated after, as TRL's online trainers encode it."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    return _template(tokenizer, prompt, add_generation_prompt=True)


def encode(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str,
    max_length: int | None,
    context: int | None = None,
    lost: Lost | None = None,
) -> Iterator[EncodedPair]:
    """The pairs that training will see, in their order, one by one; of a ranking, its contrasts.

    A row whose prompt alone fills `max_length` is dropped, as TRL does; so is a row whose prompt leaves no token of its
    own, because all of it merges with the responses.

    Args:
        rows: mappings with prompt, chosen, rejected, pair_id, behaviour, weight; consecutive ones with the same
            `ranking`, if they have one, share prompt and rejected, and are kept or dropped together.
        tokenizer: the model's tokenizer.
        split: name given to these pairs.
        max_length: tokens kept of prompt plus response (the end is cut); None keeps all.
        context: positions that the model has; rows beyond it are treated in the same way.
        lost: where to count what was dropped or cut.
    """
    limits = [limit for limit in (max_length, context) if limit]
    limit = min(limits) if limits else None
    lost = lost or Lost.nothing()
    for _, unit in groupby(rows, _unit):
        contrasts = list(unit)
        row = contrasts[-1]
        prompt, responses = encode_responses(row, [own["chosen"] for own in contrasts] + [row["rejected"]], tokenizer)
        group = (row["behaviour"], split)
        if limit is not None and len(prompt) >= limit:
            lost.too_long[group] += 1
            continue
        if not prompt:  # nothing would predict the first response token
            lost.promptless[group] += 1
            continue
        room = None if limit is None else limit - len(prompt)
        if room is not None and max(map(len, responses)) > room:
            lost.truncated[group] += 1
        rejected = responses[-1]
        for own, chosen in zip(contrasts, responses, strict=False):
            cut = room is not None and max(len(chosen), len(rejected)) > room
            ids = prompt, chosen[:room], rejected[:room]
            yield EncodedPair(own["pair_id"], *group, float(own["weight"]), *ids, cut)


def _unit(row: Mapping[str, Any]) -> tuple[bool, int]:
    """What rows are kept or dropped with: the contrasts of a ranking, or a pair by itself."""
    ranking = row.get("ranking")
    return (False, row["pair_id"]) if ranking is None else (True, ranking)


def encode_rankings(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> Iterator[tuple[EncodedRanking, list[Mapping[str, Any]]]]:
    """The rankings of rows that are their contrasts, encoded in the same way, each with its rows."""
    for _, unit in groupby(rows, lambda row: row["ranking"]):
        contrasts = list(unit)
        kept = list(encode(contrasts, tokenizer, split="", max_length=max_length))
        if kept:
            responses = [pair.chosen_ids for pair in kept] + [kept[-1].rejected_ids]
            yield EncodedRanking(kept[0].prompt_ids, responses), contrasts


def _template(tokenizer: PreTrainedTokenizerBase, messages: list, **options: Any) -> list[int]:
    if not tokenizer.chat_template and not options.get("chat_template"):
        raise UserError(
            f"the rows are conversations, and the tokenizer of '{tokenizer.name_or_path}' has no chat template: "
            "take an instruct model, or give prompt, chosen and rejected as text."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
    except (TemplateError, TypeError, ValueError) as error:
        row = str(messages)
        raise UserError(
            f"the chat template of '{tokenizer.name_or_path}' refuses a conversation ({first_line(error)}): change "
            f"the row that begins with {row if len(row) <= SHOWN else row[:SHOWN] + '…'}, or take another model."
        ) from error


def _common_prefix(left: list[int], right: list[int]) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
