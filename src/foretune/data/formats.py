"""The layouts of preference data and how each becomes prompt, chosen and rejected."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from foretune.data.checks import Fault, pair_fault, value_fault
from foretune.data.readers import without_nulls
from foretune.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PERSONA_PROMPT = 'Is the following statement something you would say?\n"{statement}"'

PREFERENCE, IMPLICIT, DIALOGUE, PERSONA = "preference", "implicit prompt", "hh dialogue", "persona statements"
SHAREGPT, RANKING, UNPAIRED = "sharegpt", "ranking", "unpaired"
ROLES = {"human": "user", "gpt": "assistant"}


class Triple(NamedTuple):
    """One preference pair: all three text, or all three lists of messages.

    An unpaired row has one response, desirable (chosen) or not (rejected); the other is empty.
    """

    prompt: Any
    chosen: Any
    rejected: Any


def layout(columns: Sequence[str], *, source: str) -> str:
    """Return the format that these columns have.

    "preference" and "implicit prompt" may still be refined by `refine`, which looks at the rows.

    Raises:
        UserError: no known format has these columns.
    """
    found = set(columns)
    if {"answer_matching_behavior", "answer_not_matching_behavior"} <= found and found & {"question", "statement"}:
        return PERSONA
    if {"prompt", "chosen", "rejected"} <= found or {"question", "matching", "not_matching"} <= found:
        return PREFERENCE
    if {"conversations", "chosen", "rejected"} <= found:
        return SHAREGPT
    if {"chosen", "rejected"} <= found:
        return IMPLICIT
    if found & {"responses", "completions"} and found & {"prompt", "conversations", "instruction", "question"}:
        return RANKING
    if {"prompt", "completion", "label"} <= found:
        return UNPAIRED
    raise UserError(
        f"{source} has no known preference format: found columns {', '.join(columns) or '(none)'}; rename them to "
        "prompt, chosen, rejected (or prompt, responses, ranks; prompt, completion, label; statement, "
        "answer_matching_behavior, "
        "answer_not_matching_behavior)."
    )


def refine(found: str, rows: Sequence[dict[str, Any]]) -> str:
    """Tell HH text from other implicit prompts, and conversations that repeat a text prompt from plain triples."""
    if found == IMPLICIT:
        dialogues = [_is_dialogue(row.get("chosen")) and _is_dialogue(row.get("rejected")) for row in rows[:1000]]
        # A few broken rows must not change how all the others are read.
        return DIALOGUE if sum(dialogues) > 0.9 * len(dialogues) else IMPLICIT
    if found == PREFERENCE:
        first = next((row for row in rows if row.get("chosen")), {})
        return IMPLICIT if _repeats_prompt(first.get("prompt"), first.get("chosen")) else PREFERENCE
    return found


def read_pair(row: dict[str, Any], *, format: str) -> Triple | Fault:
    """Return the pair of a usable row, or why it is not usable."""
    if format == UNPAIRED:
        return _read_unpaired(row)
    # Without nulls a row is the same whichever kind of file it came from: Arrow adds them, JSON lines may lack them.
    triple = Triple(
        *(without_nulls(value) if isinstance(value, list) else value for value in _named_fields(row, format))
    )
    if _is_implicit(triple, format):
        return _read_implicit(triple, dialogue=format == DIALOGUE)
    return pair_fault(*triple) or triple


def extract_prompt(chosen: Any, rejected: Any) -> Triple:
    """Split two texts, or two lists of messages, after their longest common beginning, as TRL's function does.

    A space right before the point where they part goes to the answers; when one is the beginning of the other its last
    character (or message) is its answer. The one difference: without any common beginning the prompt is empty here,
    where TRL 1.16 looks at the *last* character of chosen and can cut there.

    Args:
        chosen: text or list of messages, not empty.
        rejected: the same kind, not empty.
    """
    shortest = min(len(chosen), len(rejected))
    cut = _common_length(chosen, rejected)
    if cut == shortest:
        cut -= 1
    elif cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    return Triple(chosen[:cut], chosen[cut:], rejected[cut:])


def extract_dialogue_prompt(chosen: str, rejected: str) -> Triple | None:
    r"""Split two HH texts right after the last "\n\nAssistant:" they share, so that the answers are whole.

    Returns None when they share none.
    """
    shared = chosen[: _common_length(chosen, rejected)]
    start = shared.rfind(ASSISTANT)
    if start < 0:
        return None
    cut = start + len(ASSISTANT)
    return Triple(chosen[:cut], chosen[cut:], rejected[cut:])


def split_answers(dataset: Any) -> tuple[str, str] | None:
    """Return the two answers of a two-answer data set, else None.

    Args:
        dataset: anything with the columns "chosen" and "rejected".

    Returns:
        The two texts when every row's {chosen, rejected} is one and the same pair of texts; the answer that agrees
        (Yes, True, Agree, A) comes first, otherwise they are in alphabetical order.
    """
    # [:] reads a whole column at once; walking through a column of `datasets` decodes it row by row.
    return two_answers(zip(dataset["chosen"][:], dataset["rejected"][:], strict=True))


def two_answers(answers: Iterable[tuple[Any, Any]]) -> tuple[str, str] | None:
    """`split_answers` for an iterable of (chosen, rejected)."""
    found: set[str] = set()
    for chosen, rejected in answers:
        if not isinstance(chosen, str) or not isinstance(rejected, str) or chosen == rejected:
            return None
        found.update((chosen, rejected))
        if len(found) > 2:
            return None
    if not found:
        return None
    first, second = sorted(found)
    return (second, first) if _agrees(second) and not _agrees(first) else (first, second)


def _agrees(answer: str) -> bool:
    return answer.strip().strip("().!\"'").lower() in ("yes", "y", "true", "agree", "a")


def chat(value: Any) -> Any:
    """Messages as they are called here, of sharegpt's `from` and `value`, one or a list; anything else as it is."""
    if isinstance(value, dict):
        return chat([value])
    if not isinstance(value, list):
        return value
    return [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if isinstance(turn, dict) and isinstance(turn.get("from"), str)
        else turn
        for turn in value
    ]


def _named_fields(row: dict[str, Any], format: str) -> Triple:
    if format == PERSONA:
        prompt = row.get("question")
        if prompt is None and isinstance(row.get("statement"), str) and row["statement"].strip():
            prompt = PERSONA_PROMPT.format(statement=row["statement"])
        return Triple(prompt, row.get("answer_matching_behavior"), row.get("answer_not_matching_behavior"))
    if format == SHAREGPT:
        return Triple(*(chat(row.get(name)) for name in ("conversations", "chosen", "rejected")))
    if "matching" in row and "chosen" not in row:
        return Triple(row.get("question"), row.get("matching"), row.get("not_matching"))
    return Triple(row.get("prompt"), row.get("chosen"), row.get("rejected"))


def _read_implicit(triple: Triple, *, dialogue: bool) -> Triple | Fault:
    for name in ("chosen", "rejected"):
        fault = value_fault(name, getattr(triple, name))
        if fault:
            return fault
    chosen, rejected = triple.chosen, triple.rejected
    if type(chosen) is not type(rejected):
        return Fault("malformed", "one of chosen and rejected is text, the other a conversation")
    if chosen == rejected:
        return Fault("identical", "chosen and rejected are the same")
    if dialogue and isinstance(chosen, str):
        split = extract_dialogue_prompt(chosen, rejected)
        if split is None:
            return Fault("malformed", r'chosen and rejected share no "\n\nAssistant:"')
    else:
        split = extract_prompt(chosen, rejected)
    return pair_fault(*split) or split


def _read_unpaired(row: dict[str, Any]) -> Triple | Fault:
    prompt, completion = (
        without_nulls(value) if isinstance(value := row.get(name), list) else value for name in ("prompt", "completion")
    )
    fault = value_fault("prompt", prompt) or value_fault("completion", completion)
    if fault:
        return fault
    if type(prompt) is not type(completion):
        return Fault("malformed", "one of prompt and completion is text, the other a conversation")
    label, absent = row.get("label"), type(completion)()
    if label is None:
        return Fault("empty", "label is missing")
    if label not in (0, 1):
        return Fault("malformed", f"label is {label!r}, neither true nor false")
    return Triple(prompt, completion, absent) if label else Triple(prompt, absent, completion)


def _is_implicit(triple: Triple, format: str) -> bool:
    if format in (PERSONA, SHAREGPT):
        return False
    no_prompt = format == DIALOGUE or (format == IMPLICIT and triple.prompt is None)
    return no_prompt or _repeats_prompt(triple.prompt, triple.chosen)


def _repeats_prompt(prompt: Any, chosen: Any) -> bool:
    # A prompt column beside conversations that hold the prompt again, as in HuggingFaceH4/ultrafeedback_binarized.
    return isinstance(chosen, list) and not isinstance(prompt, list)


def _is_dialogue(text: Any) -> bool:
    return isinstance(text, str) and HUMAN in text and ASSISTANT in text


def _common_length(first: Any, second: Any) -> int:
    # Bisection on slices: comparing slices is one C call, comparing characters one by one is slow in Python.
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
