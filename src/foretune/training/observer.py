"""`BehaviourObserver`: a callback that measures every behaviour on fixed pairs while any trainer runs."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from foretune import processes
from foretune.dynamics.curves import observation_steps
from foretune.models.batches import supports_packing
from foretune.models.encoding import EncodedPair
from foretune.scores.log_probs import divided_scores
from foretune.training.behaviour_metrics import BehaviourMetrics, example_values


class BehaviourObserver(TrainerCallback):
    """Score the same pairs from time to time, log means per behaviour, and keep every pair's log-probabilities.

    For people who keep their own trainer: `trainer.add_callback(BehaviourObserver(pairs))`. The model as it is at step
    0 is the reference, unless `reference` is given.

    Args:
        pairs: what to score, from `foretune.models.encoding.encode`.
        count: how many times, evenly spread from before the first step to after the last.
        folder: where observations are kept (one small file a step), so that a restarted run continues; None: nowhere.
        beta: multiplies log-ratios to rewards in what is logged.
        reference: log-probabilities of chosen and rejected under the reference, shape (2, n).
        packed: compute each prompt once; None: where the architecture allows it.
        log: where metrics go, a function of a dictionary (`PreferenceTrainer.log_observation`); None: nowhere.
    """

    def __init__(
        self,
        pairs: Sequence[EncodedPair],
        *,
        count: int = 9,
        folder: Path | None = None,
        beta: float = 0.1,
        reference: np.ndarray | None = None,
        packed: bool | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Remember what to score and when."""
        self.pairs = list(pairs)
        self.count = count
        self.steps: set[int] = set()
        self.folder = folder
        self.beta = beta
        self.reference = reference
        self.packed = packed
        self.log = log
        self.observations: dict[int, np.ndarray] = {}
        self._splits = sorted({pair.split for pair in self.pairs})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load earlier observations up to the step the run continues from; observe step 0 on a fresh start."""
        self.steps = set(observation_steps(state.max_steps, self.count))
        self.restore(state.global_step)
        if state.global_step == 0:
            self._observe(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe where this step is wanted."""
        self._observe(state, kwargs["model"])

    def _observe(self, state: Any, model: torch.nn.Module) -> None:
        step = state.global_step
        if step not in self.steps or step in self.observations:
            return
        packed = supports_packing(model) if self.packed is None else self.packed
        found = divided_scores(model, self.pairs, packed=packed)
        self.observations[step] = found
        if self.reference is None:
            self.reference = found
        self._keep(step, found)
        if self.log is not None and state.is_world_process_zero:
            self.log(self._metrics(found))

    def _metrics(self, found: np.ndarray) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for split in self._splits:
            collected = BehaviourMetrics()
            members = [index for index, pair in enumerate(self.pairs) if pair.split == split]
            behaviours = [self.pairs[index].behaviour for index in members]
            columns = torch.from_numpy(np.concatenate([found, self.reference])[:, members])  # pyright: ignore
            collected.add(behaviours, example_values(*columns, self.beta))
            metrics |= {f"observed_{split}_{key}": value for key, value in collected.summary().items()}
        return metrics

    def _keep(self, step: int, found: np.ndarray) -> None:
        if self.folder is None or not processes.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step-{step:08d}.npy"
        scratch = target.with_suffix(f".{os.getpid()}.partial")
        with scratch.open("wb") as file:
            np.save(file, found)
        os.replace(scratch, target)

    def restore(self, up_to: int) -> None:
        """Load what the folder has up to a step; later observations are removed from it."""
        self.observations |= processes.on_main(lambda: self._kept(up_to))
        if self.reference is None and 0 in self.observations:
            self.reference = self.observations[0]

    def _kept(self, up_to: int) -> dict[int, np.ndarray]:
        found = {}
        for file in sorted(self.folder.glob("step-*.npy")) if self.folder is not None else ():
            step = int(file.stem.removeprefix("step-"))
            if step > up_to or up_to == 0:
                file.unlink()  # from a run that is being repeated from an earlier checkpoint
            else:
                found[step] = np.load(file)
        return found
