"""What every verb needs first: data, model, and pairs encoded as training encodes them."""

import shutil
import time
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from foretune import processes
from foretune.data import PreferenceData
from foretune.data.formats import UNPAIRED
from foretune.data.tables import columns_of, opened_anew
from foretune.dynamics.relinearise import (
    MOST_PAIRS,
    NumPairs,
    affordable_interval,
    affordable_pairs,
    affordable_texts,
)
from foretune.errors import UserError
from foretune.memory import give_back
from foretune.models.encoding import Lost, encode
from foretune.models.load import LoadedModel, load_model, weights_hash
from foretune.models.pairs import EncodedPairs
from foretune.objectives import (
    Contrasts,
    LossOfPairs,
    Objective,
    RankingLoss,
    RankingObjective,
    SidedLoss,
    SidedObjective,
)
from foretune.records import RunFolder
from foretune.records.provenance import pairs_hash, sha256_of
from foretune.training.build import lora_config
from foretune.verbs.answers import answers_of
from foretune.verbs.job import Job
from foretune.verbs.losses import OF_RESPONSES, margin_loss


class Prepared(NamedTuple):
    """A job with its data and model in memory.

    Attributes:
        job: the job.
        data: preference rows as loaded.
        loaded: the reference model.
        pairs: encoded training pairs in their order, then the held-out ones.
        counts: the data's counts, completed by what encoding dropped and truncated.
        weights_sha256: hash of the reference weights, taken once: every stage's key depends on it.
        pairs_sha256: hash of the encoded pairs, taken once as well.
        observe_pairs: pairs of each behaviour and split that are measured along the run.
        twin_pairs: training pairs of each behaviour that the forecast's features are taken of.
        several_passes: features are taken anew on the way, so that the end can be looked at.
        sample: the pairs that the audit reads; None: all.
    """

    job: Job
    data: PreferenceData
    loaded: LoadedModel
    pairs: EncodedPairs
    counts: list[dict]
    weights_sha256: str
    pairs_sha256: str
    observe_pairs: int = MOST_PAIRS
    twin_pairs: int = MOST_PAIRS
    several_passes: bool = False
    sample: EncodedPairs | None = None

    @property
    def audited(self) -> "Prepared":
        """The same with no other pairs than those that the audit reads."""
        if self.sample is None:
            return self
        digest = sha256_of(self.pairs_sha256, len(self.sample))
        return self._replace(pairs=self.sample, pairs_sha256=digest, sample=None)

    @property
    def audited_places(self) -> np.ndarray:
        """Indices of the pairs that the audit reads."""
        return np.flatnonzero(np.isin(self.pairs.pair_id, self.audited.pairs.pair_id))

    def settled(self) -> "Prepared":
        """The same with what the arguments leave open: how many pairs are measured, and which ones the audit reads."""
        ours, few = self.job.ours, self._affordable_pairs()
        measured = ours.twin_pairs or few.measured
        settled = self._replace(
            observe_pairs=ours.observe_pairs or few.observed,
            twin_pairs=measured,
            several_passes=self._affords_passes(measured),
        )
        if ours.audit_pairs is None:
            return settled
        most = max(ours.audit_pairs, settled.observe_pairs, settled.twin_pairs)
        members = self._first(most, np.zeros(len(self.pairs)))
        return settled._replace(sample=EncodedPairs(self.pairs[int(index)] for index in members))

    def _affordable_pairs(self) -> NumPairs:
        """Of each behaviour and split, where features may be taken anew on the way."""
        job, most, sizes = self.job, NumPairs(MOST_PAIRS, MOST_PAIRS), self._group_sizes
        once = job.twin != "weight_space" or job.ours.relinearise_every == 0
        num_rows = job.num_steps(self.num_train_units) * job.rows_per_step
        pairs = most if once else affordable_pairs(num_rows, len(sizes))
        if job.twin == "output_layer" or not self._free_text:
            return pairs
        texts = affordable_texts(self._steps_left * job.rows_per_step / (1 + self._sided), sizes, once=once)
        wanted = max(job.ours.audit_pairs or texts, pairs.measured)  # a sample that is asked for is not enlarged
        return pairs._replace(measured=min(texts, wanted))

    def _affords_passes(self, measured: int) -> bool:
        """Whether features of so many pairs of each behaviour and split will be taken more than once."""
        job, ours = self.job, self.job.ours
        if ours.relinearise_every is not None or ours.relinearise_tolerance:
            return bool(ours.relinearise_every or ours.relinearise_tolerance)
        measured = (1 + self._sided) * int(np.minimum(self._group_sizes, measured).sum())
        passes = affordable_interval(self._steps_left, job.rows_per_step, measured) > 0
        return job.twin == "weight_space" and passes

    @property
    def _steps_left(self) -> int:
        """Optimiser steps after the pilot."""
        return round(self.job.num_steps(self.num_train_units) * (1 - self.job.ours.pilot_fraction))

    @property
    def _group_sizes(self) -> np.ndarray:
        """Pairs, or rankings, of each behaviour, held-out ones apart."""
        first = np.unique(self.units, return_index=True)[1]
        return np.unique((2 * self.pairs.behaviour + self.pairs.is_train)[first], return_counts=True)[1]

    @property
    def _free_text(self) -> bool:
        """Whether most training pairs are of behaviours that do not offer the same two answers each time."""
        return self.contrasts is None and float(np.mean(answers_of(self.pairs)[0][self.train_pairs] < 0)) > 0.5

    @property
    def _sided(self) -> bool:
        try:
            return isinstance(self.objective, SidedObjective)
        except UserError:  # trained all the same, not forecast
            return False

    @property
    def behaviour_of(self) -> np.ndarray:
        """Each pair's behaviour, shape (n,)."""
        return self.pairs.behaviour_of

    @property
    def split_of(self) -> np.ndarray:
        """Each pair's split, shape (n,)."""
        return self.pairs.split_of

    @property
    def train_pairs(self) -> np.ndarray:
        """Indices of the training pairs."""
        return np.flatnonzero(self.pairs.is_train)

    @property
    def unpaired(self) -> bool:
        """Whether rows have one response each, desirable or not: the margin of a row is its score, or less that."""
        return self.data.info.format == UNPAIRED

    @property
    def objective(self) -> Objective | SidedObjective | RankingObjective:
        """The job's loss, of margins where rows are unpaired.

        Raises:
            UserError: a loss that cannot be forecast.
        """
        found = self.job.objective()
        return margin_loss(found) if self.unpaired else found

    @property
    def contrasts(self) -> Contrasts | None:
        """Which pairs are the contrasts of one ranking; None: the data are pairs."""
        return contrasts_of(self.data, self.pairs)

    @property
    def units(self) -> np.ndarray:
        """An id a pair, equal for the contrasts of a ranking: what is held out, measured and weighted as one; (n,)."""
        found = self.contrasts
        if found is None:
            return self.pairs.pair_id
        owner = np.repeat(found.members[:, 0], (found.members >= 0).sum(1))
        return self.pairs.pair_id[owner]

    @property
    def num_train_units(self) -> int:
        """Training pairs, or rankings."""
        return len(np.unique(self.units[self.train_pairs]))

    @property
    def weights(self) -> np.ndarray:
        """Row weights, scaled to mean 1 over the training pairs, or rankings."""
        train, found = self.train_pairs, self.contrasts
        # scaled by a power of two, which is exact: the sum of the largest weights is beyond all floats
        weights = np.ldexp(self.pairs.weight, -np.frexp(self.pairs.weight.max())[1])
        mean = weights[train if found is None else train[found.within(train).members[:, 0]]].mean()
        if not mean > 0:
            raise UserError("all row weights are 0: at least one training row needs a weight above 0.")
        return weights / mean

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair's chosen and rejected response, shape (n, 2)."""
        return self.pairs.lengths[:, 1:]

    @property
    def observed(self) -> np.ndarray:
        """Indices of the pairs that are measured along the run: the first of each behaviour and split."""
        return self.representatives(self.observe_pairs)

    def representatives(self, count: int, *, split: str | None = None) -> np.ndarray:
        """Indices of the first `count` pairs (or rankings) of each behaviour and split, in the order of the audit.

        Those with the lowest ids where no audit of these pairs has given them an order.
        """
        table, rank = self.job.run.read_table("pairs", ["pair_id", "representative_rank"]), np.zeros(len(self.pairs))
        if table is not None and table.num_columns == 2 and np.array_equal(table["pair_id"], self.pairs.pair_id):
            rank = table["representative_rank"].to_numpy()
        return self._first(count, rank, split)

    def _first(self, count: int, rank: np.ndarray, split: str | None = None) -> np.ndarray:
        """Of each behaviour and split the `count` pairs of lowest rank (NaN last), then lowest ids; of one split."""
        pairs, units = self.pairs, self.units
        order = np.lexsort((units, rank, pairs.is_train, pairs.behaviour))
        group = 2 * pairs.behaviour[order].astype(np.int64) + pairs.is_train[order]
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        number = np.cumsum(np.diff(units[order], prepend=~units[order[:1]]) != 0)
        place = number - np.repeat(number[starts], np.diff([*starts, len(group)]))
        first = np.sort(order[place < count])
        return first if split is None else first[pairs.split_of[first] == split]

    def rows(self, split: str) -> Dataset | None:
        """The rows of `split` that encoding kept, as TRL takes them, in their order."""
        rows = self.data.train if split == "train" else self.data.test
        if rows is None:
            return None
        kept = self.pairs.pair_id[self.pairs.is_train == (split == "train")]
        return rows.select(np.flatnonzero(np.isin(columns_of(rows, ["pair_id"])["pair_id"], kept)))


def load_reference(job: Job, *, to_train: bool = False) -> LoadedModel:
    """The model of a job, frozen weights in the job's dtype; the trainer itself shards the one that it trains."""
    sharded = job.shards_parameters()
    loaded = load_model(
        str(job.model.model_name_or_path),
        dtype=job.dtype(),
        revision=job.model.model_revision,
        trust_remote_code=job.training.trust_remote_code,
        attn_implementation=job.model.attn_implementation,
        sharded=sharded and not to_train,
    )
    if sharded:
        return loaded
    return loaded._replace(model=loaded.model.to(job.device()))


def prepare(job: Job, *, loaded: LoadedModel | None = None) -> Prepared:
    """Load data and model (unless it is `loaded` already) and encode.

    Raises:
        UserError: no training pair is left.
    """
    processes.check_shared(job.run.path)
    if job.ours.restart:
        processes.on_main(lambda: discard(job.run))
    data = job.load_data()
    loaded = loaded or load_reference(job)
    if job.trainable == "lora":
        lora_config(job.model, loaded.model)  # refuse before any work
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    limits = {"max_length": job.training.max_length, "context": context}
    lost = Lost.nothing()
    parts = [
        encode(opened_anew(rows), loaded.tokenizer, split=split, lost=lost, **limits)
        for split, rows in (("train", data.train), ("test", data.test))
        if rows is not None
    ]
    pairs = EncodedPairs(chain.from_iterable(parts))
    del parts
    give_back()
    counts = []
    for row in data.info.counts:
        group = (row["behaviour"], row["split"])
        counts.append(
            {
                **row,
                "kept": row["kept"] - lost.too_long[group] - lost.promptless[group],
                "malformed": row["malformed"] + lost.promptless[group],
                "too_long": lost.too_long[group],
                "truncated": lost.truncated[group],
            }
        )
    if not pairs.is_train.any():
        raise UserError(f"no training pair is left of {len(data.train)}: {'; '.join(_why_lost(lost, limits))}.")
    return Prepared(job, data, loaded, pairs, counts, weights_hash(loaded.model), _data_hash(data, pairs)).settled()


def _why_lost(lost: Lost, limits: dict[str, int | None]) -> Iterator[str]:
    """What to do about training rows that encoding dropped."""
    too_long, merged = (
        sum(count for (_, split), count in own.items() if split == "train") for own in (lost.too_long, lost.promptless)
    )
    if too_long:
        room = min(filter(None, limits.values()))
        yield (
            f"the prompts of {too_long} fill the {room} tokens there are (raise --max_length or use a model with a "
            "longer context)"
        )
    if merged:
        yield (
            f"the prompts of {merged} are empty or merge with their responses into one token (put a space or a line "
            "break between them)"
        )


def contrasts_of(data: PreferenceData, pairs: EncodedPairs) -> Contrasts | None:
    """The rankings whose contrasts `pairs` are; None where they are pairs."""
    if "ranking" not in data.train.column_names:
        return None
    names = ["pair_id", "ranking", "chosen_rank", "rejected_rank"]
    parts = [columns_of(rows, names) for rows in (data.train, data.test) if rows is not None]
    ids, *columns = (np.concatenate([part[name] for part in parts]) for name in names)
    order = np.argsort(ids)
    place = order[np.searchsorted(ids, pairs.pair_id, sorter=order)]
    return Contrasts.of(*(column[place] for column in columns))


def _data_hash(data: PreferenceData, pairs: EncodedPairs) -> str:
    """Of the encoded pairs, and of the ranks that belong to them."""
    contrasts = contrasts_of(data, pairs)
    digest = pairs_hash(pairs)
    return digest if contrasts is None else sha256_of(digest, contrasts.ranks.tolist())


def discard(run: RunFolder) -> None:
    """Forget every stage of a run folder, and the training in it."""
    if run.stages:
        run.update_record(stages={}, revisions=[])
    for name in ("checkpoint-*", "observations", "rows", "pilot", "revisions"):
        for old in run.path.glob(name):
            shutil.rmtree(old, ignore_errors=True)


def template_hash(loaded: LoadedModel) -> str:
    """A hash of the chat template."""
    return sha256_of(loaded.tokenizer.chat_template)


def tokenizer_hash(loaded: LoadedModel) -> str:
    """A hash of vocabulary and special tokens."""
    return sha256_of(sorted(loaded.tokenizer.get_vocab().items()), loaded.tokenizer.special_tokens_map)


def loss_of_pairs(prepared: Prepared, objective: Objective | SidedObjective | RankingObjective) -> LossOfPairs:
    """The loss of the encoded pairs: of each by itself, or of those that are a ranking's together."""
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, SidedObjective):
        return SidedLoss(objective, len(prepared.pairs), prepared.job.losses[0] in OF_RESPONSES)
    contrasts = prepared.contrasts
    assert contrasts is not None, "data and loss go together since the data were loaded"
    return RankingLoss(objective, contrasts)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        """Start."""
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far, to a hundredth."""
        return round(time.perf_counter() - self._start, 2)
