"""Rankings: K ≥ 2 responses to one prompt, and the layouts that say which is better."""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from foretune.data.checks import Fault, pair_fault
from foretune.data.formats import Triple, chat
from foretune.data.readers import without_nulls

# Columns that order responses; without any of them (or with `ranking: true`) they come best first.
ORDERS = ("ranks", "scores", "preferences")
PROMPTS = ("prompt", "conversations", "instruction", "question")
RESPONSES = ("responses", "completions")


class Ranking(NamedTuple):
    """Responses to one prompt, best first; all text, or all lists of messages.

    Attributes:
        prompt: text or a list of messages.
        responses: K of them.
        ranks: 1 for the best, 2 for the next best, …; equal where responses are tied.
    """

    prompt: Any
    responses: tuple[Any, ...]
    ranks: tuple[int, ...]

    def contrasts(self) -> list[Triple]:
        """Each response against the last one: every loss of a ranking is a function of these K − 1 margins."""
        return [Triple(self.prompt, response, self.responses[-1]) for response in self.responses[:-1]]


def read_ranking(row: dict[str, Any], columns: Collection[str]) -> Ranking | Fault:
    """Return the ranking of a usable row, or why it is not usable.

    Args:
        row: the prompt as `prompt`, `conversations` (sharegpt), `instruction` or `question`; `responses` or
            `completions`, a list of texts, messages, lists of messages, or objects with `response`; and one of `ranks`
            (1 = best), `scores` (higher is better; or `overall_score` in each completion) and `preferences` (a list of
            [better, worse], numbers of responses from 0).
        columns: of the whole file: a row without a value for a column that orders the others is not best first.
    """
    prompt = next((row[name] for name in PROMPTS if row.get(name) is not None), None)
    given = next((row[name] for name in RESPONSES if row.get(name) is not None), None)
    if given is None:
        return Fault("empty", "responses is missing")
    if not isinstance(given, list) or len(given) < 2:
        told = f"has {len(given)} entries" if isinstance(given, list) else f"is {type(given).__name__}, not a list"
        return Fault("malformed", f"responses {told}, and a ranking needs a list of at least 2")
    ranks = _ranks(row, given, columns)
    if isinstance(ranks, Fault):
        return ranks
    if len(set(ranks)) == 1:
        return Fault("malformed", f"all {len(given)} responses are tied")
    order = sorted(range(len(given)), key=lambda index: ranks[index])
    prompt = chat(without_nulls(prompt)) if isinstance(prompt, list) else prompt
    responses = tuple(_response(without_nulls(given[index]), prompt) for index in order)
    found = Ranking(prompt, responses, tuple(ranks[index] for index in order))
    faults = (pair_fault(prompt, better, worse) for better, worse in _couples(responses))
    return next((fault for fault in faults if fault), found)


def _couples(responses: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [(first, second) for place, first in enumerate(responses) for second in responses[place + 1 :]]


def _response(value: Any, prompt: Any) -> Any:
    """Text where the prompt is text, messages where it is messages."""
    if isinstance(value, dict) and not {"role", "from"} & set(value):
        value = value.get("response")
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return chat(value)
    return [{"role": "assistant", "content": value}] if isinstance(prompt, list) else value


def _ranks(row: dict[str, Any], given: list, columns: Collection[str]) -> list[int] | Fault:
    """Dense ranks of the responses in their order, 1 for the best."""
    said = {name: row[name] for name in ORDERS if row.get(name) is not None}
    scored = [isinstance(entry, dict) and entry.get("overall_score") is not None for entry in given]
    if any(scored) and not said:
        said = {"scores": [entry["overall_score"] if ok else None for entry, ok in zip(given, scored, strict=True)]}
    named = [name for name in ORDERS if name in columns]
    if len(said) > 1:
        return Fault("malformed", f"{' and '.join(said)} are given, and one of them must order the responses")
    if not said:
        if named:
            return Fault("empty", f"{' and '.join(named)} is missing")
        if row.get("ranking") is False:
            return Fault("malformed", "ranking is false, so that nothing orders the responses")
        return list(range(1, len(given) + 1))
    ((name, values),) = said.items()
    if name == "preferences":
        return _layers(values, len(given))
    if not isinstance(values, list) or len(values) != len(given):
        told = f"has {len(values)} entries" if isinstance(values, list) else f"is {type(values).__name__}"
        return Fault("malformed", f"{name} {told} for {len(given)} responses")
    if not all(_is_number(value) for value in values):
        return Fault("malformed", f"{name} holds {next(v for v in values if not _is_number(v))!r}, which is no number")
    levels: list[Any] = sorted(set(values), reverse=name == "scores")  # pyright: ignore
    return [levels.index(value) + 1 for value in values]


def _layers(preferences: Any, count: int) -> list[int] | Fault:
    """The fewest ranks that agree with all preferences: a response stands right below those that it lost to."""
    if not isinstance(preferences, list) or not all(_is_preference(pair, count) for pair in preferences):
        return Fault("malformed", f"preferences are no list of [better, worse] among {count} responses, from 0")
    lost_to = [{better for better, worse in preferences if worse == index} for index in range(count)]
    ranks, rank, left = [0] * count, 0, set(range(count))
    while left:
        free = {index for index in left if not lost_to[index] & left}
        if not free:
            return Fault("malformed", f"preferences among {len(left)} of the responses form a cycle")
        rank += 1
        for index in free:
            ranks[index] = rank
        left -= free
    return ranks


def _is_preference(pair: Any, count: int) -> bool:
    return (
        isinstance(pair, list) and len(pair) == 2 and all(type(index) is int and 0 <= index < count for index in pair)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
