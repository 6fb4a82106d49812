"""What a reward model is trained on: pairs encoded as TRL does it, and the hidden states of their last tokens."""

import copy
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foretune.dynamics.relinearise import MOST_PAIRS
from foretune.errors import UserError
from foretune.models.encoding import Lost, encode
from foretune.models.load import weights_hash
from foretune.models.pairs import EncodedPairs
from foretune.models.reward import last_states, load_reward_model
from foretune.objectives import BradleyTerry
from foretune.records.provenance import pairs_hash, sha256_of
from foretune.training.build import lora_config
from foretune.verbs.prepare import Prepared, discard
from foretune.verbs.progress import Progress
from foretune.verbs.reward_job import RewardJob


class RewardData(NamedTuple):
    """A job with its data, its model and the hidden states that its score head reads.

    Attributes:
        prepared: job, rows, encoded pairs and the reward model before training.
        sequences: token ids of chosen and rejected of each pair, prompt included.
        targets: the margin that each pair must exceed, shape (n,); None: the data have no margin column.
        states: of chosen and rejected of each pair, shape (n, 2, hidden), float32.
        key: everything that these depend on.
    """

    prepared: Prepared
    sequences: list[tuple[list[int], list[int]]]
    targets: NDArray[np.float64] | None
    states: Tensor
    key: str

    @property
    def job(self) -> RewardJob:
        """The job."""
        assert isinstance(self.prepared.job, RewardJob)
        return self.prepared.job

    @property
    def train_targets(self) -> NDArray[np.float64] | None:
        """Those of the training pairs."""
        return None if self.targets is None else self.targets[self.prepared.train_pairs]

    def objective(self, pairs: NDArray[np.int64]) -> BradleyTerry:
        """The loss of these pairs, in their order, without centring."""
        return BradleyTerry() if self.targets is None else BradleyTerry(target=self.targets[pairs])

    def features(self) -> NDArray[np.float64]:
        """φ = h(chosen) − h(rejected), shape (n, hidden)."""
        return (self.states[:, 0] - self.states[:, 1]).double().cpu().numpy()


def prepare_reward(job: RewardJob, progress: Progress) -> tuple[RewardData, nn.Linear]:
    """Everything that is needed before training, and the score head as it is before training.

    Raises:
        UserError: no training pair is left; data or model that a reward model cannot be trained with.
    """
    if job.ours.restart:
        discard(job.run)
    rows = job.load_data()
    loaded, has_new_head = load_reward_model(
        str(job.model.model_name_or_path),
        dtype=job.dtype(),
        seed=job.training.seed,
        revision=job.model.model_revision,
        trust_remote_code=job.training.trust_remote_code,
        attn_implementation=job.model.attn_implementation,
    )
    if job.ours.ensemble and not has_new_head:
        raise UserError(f"'{loaded.name}' has a score head: an ensemble starts from heads of its own; give a decoder.")
    if job.trainable == "lora":
        lora_config(job.model, loaded.model)  # refuse before any work
    loaded = loaded._replace(model=loaded.model.to(job.device()))
    limit, lost = job.training.max_length, Lost.nothing()
    kept = []
    for split, part in (("train", rows.train), ("test", rows.test)):
        for pair in encode(part or (), loaded.tokenizer, split=split, max_length=None, lost=lost):
            if limit is not None and len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) > limit:
                lost.too_long[pair.behaviour, split] += 1
            elif split == "test" or job.ours.half in (None, _half_of(pair.prompt_ids)):
                kept.append(pair)
    if not any(pair.split == "train" for pair in kept):
        raise UserError(f"no training pair is left: all are longer than {limit} tokens; raise --max_length.")
    pairs = EncodedPairs(kept)
    counts = [
        {**row, "kept": row["kept"] - lost.too_long[row["behaviour"], row["split"]]}
        | {"too_long": lost.too_long[row["behaviour"], row["split"]]}
        for row in rows.info.counts
    ]
    digests = weights_hash(loaded.model), pairs_hash(pairs)
    prepared = Prepared(job, rows, loaded, pairs, counts, *digests, job.ours.observe_pairs or MOST_PAIRS)
    if np.ptp(prepared.weights):
        raise UserError("TRL's RewardTrainer has no row weights: leave them out (--weight_column NAME names another).")
    targets = _targets(prepared)
    sequences = [(pair.prompt_ids + pair.chosen_ids, pair.prompt_ids + pair.rejected_ids) for pair in kept]
    key = sha256_of(*digests, None if targets is None else targets.tolist())
    states = _states(prepared, sequences, key, progress)
    return RewardData(prepared, sequences, targets, states, key), copy.deepcopy(loaded.model.score)


def _half_of(prompt_ids: list[int]) -> str:
    """The half of the data that a prompt belongs to, whatever the rows' order."""
    return ("first", "second")[int(sha256_of(prompt_ids), 16) % 2]


def _targets(prepared: Prepared) -> NDArray[np.float64] | None:
    """The margin column, in the order of the pairs."""
    parts = [rows for split in ("train", "test") if (rows := prepared.rows(split)) is not None]
    if "margin" not in (parts[0].column_names or []):
        return None
    targets = np.array([value for rows in parts for value in rows["margin"]], dtype=float)
    if missing := int(np.isnan(targets).sum()):
        raise UserError(f"the column 'margin' holds no finite number in {missing} rows: give each one or drop it.")
    return targets


def _states(prepared: Prepared, sequences: list[tuple[list[int], list[int]]], key: str, progress: Progress) -> Tensor:
    """The states of all sequences; those that the run folder holds already are read."""
    run, device = prepared.job.run, prepared.loaded.model.device
    stored = run.read_arrays("features/reward-states")
    if stored is not None and str(stored["key"]) == key:
        return torch.from_numpy(stored["states"]).to(device)
    flat = [sequence for pair in sequences for sequence in pair]
    with progress.bar("features", len(flat)) as advance:
        states = last_states(prepared.loaded.model, flat, progress=advance)
    states = states.view(len(sequences), 2, -1)
    (run.path / "features").mkdir(parents=True, exist_ok=True)
    run.write_arrays("features/reward-states", states=states.cpu().numpy(), key=np.array(key))
    return states
