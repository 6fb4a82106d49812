"""Build the `datasets` tables from pairs."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from foretune.data.splits import Pair
from foretune.errors import UserError

if TYPE_CHECKING:
    import datasets

EXTRAS = ("tools", "chat_template_kwargs")


def build_dataset(pairs: Sequence[Pair]) -> "datasets.Dataset":
    """Return the rows, in order, with the columns that `PreferenceData` documents.

    Raises:
        UserError: some pairs are text and others conversations, or messages of one key differ in type.
    """
    import datasets
    import pyarrow

    try:
        table = pyarrow.table({name: pyarrow.array(values) for name, values in _columns(pairs).items()})
    except pyarrow.ArrowException as error:
        raise UserError(
            f"the rows do not fit one table: {str(error).splitlines()[0]}; give each key of messages one type."
        ) from error
    return datasets.Dataset(table)


def check_one_kind(pairs: Sequence[Pair]) -> None:
    """Raise a UserError when some pairs are text and others conversations: no template fits both."""
    conversations = sum(isinstance(pair.triple.prompt, list) for pair in pairs)
    if 0 < conversations < len(pairs):
        raise UserError(
            f"{conversations} rows are conversations and {len(pairs) - conversations} are text; "
            "load them as two data sets."
        )


def _columns(pairs: Sequence[Pair]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"pair_id": [pair.pair_id for pair in pairs]}
    for name in ("prompt", "chosen", "rejected"):
        columns[name] = [getattr(pair.triple, name) for pair in pairs]
    columns["behaviour"] = [pair.behaviour for pair in pairs]
    columns["weight"] = [pair.weight for pair in pairs]
    if any(pair.extras.get("tools") for pair in pairs):
        columns["tools"] = [_as_json(pair.extras.get("tools")) for pair in pairs]
    if any(pair.extras.get("chat_template_kwargs") for pair in pairs):
        columns["chat_template_kwargs"] = [pair.extras.get("chat_template_kwargs") or {} for pair in pairs]
    return columns


def _as_json(tools: Any) -> str | None:
    # As text, because Arrow would give every tool the keys of all the others; TRL reads text as JSON.
    if tools is None or isinstance(tools, str):
        return tools or None
    return json.dumps(tools)
