"""Reward models trained by TRL's `RewardTrainer`: the real run, and the same run on stored hidden states.

While the score head alone is trained, hidden states never change: a model that looks them up instead of computing them
is trained by the same trainer, on the same batches, to the same head.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer

from foretune.dynamics.arguments import quiet_copy
from foretune.dynamics.curves import observation_steps
from foretune.training.terminal import quieten


class RewardRun(NamedTuple):
    """Rewards along a run.

    Attributes:
        steps: optimiser steps at which rewards were taken, shape (T,).
        rewards: of chosen and rejected of the observed pairs, shape (T, 2, observed), float64.
        learning_rates: of every step.
        num_steps: of the whole run.
        head: the score head at the end.
    """

    steps: list[int]
    rewards: NDArray[np.float64]
    learning_rates: list[float]
    num_steps: int
    head: nn.Linear

    @property
    def margins(self) -> NDArray[np.float64]:
        """Reward of chosen less that of rejected, shape (T, observed)."""
        return self.rewards[:, 0] - self.rewards[:, 1]


class ModelObserver(TrainerCallback):
    """Take figures of a model from time to time: rewards of fixed pairs, or what a policy is worth on fixed prompts.

    Args:
        score: the figures of a model, any shape.
        count: how many times, evenly spread from before the first step to after the last.
        log: told each observation; None: nobody.
    """

    def __init__(
        self,
        score: Callable[[nn.Module], Tensor],
        *,
        count: int,
        log: Callable[[NDArray[np.float64]], None] | None = None,
    ) -> None:
        """Remember what to take and when."""
        self.score, self.count, self.log = score, count, log
        self.found: dict[int, NDArray[np.float64]] = {}
        self.learning_rates: list[float] = []
        self._steps: set[int] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe step 0."""
        self._steps = set(observation_steps(state.max_steps, self.count))
        self._observe(state.global_step, kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the learning rate."""
        self.learning_rates.append(float(kwargs["lr_scheduler"].get_last_lr()[0]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe where this step is wanted."""
        self._observe(state.global_step, kwargs["model"])

    @torch.no_grad()
    def _observe(self, step: int, model: nn.Module) -> None:
        if step not in self._steps:
            return
        self.found[step] = self.score(model).double().cpu().numpy()
        if self.log is not None:
            self.log(self.found[step])

    def run(self, trainer: RewardTrainer) -> RewardRun:
        """What a finished trainer did."""
        steps = sorted(self.found)
        return RewardRun(
            steps,
            np.stack([self.found[step] for step in steps]),
            self.learning_rates,
            trainer.state.max_steps,
            trainer.accelerator.unwrap_model(trainer.model).score,
        )


class StoredStates(PreTrainedModel):
    """A reward model with a table for a decoder: a sequence is one token, its number in the table.

    Args:
        states: of the sequences, shape (sequences, hidden).
        head: the score head to start from.
    """

    config_class = PreTrainedConfig

    def __init__(self, states: Tensor, head: nn.Linear) -> None:
        """Copy the head."""
        super().__init__(PreTrainedConfig(num_labels=1, pad_token_id=-1))
        self.register_buffer("states", states, persistent=False)
        self.score = copy.deepcopy(head).float().requires_grad_(True)

    def forward(self, input_ids: Tensor, **_: Any) -> SequenceClassifierOutput:
        """Rewards, shape (sequences, 1)."""
        return SequenceClassifierOutput(logits=self.score(self.states[input_ids[:, 0]]))


def train_on_states(
    states: Tensor,
    head: nn.Linear,
    arguments: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_pairs: Sequence[int] | NDArray[np.int64],
    targets: NDArray[np.float64] | None,
    observed: Sequence[int] | NDArray[np.int64],
    observations: int,
) -> RewardRun:
    """Train the score head alone, exactly as the real run would, without the decoder.

    Args:
        states: of chosen and rejected of every pair, shape (pairs, 2, hidden).
        head: to start from.
        arguments: the run's own; only reporting and saving are switched off.
        tokenizer: TRL wants one.
        train_pairs: the training pairs in the order of the training data.
        targets: the margin that each training pair must exceed (TRL's `margin`), or None.
        observed: pairs whose rewards are recorded.
        observations: how many times.
    """
    place = torch.as_tensor(np.asarray(observed))
    observer = ModelObserver(
        lambda model: model.score(model.states)[:, 0].view(-1, 2)[place].T,  # pyright: ignore
        count=observations,
    )
    sequences = [([2 * int(pair)], [2 * int(pair) + 1]) for pair in train_pairs]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RewardTrainer(
            model=StoredStates(states.flatten(0, 1), head),
            args=quiet_copy(arguments, scratch),
            train_dataset=reward_rows(sequences, targets),
            processing_class=copy.deepcopy(tokenizer),
            callbacks=[observer],
        )
        quieten(trainer)
        trainer.train()
    return observer.run(trainer)


def reward_rows(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], targets: NDArray[np.float64] | None
) -> Dataset:
    """Encoded rows as `RewardTrainer` takes them: token ids of chosen and rejected, prompt included."""
    columns: dict[str, Any] = {
        "chosen_ids": [list(chosen) for chosen, _ in sequences],
        "rejected_ids": [list(rejected) for _, rejected in sequences],
    }
    if targets is not None:
        columns["margin"] = targets.tolist()
    return Dataset.from_dict(columns)
