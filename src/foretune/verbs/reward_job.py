"""The job of a reward model: the arguments of `trl reward`, plus foretune's own few."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import DatasetMixtureConfig, ModelConfig, RewardConfig, ScriptArguments

from foretune import processes
from foretune.errors import UserError
from foretune.models.load import resolve_dtype
from foretune.training.build import default_device
from foretune.verbs.arguments import SharedArguments
from foretune.verbs.flags import spoken_arguments
from foretune.verbs.job import DEFAULTS, Job, fill, without_restart
from foretune.verbs.values import checked

TRAINABLE = ("score", "lora", "full")


@dataclass
class RewardArguments(SharedArguments):
    """What foretune adds to the arguments of `trl reward`."""

    trainable: str | None = field(
        default=None,
        metadata={
            "help": "What is trained: score (the score head alone; its forecast is exact), lora, or full. "
            "Default: lora with --use_peft, else full.",
            "choices": list(TRAINABLE),
        },
    )
    forecast_alone: bool = field(default=True, metadata={"help": "Also forecast each behaviour trained alone."})
    stored_states: bool = field(
        default=False,
        metadata={
            "help": "With --trainable score: train on the stored hidden states, which never change, instead of running "
            "the decoder at every step. The same head in seconds; forecast and run are then one computation."
        },
    )
    draws: int = field(default=1000, metadata={"help": "Bootstrap draws and permutations."})
    half: str | None = field(
        default=None,
        metadata={
            "help": "Train on the first or second half of the prompts alone: the other half makes a held-out reward "
            "model for `foretune rlhf`.",
            "choices": ["first", "second"],
        },
    )
    ensemble: int = field(
        default=0,
        metadata={"help": "Train so many score heads, with other seeds; needs --trainable score (0: no ensemble)."},
    )


TYPES = (ScriptArguments, RewardConfig, ModelConfig, DatasetMixtureConfig, RewardArguments)

# Defaults that differ from TRL's, each for a reason.
REWARD_DEFAULTS: dict[str, Any] = {
    **DEFAULTS,
    "bf16": False,  # rewards are compared to three digits and more, which bfloat16 does not have
    "save_strategy": "no",  # the trained model is saved at the end; a reward model trains in minutes
}


@dataclass
class RewardJob(Job):
    """One resolved command: TRL's arguments as TRL parsed them, and ours."""

    training: RewardConfig
    ours: RewardArguments

    @property
    def trainable(self) -> str:
        """What is trained."""
        return self.ours.trainable or ("lora" if self.model.use_peft else "full")

    def dtype(self) -> torch.dtype:
        """The dtype that weights are loaded in: float32 unless it was named, as in TRL's trainer."""
        return resolve_dtype(self.model.dtype, self.device()) if "dtype" in self.explicit else torch.float32


def parse_reward_job(arguments: Sequence[str], *, prog: str) -> RewardJob:
    """Parse flags and `--config file.yaml`, as `trl reward` does.

    Raises:
        UserError: unknown or missing arguments, or values that TRL refuses.
    """
    return reward_job_from(**spoken_arguments(arguments, TYPES, prog=prog))


def reward_job_from(**explicit: Any) -> RewardJob:
    """Build a job from the arguments of `trl reward` and foretune's as keywords.

    Raises:
        UserError: unknown arguments, values of another type, out of bounds or that TRL refuses, or what a reward model
            cannot be trained with here.
    """
    explicit = checked(TYPES, explicit)
    values = {**REWARD_DEFAULTS, "use_cpu": default_device().type == "cpu", **explicit}
    job = RewardJob(*fill(TYPES, values), explicit=without_restart(explicit))  # pyright: ignore
    if job.ours.ensemble < 0 or job.ours.ensemble == 1:
        raise UserError(f"ensemble is {job.ours.ensemble}: an ensemble needs at least 2 members, 0 leaves it out.")
    if job.ours.ensemble and job.trainable != "score":
        raise UserError(f"an ensemble is of score heads, and the run trains {job.trainable}: pass --trainable score.")
    if job.ours.stored_states and job.trainable != "score":
        raise UserError(f"hidden states change where the run trains {job.trainable}: leave out --stored_states.")
    if job.trainable == "score" and not job.training.disable_dropout:
        raise UserError("dropout would change the hidden states that the score head reads: leave disable_dropout on.")
    if job.training.resume_from_checkpoint:
        raise UserError("training of reward models is not continued: leave out --resume_from_checkpoint.")
    if processes.count() > 1:
        raise UserError("reward models are trained by one process: start foretune without a launcher.")
    return job
