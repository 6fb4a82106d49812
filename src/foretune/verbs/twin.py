"""The linearised twin of a job's run: where its features are taken, and what simulates it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers import set_seed

from foretune import processes
from foretune.dynamics.anchors import Anchors, anchor_store, read_anchor, write_anchor
from foretune.dynamics.simulated_run import MarginModel
from foretune.features.pair_gradients import trainable_names
from foretune.features.token_factors import adapted_layers, layers_alike, measure_factors, read_factors
from foretune.models.encoding import EncodedPair
from foretune.records.provenance import sha256_of
from foretune.training.build import lora_config
from foretune.verbs.audit import answers_of, features_key, features_of
from foretune.verbs.prepare import Prepared, load_reference
from foretune.verbs.progress import Progress


class Lineariser:
    """Takes the features of some pairs at any parameters of the model that the run will train.

    Args:
        prepared: the job, audited.
        progress: where bars are shown.

    Attributes:
        measured: the pairs that features are taken of, shape (m,): all that are observed, and `twin_pairs` training
            pairs of each behaviour.
        place: the measured pair that each pair is, or that stands for it: one of its behaviour and preferred answer.
        keys: of the features that were taken, by step.
    """

    def __init__(self, prepared: Prepared, progress: Progress) -> None:
        """Make the model as the trainer will make it; no features are taken yet."""
        self._prepared, self._progress = prepared, progress
        self.measured = measured_pairs(prepared)
        self.place = stand_ins(prepared, self.measured)
        self._model = adapted_model(prepared)
        self._layers = adapted_layers(self._model)
        self._names = trainable_names(self._model)
        self._start = {name: self._model.get_parameter(name).detach().clone() for name in self._names}
        self.keys: dict[int, str] = {}
        features = features_of(prepared, progress)
        self._reference = (features.chosen_logp - features.rejected_logp)[self.measured]

    @property
    def anchors(self) -> Anchors:
        """All features that were taken so far."""
        return Anchors(self._prepared.job.run.path, self.keys, self._model.device)

    def load(self, checkpoint: Path) -> None:
        """Give the model the adapters of a checkpoint."""
        set_peft_model_state_dict(self._model, load_peft_weights(str(checkpoint)))

    def at(self, step: int, parameters: Mapping[str, Tensor] | None = None) -> MarginModel:
        """Margins in first order around `parameters` (None: those that training starts from).

        Args:
            step: after which the run has these parameters; the shards are called so.
            parameters: of all that is trained, by name.
        """
        for name, value in (parameters or {}).items():
            self._model.get_parameter(name).data.copy_(value)
        anchor = {name: self._model.get_parameter(name).detach().float() for name in self._names}
        job = self._prepared.job
        key = sha256_of(
            features_key(self._prepared),
            self.measured.tolist(),
            job.ours.factor_rank,
            *(value.cpu().numpy().tobytes() for value in anchor.values()),
        )
        store, groups = anchor_store(job.run.path, step, key), layers_alike(self._model, self._layers)
        with self._progress.bar(f"features after step {step}", len(self.measured)) as advance:
            measure_factors(
                self._model,
                _Some(self._prepared.pairs, self.measured),
                self._layers,
                store,
                rank=job.ours.factor_rank,
                packed=bool(job.run.record["audit"]["probes"]["packed"]),
                progress=advance,
            )
        margin = read_factors(store, len(self.measured), len(groups)).margin
        if step == 0:
            self._reference = margin  # the adapters change nothing yet; another pass would round differently
        processes.on_main(lambda: write_anchor(store, anchor, margin - self._reference, self.place, groups))
        self.keys[step] = key
        return read_anchor(store, self._model.device)

    def leave(self) -> None:
        """Give somebody's model its parameters back."""
        for name, value in self._start.items():
            self._model.get_parameter(name).data.copy_(value)


def adapted_model(prepared: Prepared) -> torch.nn.Module:
    """The model as `build_trainer` makes it before the first step: the same adapters, drawn from the same seed."""
    job = prepared.job
    if hasattr(prepared.loaded.model, "peft_config"):  # of somebody's trainer
        return prepared.loaded.model
    model = load_reference(job, to_train=True).model
    set_seed(job.training.seed)
    return get_peft_model(model, lora_config(job.model, model))


def measured_pairs(prepared: Prepared) -> NDArray[np.int64]:
    """The pairs that features are taken of: all observed ones, and `twin_pairs` training pairs of each behaviour."""
    return np.union1d(prepared.observed, prepared.first_pairs(prepared.job.ours.twin_pairs, split="train"))


def stand_ins(
    prepared: Prepared, measured: NDArray[np.int64], draw: np.random.Generator | None = None
) -> NDArray[np.int64]:
    """For each pair the place in `measured` of itself, or of one with its behaviour and preferred answer.

    Those that stand for others take turns, or are drawn.
    """
    pairs, answer = prepared.pairs, answers_of(prepared)[0]
    place = np.full(len(pairs), -1)
    place[measured] = np.arange(len(measured))
    groups = np.stack([pairs.behaviour, answer, pairs.is_train], 1)
    for behaviour, preferred, is_train in np.unique(groups, axis=0):
        members = np.flatnonzero((groups == (behaviour, preferred, is_train)).all(1))
        missing, there = members[place[members] < 0], members[place[members] >= 0]
        if not len(there):  # a rare answer of which nothing was measured
            there = measured[pairs.behaviour[measured] == behaviour]
        turn = np.arange(len(missing)) % len(there) if draw is None else draw.integers(len(there), size=len(missing))
        place[missing] = np.searchsorted(measured, there[turn])
    return place


class _Some(Sequence[EncodedPair]):
    """Some of all pairs, read when they are asked for."""

    def __init__(self, pairs: Sequence[EncodedPair], members: NDArray[np.int64]) -> None:
        self._pairs, self._members = pairs, members

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._pairs[int(member)] for member in self._members[index]]
        return self._pairs[int(self._members[index])]
