"""Which rows can be trained on: types, blanks, equal answers, weights."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from foretune.errors import UserError

# Arguments of chat templates that encoding itself gives, or that would change what it returns.
RESERVED = {
    *("conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}

# Sums and products of heavier row weights would overflow.
LARGEST_WEIGHT = 1e30


class Fault(NamedTuple):
    """Why a row is dropped; `kind` is "empty", "identical" or "malformed"."""

    kind: str
    reason: str


def pair_fault(prompt: Any, chosen: Any, rejected: Any) -> Fault | None:
    """Return why this prompt with its two answers cannot be used, or None when it can.

    All three must be text, or all three lists of messages `{"role": str, "content": str}`.
    """
    fields = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for name, value in fields.items():
        fault = value_fault(name, value)
        if fault:
            return fault
    kinds = {name: _kind(value) for name, value in fields.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        return Fault("malformed", told)
    if chosen == rejected:
        return Fault("identical", "chosen and rejected are the same")
    return None


def value_fault(name: str, value: Any) -> Fault | None:
    """Return why one field cannot be used: missing, blank, of a wrong type or with broken messages."""
    if value is None:
        return Fault("empty", f"{name} is missing")
    if isinstance(value, str):
        return _text_fault(name, value)
    if isinstance(value, list):
        return _conversation_fault(name, value)
    return Fault("malformed", f"{name} is {type(value).__name__}, neither text nor a list of messages")


def template_fault(extras: Mapping[str, Any]) -> Fault | None:
    """Return why the chat template of a conversation cannot take its `tools` or `chat_template_kwargs`, else None."""
    tools, arguments = extras.get("tools"), extras.get("chat_template_kwargs")
    if tools and not isinstance(_from_json(tools), list):
        told = "text that is no JSON list" if isinstance(tools, str) else type(tools).__name__
        return Fault("malformed", f"tools is {told}, neither a list nor one as JSON")
    if not arguments:
        return None
    if not isinstance(arguments, dict):
        return Fault("malformed", f"chat_template_kwargs is {type(arguments).__name__}, not an object")
    if taken := sorted(RESERVED & {name for name, value in arguments.items() if value is not None}):
        return Fault("malformed", f"chat_template_kwargs sets {taken[0]}, which encoding sets itself")
    return None


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None


def check_weight(value: Any, *, column: str, place: str) -> float | None:
    """Return a row's weight as a float, None where the row has none.

    Raises:
        UserError: the weight is not a number from 0 to `LARGEST_WEIGHT`.
    """
    if value is None or value == "":
        return None
    try:
        # bool is an int in Python, but a true/false column is hardly meant as weights.
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight <= LARGEST_WEIGHT:
        raise UserError(f"weight column '{column}' holds {value!r} in {place}; weights must be numbers from 0 to 1e30.")
    return weight


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "a conversation"


def _text_fault(name: str, text: str) -> Fault | None:
    if not text.strip():
        return Fault("empty", f"{name} is blank")
    if not is_encodable(text):
        return Fault("malformed", f"{name} holds half of a surrogate pair, which is no valid text")
    return None


def _conversation_fault(name: str, messages: list) -> Fault | None:
    for message in messages:
        reason = _message_fault(message)
        if reason:
            return Fault("malformed", f"a message of {name} {reason}")
    if not any(message.get("tool_calls") or (message.get("content") or "").strip() for message in messages):
        return Fault("empty", f"{name} is blank")
    return None


def _message_fault(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"is {type(message).__name__}, not an object with role and content"
    if not isinstance(message.get("role"), str):
        return "has no role"
    if not is_encodable(message["role"]):
        return "has half of a surrogate pair in its role, which is no valid text"
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return None
    if not isinstance(content, str):
        return f"has content of type {type(content).__name__}, not text"
    if not is_encodable(content):
        return "holds half of a surrogate pair, which is no valid text"
    return None


def is_encodable(text: str) -> bool:
    """Whether UTF-8 has this text: not where it holds half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
