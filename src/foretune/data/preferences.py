"""Load preference data: one call from a name to the training and held-out rows and an account of both."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from foretune.data.accounts import TEST, TRAIN, Account
from foretune.data.behaviours import BEHAVIOUR_COLUMNS, choose_naming
from foretune.data.formats import PERSONA
from foretune.data.pairs import Pairs
from foretune.data.rankings import ORDERS
from foretune.data.rows import RowReader, check_left, check_weight_column, common_format
from foretune.data.sources import Part, Source, read_source
from foretune.data.splits import held_out_prompts, limit_pairs
from foretune.data.tables import EXTRAS, columns_of
from foretune.errors import UserError

if TYPE_CHECKING:
    import datasets

FORMAT_COLUMNS = (
    *("prompt", "chosen", "rejected", "question", "matching", "not_matching"),
    *("statement", "answer_matching_behavior", "answer_not_matching_behavior", "conversations"),
    *("instruction", "responses", "completions", "ranking", *ORDERS, "completion", "label"),
)
Splits = dict[str, Pairs]


@dataclass(frozen=True)
class DataInfo:
    """What was loaded and what became of its rows.

    Attributes:
        source: the name that was loaded, with its configuration.
        format: "preference", "implicit prompt", "hh dialogue", "persona statements", "sharegpt", "ranking" or
            "unpaired".
        behaviour_column: the column that names behaviours; "file" when file names do; None when all rows are one
            behaviour, called "everything".
        behaviours: the names of those with rows, sorted.
        counts: one row per behaviour and split; read = kept + empty + identical + malformed + leaked + surplus, and
            `duplicates` of the kept ones occur before. Rows dropped before a split is made count as "train".
        notes: full sentences for the user.
    """

    source: str
    format: str
    behaviour_column: str | None
    behaviours: list[str]
    counts: list[dict[str, Any]]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain JSON values."""
        return asdict(self)


class PreferenceData(NamedTuple):
    """Rows to train on and held-out rows.

    Columns: pair_id (int64), prompt, chosen, rejected (text, or lists of messages), behaviour (text), weight (float64);
    `tools` (JSON text), `chat_template_kwargs` and `margin` (float64, as of TRL's reward models; null where it is no
    number) where the data has them. `test` is None when no row is held out. Of unpaired rows
    chosen or rejected is empty.
    """

    train: "datasets.Dataset"
    test: "datasets.Dataset | None"
    info: DataInfo


def load_preferences(
    dataset_name: str,
    *,
    dataset_config: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    behaviour_column: str | None = None,
    weight_column: str = "weight",
    test_fraction: float = 0.2,
    max_pairs_per_behaviour: int | None = None,
    behaviours: list[str] | None = None,
    seed: int = 0,
) -> PreferenceData:
    """Load preference pairs from a file, a folder, a saved data set, the hub or the bundled data.

    Args:
        dataset_name: "bundled:statements", "bundled:free_text", a path, or a name on the hub.
        dataset_config: the configuration of a hub data set.
        train_split: name of the split to train on, where the source has splits.
        test_split: name of the held-out split; when the source has none, one is made.
        behaviour_column: the column that names each row's behaviour ("file": the file's name); None looks for one.
        weight_column: column of row weights; rows without one weigh 1.
        test_fraction: share of each behaviour's prompts to hold out, in [0, 1); 0 makes no held-out split.
        max_pairs_per_behaviour: keep at most so many training rows per behaviour, and `test_fraction` as many test rows
            (at least one).
        behaviours: load only these; None or an empty list loads all.
        seed: changes which prompts are held out and which rows are kept under a limit.

    Raises:
        UserError: anything about the data or the options that foretune cannot work with, in one sentence.
    """
    _check_options(train_split, test_split, test_fraction, max_pairs_per_behaviour)
    wanted = {*FORMAT_COLUMNS, *BEHAVIOUR_COLUMNS, *EXTRAS, weight_column, behaviour_column or ""}
    source = read_source(dataset_name, config=dataset_config, split_names=(train_split, test_split), wanted=wanted)
    notes = list(source.notes)
    raw = _choose_splits(source, dataset_name, train_split, test_split)
    parts = [part for split in raw.values() for part in split]
    check_weight_column(parts, weight_column)
    format = common_format(parts)
    naming = choose_naming(parts, column=behaviour_column, is_persona=format == PERSONA)
    account = Account()
    reader = RowReader(
        format=format,
        naming=naming,
        weight_column=weight_column,
        behaviours=behaviours or None,
        account=account,
        seed=seed,
    )
    pairs = {split: reader.read(split_parts, split) for split, split_parts in raw.items()}
    check_left(pairs[TRAIN], reader=reader, behaviours=behaviours, account=account)
    pairs = _hold_out(pairs, account, test_fraction=test_fraction)
    if max_pairs_per_behaviour is not None:
        pairs = _limit(pairs, account, limit=max_pairs_per_behaviour, test_fraction=test_fraction, seed=seed)
    _count_kept(pairs, account)
    notes += naming.notes
    notes += _notes(source, pairs, reader, account, test_split=test_split, weight_column=weight_column)
    info = DataInfo(
        source=dataset_name if dataset_config is None else f"{dataset_name} ({dataset_config})",
        format=format,
        behaviour_column=naming.column,
        behaviours=account.behaviours(),
        counts=account.rows(),
        notes=notes,
    )
    return PreferenceData(*_tables(reader.table.finish(), pairs), info)


def _check_options(train_split: str, test_split: str, test_fraction: float, limit: int | None) -> None:
    if train_split == test_split:
        raise UserError(f"the train and test splits are both '{train_split}'; pass another --dataset_test_split.")
    if not 0 <= test_fraction < 1:
        raise UserError(f"--test_fraction is {test_fraction}; it must be at least 0 and less than 1.")
    if limit is not None and limit < 1:
        raise UserError(f"--max_pairs_per_behaviour is {limit}; it must be at least 1.")


def _choose_splits(source: Source, name: str, train_split: str, test_split: str) -> dict[str, list[Part]]:
    splits = source.splits
    if None in splits:
        chosen = {TRAIN: splits[None]}
    elif train_split not in splits:
        found = ", ".join(str(split) for split in splits)
        raise UserError(f"no split '{train_split}' in {name}: found {found}; pass one with --dataset_train_split.")
    else:
        chosen = {TRAIN: splits[train_split]} | ({TEST: splits[test_split]} if test_split in splits else {})
    # An empty file has no columns, so no format either.
    chosen = {split: [part for part in parts if part.columns] for split, parts in chosen.items()}
    if not chosen[TRAIN]:
        raise UserError(f"{name} has no rows; check the file and the split.")
    return chosen


def _hold_out(pairs: Splits, account: Account, *, test_fraction: float) -> Splits:
    """Make the test rows disjoint from the training rows by prompt; take some of the latter when there are none."""
    train = pairs[TRAIN]
    if TEST in pairs:
        leaked = np.isin(pairs[TEST].prompt_key, train.prompt_key)
        account.add_all(pairs[TEST][leaked], TEST, "leaked")
        return {TRAIN: train, TEST: pairs[TEST][~leaked]}
    if test_fraction == 0:
        return {TRAIN: train, TEST: train[:0]}
    is_test = np.isin(train.prompt_key, held_out_prompts(train, test_fraction=test_fraction))
    account.move_read(train[is_test])
    return {TRAIN: train[~is_test], TEST: train[is_test]}


def _limit(pairs: Splits, account: Account, *, limit: int, test_fraction: float, seed: int) -> Splits:
    limits = {TRAIN: limit, TEST: max(1, round(limit * test_fraction))}
    kept = {}
    for split, group in pairs.items():
        is_kept = limit_pairs(group, limit=limits[split], seed=seed)
        account.add_all(group[~is_kept], split, "surplus")
        kept[split] = group[is_kept]
    return kept


def _count_kept(pairs: Splits, account: Account) -> None:
    for split, group in pairs.items():
        repeated = np.ones(len(group), dtype=bool)
        repeated[np.unique(group.key, return_index=True)[1]] = False
        account.add_all(group, split, "kept")
        account.add_all(group[repeated], split, "duplicates")


def _notes(
    source: Source, pairs: Splits, reader: RowReader, account: Account, *, test_split: str, weight_column: str
) -> list[str]:
    notes = []
    if None not in source.splits and test_split not in source.splits and pairs[TEST]:
        found = ", ".join(str(split) for split in source.splits)
        notes.append(f"No split '{test_split}' among {found}: held-out rows were taken from the training rows.")
    if account.total("leaked"):
        notes.append(f"{account.total('leaked')} test rows were dropped because their prompt is in the training rows.")
    if account.dropped():
        notes.append(f"Rows dropped: {account.dropped()}.")
    if account.first_malformed:
        notes.append(f"The first malformed row is {account.first_malformed}.")
    if reader.missing_weights:
        notes.append(f"{reader.missing_weights} rows have no value in column '{weight_column}' and weigh 1.")
    untrained = ", ".join(account.without_training())
    if untrained:
        notes.append(f"Without training rows, because all of them are held out: {untrained}.")
    if not pairs[TEST]:
        notes.append("No rows are held out.")
    return notes


def _tables(table: "datasets.Dataset", pairs: Splits) -> tuple["datasets.Dataset", "datasets.Dataset | None"]:
    """The kept rows of each split: two selections of one table, so that both sides have the same columns and types."""
    unit = "ranking" if "ranking" in table.column_names else "pair_id"
    ids = columns_of(table, [unit])[unit]
    order = np.argsort(ids, kind="stable")

    def rows(split: str) -> "datasets.Dataset":
        kept = pairs[split].pair_id
        first, stop = (np.searchsorted(ids, kept, side, sorter=order) for side in ("left", "right"))
        count = stop - first
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return table.select(order[np.repeat(first, count) + within])

    return rows(TRAIN), rows(TEST) if pairs[TEST] else None
