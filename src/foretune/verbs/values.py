"""Values of arguments: typed as flags are, wherever they come from.

A configuration file gives `1e-3` as text, Python gives NumPy's numbers; what is wrong is said before any work.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from enum import Enum
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

from foretune.errors import UserError
from foretune.verbs.arguments import SharedArguments
from foretune.verbs.bounds import check_bounds

TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")  # what TRL's flags take
# Texts by annotation, which TRL's trainers also take as true or false.
SWITCHES = {"fsdp", "resume_from_checkpoint"}


def checked(kinds: Sequence[type], said: Mapping[str, Any]) -> dict[str, Any]:
    """What was said of the arguments of TRL's and our dataclasses `kinds`, typed.

    Raises:
        UserError: an argument that none of them has, a value of another type, or one out of its bounds.
    """
    refuse_unknown(said, kinds)
    found = typed(kinds, said)
    check_bounds(found)
    return found


def refuse_unknown(names: Collection[str], kinds: Sequence[type]) -> None:
    """Refuse arguments that none of the dataclasses `kinds` has.

    Raises:
        UserError: such a name, with the nearest that there is.
    """
    known = {item.name for kind in kinds for item in fields(kind)}
    if unknown := sorted(set(names) - known):
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `foretune forecast --help` lists what there is."
        raise UserError(f"unknown argument {unknown[0]}{hint}")


def typed(kinds: Sequence[type], said: Mapping[str, Any]) -> dict[str, Any]:
    """The same values by the dataclasses' annotations: numbers, texts, true or false, lists of these.

    Texts are read as flags are, and one value is a list of one. What is annotated otherwise (a mapping, one of several
    types) is left alone: TRL reads it.

    Raises:
        UserError: a value that cannot be read so, or, of our own arguments, one that is no choice.
    """
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    found = {name: value if name in SWITCHES else _typed(name, value, hints[name]) for name, value in said.items()}
    for item in (item for kind in kinds if issubclass(kind, SharedArguments) for item in fields(kind)):
        value, choices = found.get(item.name), item.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise UserError(f"{item.name} '{value}' is none of {', '.join(choices)}.")
    return found


def _typed(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        return value if value is None or len(kinds) > 1 else _typed(name, value, kinds[0])
    if hint in READERS:
        return _read(name, value, hint)
    if get_origin(hint) is list and get_args(hint)[0] in READERS:
        values = value.tolist() if isinstance(value, np.ndarray) else value
        values = values if isinstance(values, list | tuple) else [values]
        return [_read(name, item, get_args(hint)[0]) for item in values]
    return value


def _read(name: str, value: Any, kind: type) -> Any:
    reader, needed = READERS[kind]
    try:
        return reader(value)
    except (ValueError, OverflowError):
        raise UserError(f"{name} is {value!r}: {needed} is needed.") from None


def _whole(value: Any) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, str | Real):
        raise ValueError
    if not isinstance(value, str | Integral) and not float(value).is_integer():
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, str | Real):
        raise ValueError
    return float(value)


def _truth(value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if not isinstance(value, str | Integral) or str(value).lower() not in TRUE + FALSE:
        raise ValueError
    return str(value).lower() in TRUE


def _text(value: Any) -> Any:
    if isinstance(value, Enum | torch.dtype):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool) or not isinstance(value, str | Integral):
        raise ValueError
    return str(value)


READERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
    bool: (_truth, "true or false"),
    str: (_text, "a text"),
}
