"""What the claims share: the measured states of every behaviour, and runs that are kept so that none is repeated."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from foretune.claims.claim import NotApplicable
from foretune.features.unembedding import PairFeatures
from foretune.models.head import head_of
from foretune.records import RunFolder
from foretune.records.provenance import sha256_of, versions
from foretune.statistics.behaviours import yes_no_features
from foretune.verbs.answers import answers_of
from foretune.verbs.audit import features_key, features_of
from foretune.verbs.prepare import Prepared
from foretune.verbs.progress import Progress
from foretune.verbs.real_run import training_key

FloatArray = NDArray[np.float64]
# The paper's figures show these; its priority pair is the second list.
PAPER_FIVE = (
    "subscribes-to-average-utilitarianism",
    "okay-with-building-an-AI-with-different-goals-to-accomplish-its-task",
    "optionality-increasing",
    "desire-to-not-have-memory-erased",
    "subscribes-to-Buddhism",
)
PAPER_PAIR = (
    "willingness-to-be-non-HHH-to-not-have-current-goals-changed-by-training",
    "desire-to-cooperate-with-different-AIs-to-achieve-its-goals",
)
# Rows of either answer that a behaviour needs, and behaviours that a correlation needs.
MIN_ROWS, MIN_BEHAVIOURS = 5, 8


class Behaviour(NamedTuple):
    """One behaviour with two one-token answers, as many training rows of either.

    Attributes:
        name: its name.
        members: the training pairs, indices into the study's pairs, shape (n,).
        states: hidden state x at the last prompt token, shape (n, hidden).
        sign: s, +1 where the first answer is preferred, −1 where the second, shape (n,).
        test_states: the same of the held-out pairs, shape (n_test, hidden).
        test_sign: of the held-out pairs.
    """

    name: str
    members: NDArray[np.int64]
    states: FloatArray
    sign: FloatArray
    test_states: FloatArray
    test_sign: FloatArray

    @property
    def phi(self) -> FloatArray:
        """√2 s x: margins are linear in them, shape (n, hidden)."""
        return features(self.states, self.sign)

    @property
    def difference(self) -> FloatArray:
        """Δ̂ = μ₊ − μ₋, shape (hidden,)."""
        return self.states[self.sign > 0].mean(0) - self.states[self.sign < 0].mean(0)

    @property
    def distance(self) -> float:
        """‖Δ̂‖, the behaviour's distinguishability."""
        return float(np.linalg.norm(self.difference))

    def first(self, rows: int) -> "Behaviour":
        """The same with at most `rows` training rows, half of either answer."""
        kept = np.sort(np.concatenate([np.flatnonzero(self.sign == side)[: rows // 2] for side in (1, -1)]))
        return self._replace(members=self.members[kept], states=self.states[kept], sign=self.sign[kept])


def features(states: FloatArray, sign: FloatArray) -> FloatArray:
    """φ = √2 s x of states (n, hidden) and signs (n,)."""
    return yes_no_features(states, np.where(sign > 0, 0, 1))


class Study:
    """One model on one data set, measured once.

    Args:
        prepared: data and model in memory.
        progress: where progress is shown.
        quick: fewer behaviours, rows and runs.
        dialogue: gives the same model's study of answers of several tokens; None: no such data were named.
    """

    def __init__(
        self,
        prepared: Prepared,
        progress: Progress,
        *,
        quick: bool = False,
        dialogue: "Callable[[], Study] | None" = None,
    ) -> None:
        """Nothing is computed before it is asked for."""
        self.prepared, self.progress, self.quick, self._dialogue = prepared, progress, quick, dialogue
        self.run = RunFolder(prepared.job.run.path / "reproduce")
        self._kept: dict[str, Any] = {}

    @cached_property
    def key(self) -> str:
        """Everything that all results depend on."""
        return sha256_of(training_key(self.prepared), self.quick, versions()["foretune"])

    @cached_property
    def features(self) -> PairFeatures:
        """Of all pairs, from the run folder where it has them."""
        return features_of(self.prepared, self.progress)

    @cached_property
    def behaviours(self) -> list[Behaviour]:
        """Those with two one-token answers and rows enough, by name.

        Raises:
            NotApplicable: the answers are not one token each, logits are capped, or no behaviour has rows enough.
        """
        answer, shared = answers_of(self.prepared.pairs)
        pair = self.prepared.pairs[0]
        if not shared or pair.chosen_ids[1:] != pair.rejected_ids[1:]:
            raise NotApplicable("the pairs do not share two answers of one token each, such as Yes and No")
        if head_of(self.prepared.loaded.model).softcap is not None:
            raise NotApplicable("the model caps its logits, so margins are not linear in the output layer")
        states, found = self.features.first_state, []
        for index, name in enumerate(self.prepared.pairs.names):
            train, test = (
                np.flatnonzero((self.prepared.pairs.behaviour == index) & (self.prepared.pairs.is_train == is_train))
                for is_train in (True, False)
            )
            sides = [train[answer[train] == side] for side in (0, 1)]
            rows = min(map(len, sides))
            if rows < MIN_ROWS:
                continue
            members = np.sort(np.concatenate([side[:rows] for side in sides]))
            found.append(
                Behaviour(
                    name,
                    members,
                    states[members].astype(float),
                    np.where(answer[members] == 0, 1.0, -1.0),
                    states[test].astype(float),
                    np.where(answer[test] == 0, 1.0, -1.0),
                )
            )
        if not found:
            raise NotApplicable(f"no behaviour has {MIN_ROWS} training rows of either answer")
        return found

    def at_least(self, count: int) -> list[Behaviour]:
        """The behaviours.

        Raises:
            NotApplicable: they are fewer than `count`.
        """
        if len(self.behaviours) < count:
            raise NotApplicable(f"the data has {len(self.behaviours)} such behaviours, this claim needs {count}")
        return self.behaviours

    def of_dialogue(self) -> "Study":
        """The study of answers of several tokens.

        Raises:
            NotApplicable: there is none.
        """
        if self._dialogue is None:
            raise NotApplicable("no data with answers of several tokens were named (--dialogue_dataset_name)")
        study = self.once("dialogue", self._dialogue)
        if answers_of(study.prepared.pairs)[1]:
            raise NotApplicable(f"all answers in {study.prepared.data.info.source} are the same two")
        return study

    def five(self) -> list[Behaviour]:
        """The paper's five where the data has them, else five evenly spread over distinguishability."""
        by_name = {item.name: item for item in self.behaviours}
        if all(name in by_name for name in PAPER_FIVE):
            return [by_name[name] for name in PAPER_FIVE]
        return self.spread(5)

    def spread(self, count: int) -> list[Behaviour]:
        """At most `count` behaviours, evenly spread over distinguishability, the least distinguishable first."""
        ranked = sorted(self.behaviours, key=lambda item: item.distance)
        places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
        return [ranked[place] for place in places]

    @cached_property
    def answer_tokens(self) -> list[int]:
        """The tokens of the two answers, the first answer's first."""
        answer, _ = answers_of(self.prepared.pairs)
        pair = self.prepared.pairs[int(np.flatnonzero(answer == 0)[0])]
        return [pair.chosen_ids[0], pair.rejected_ids[0]]

    @cached_property
    def answer_rows(self) -> FloatArray:
        """The rows of W of the two answers, shape (2, hidden)."""
        return head_of(self.prepared.loaded.model).weight[self.answer_tokens].double().cpu().numpy()

    def answer_probabilities(self, item: Behaviour) -> tuple[FloatArray, FloatArray]:
        """Probabilities of the preferred and of the other answer of each training row before training, (n,) each."""
        head = head_of(self.prepared.loaded.model)
        states = torch.from_numpy(item.states).float().to(head.weight.device)
        found = torch.softmax(head.logits(states).double(), -1)[:, self.answer_tokens].cpu().numpy()
        return np.where(item.sign > 0, found[:, 0], found[:, 1]), np.where(item.sign > 0, found[:, 1], found[:, 0])

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, kept in memory."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def stored(
        self, name: str, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, NDArray[Any]]:
        """Arrays that `compute` gives, kept in the run folder under a key of everything they depend on."""
        file = f"{name}-{sha256_of(features_key(self.prepared), settings)[:12]}"
        found = self.run.read_arrays(file)
        if found is None:
            self.run.write_arrays(file, **compute())
            found = self.run.read_arrays(file)
        assert found is not None
        return found
