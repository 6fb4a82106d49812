"""A job: the arguments of `trl dpo`, plus foretune's own few."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil
from typing import Any

import torch
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments

from foretune import processes
from foretune.data import PreferenceData, load_preferences
from foretune.data.formats import RANKING, UNPAIRED
from foretune.errors import UserError
from foretune.models.load import resolve_dtype
from foretune.objectives import Objective, RankingObjective, SidedObjective, SumOfTerms, Term
from foretune.records import RunFolder
from foretune.scores import Convention
from foretune.training.build import default_device
from foretune.verbs.arguments import ForetuneArguments
from foretune.verbs.flags import spoken_arguments
from foretune.verbs.losses import (
    check_method,
    convention_of,
    objective_of,
    ranking_objective_of,
)
from foretune.verbs.values import checked


@dataclass
class Job:
    """One resolved command: TRL's arguments as TRL parsed them, and ours.

    `explicit` holds what the user said (configuration file and flags), so that the run folder's config.yaml replays it.
    A job taken from somebody's trainer cannot be replayed: its data exist in memory alone.
    """

    script: ScriptArguments
    training: DPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    ours: ForetuneArguments
    explicit: dict[str, Any]
    replayable: bool = True

    @property
    def command(self) -> str:
        """The job as flags, for people to read and repeat."""
        return " ".join(f"--{name} {_flag_value(value)}" for name, value in sorted(self.explicit.items()))

    @property
    def run(self) -> RunFolder:
        """The run folder: TRL's --output_dir."""
        return RunFolder(str(self.training.output_dir))

    @property
    def trainable(self) -> str:
        """What is trained."""
        return self.ours.trainable or ("lora" if self.model.use_peft else "full")

    @property
    def twin(self) -> str:
        """What the forecast simulates."""
        return (
            self.ours.twin or {"unembedding": "output_layer", "lora": "weight_space", "full": "tangent"}[self.trainable]
        )

    @property
    def ranking_loss(self) -> str | None:
        """The loss of rankings; None: the data are pairs."""
        return self.ours.ranking_loss if isinstance(self.ours, ForetuneArguments) else None

    @property
    def losses(self) -> list[str]:
        """Names of what is minimised: DPOTrainer's loss types, or another trainer's one loss."""
        return self.training.loss_type if self.ours.method == "dpo" else [self.ours.method]

    @property
    def rows_per_step(self) -> int:
        """Rows or rankings of all processes that an optimiser step is taken on."""
        return self.training.train_batch_size * self.training.gradient_accumulation_steps * processes.count()

    def num_steps(self, num_units: int) -> int:
        """Of the whole run on so many rows or rankings, about."""
        epochs = num_units / self.rows_per_step * self.training.num_train_epochs
        return self.training.max_steps if self.training.max_steps > 0 else ceil(epochs)

    def device(self) -> torch.device:
        """Where models run."""
        return torch.device("cpu") if self.training.use_cpu else default_device()

    def shards_parameters(self) -> bool:
        """Whether the processes divide the model's parameters (FSDP) instead of each having all of them."""
        return processes.launched_with_fsdp() or (processes.count() > 1 and bool(self.training.fsdp))

    def dtype(self) -> torch.dtype:
        """The dtype of frozen weights; measured unless it was named."""
        return resolve_dtype(self.model.dtype if "dtype" in self.explicit else "auto", self.device())

    def objective(self) -> Objective | SidedObjective | RankingObjective:
        """The loss, for the forecast; of rankings, for training as well.

        Raises:
            UserError: a loss that is no function of a pair's or a ranking's scores, or options that change it.
        """
        if self.ranking_loss is not None:
            self._check_unchanged("is not defined for rankings: leave it out.")
            if self.ours.forecast_displacement:
                raise UserError("--forecast_displacement is of pairs: leave it out with --ranking_loss.")
            return ranking_objective_of(self.ranking_loss, self.training)
        if len(self.losses) != 1:
            raise UserError(
                f"{' + '.join(self.losses)} cannot be forecast: a forecast follows one loss; use "
                "one, or `foretune train` alone, which runs every loss."
            )
        found = objective_of(self.losses[0], self.training)
        self._check_unchanged("cannot be forecast: leave it out, or use `foretune train` alone.")
        if not self.ours.forecast_displacement or isinstance(found, SidedObjective):
            return found
        if self.convention != Convention():
            raise UserError(
                f"--forecast_displacement is not defined for {self.losses[0]}, which takes {self.convention}: leave it "
                "out, or use a loss of sums against the reference."
            )
        return SumOfTerms((Term(found, 1.0, -1.0),))

    def _check_unchanged(self, why: str) -> None:
        """Refuse options of TRL's that change its losses."""
        changed = [
            name
            for name in ("ld_alpha", "use_weighting", "sync_ref_model")
            if getattr(self.training, name) not in (None, False)
        ]
        if self.training.f_divergence_type != "reverse_kl":
            changed.append("f_divergence_type")
        if (self.training.loss_weights or [1.0]) != [1.0]:
            changed.append("loss_weights")
        if changed:
            raise UserError(f"{', '.join(changed)} {why}")

    @property
    def convention(self) -> Convention:
        """What scores the loss is given; sums where there are several losses."""
        return convention_of(self.losses[0]) if len(self.losses) == 1 else Convention()

    def load_data(self) -> PreferenceData:
        """The preference data that the arguments name."""
        if self.mixture.datasets:
            raise UserError("`datasets` mixtures are not supported: give one --dataset_name with a behaviour column.")
        if self.script.dataset_streaming:
            raise UserError("streaming data cannot be measured as a whole: leave out --dataset_streaming.")
        if not self.script.dataset_name:
            raise UserError("no data: pass --dataset_name (a hub name, folder or file; or bundled:statements).")
        data = load_preferences(
            self.script.dataset_name,
            dataset_config=self.script.dataset_config,
            train_split=self.script.dataset_train_split,
            test_split=self.script.dataset_test_split,
            behaviour_column=self.ours.behaviour_column,
            weight_column=self.ours.weight_column,
            behaviours=self.ours.behaviours,
            test_fraction=self.ours.test_fraction,
            max_pairs_per_behaviour=self.ours.max_pairs_per_behaviour,
            seed=self.training.seed,
        )
        self.check_format(data.info.format)
        return data

    def check_format(self, format: str) -> None:
        """Refuse a loss of rankings for data that are pairs, and the other way round; and pairs' methods for neither.

        Raises:
            UserError: what the method needs.
        """
        if self.ranking_loss is not None and format != RANKING:
            raise UserError(
                f"ranking_loss {self.ranking_loss} needs rankings, rows of prompt and responses with ranks, scores or "
                f"preferences, and the data have the format '{format}': leave it out, or give rankings."
            )
        if format == UNPAIRED and self.ours.method != "kto":
            raise UserError(
                "the data are unpaired rows (prompt, completion, label), which --method kto takes; other methods need "
                "pairs of prompt, chosen and rejected."
            )
        if self.ranking_loss is None and format == RANKING:
            raise UserError(
                "the data are rankings: audit, forecast and train take them with --ranking_loss plackett_luce, "
                "pairwise or top1, other verbs take pairs."
            )


TYPES = (ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig, ForetuneArguments)

# Defaults that differ from TRL's, each for a reason.
DEFAULTS: dict[str, Any] = {
    "gradient_checkpointing": False,  # slower; turn on where memory is short
    "save_steps": 0.25,  # short runs can be continued too
    "save_total_limit": 2,
    "report_to": ["none"],
    "disable_tqdm": False,  # else it follows the verbosity of transformers, which the command line lowers
}


def parse_job(arguments: Sequence[str], *, prog: str, **more: Any) -> Job:
    """Parse flags and `--config file.yaml`, as `trl dpo` does.

    Where neither model nor data are named, the run folder's own config.yaml is continued. `more`: as of
    `spoken_arguments`.

    Raises:
        UserError: unknown or missing arguments, or values that TRL refuses.
    """
    return job_from(**spoken_arguments(arguments, TYPES, prog=prog, **more))


def job_from(**explicit: Any) -> Job:
    """Build a job from TRL's and foretune's arguments as keywords.

    Raises:
        UserError: unknown arguments, or values of another type, out of bounds, or that TRL refuses.
    """
    if processes.launched_with_fsdp() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP version 1 cannot be observed while it trains: launch with --fsdp_version 2.")
    explicit = checked(TYPES, explicit)
    values = {**DEFAULTS, "use_cpu": default_device().type == "cpu", **explicit}
    if "bf16" not in explicit and "fp16" not in explicit:
        dtype = resolve_dtype(explicit.get("dtype", "auto"), default_device())
        values["bf16"] = dtype == torch.bfloat16
    job = Job(*fill(TYPES, values), explicit=without_restart(explicit))  # pyright: ignore
    check_method(job.ours.method, explicit)
    if job.ours.band_runs == 1 or job.ours.band_runs < 0:
        raise UserError(f"band_runs is {job.ours.band_runs}: a band needs at least 2 runs, 0 leaves it out.")
    if any(not 0 < share < 1 for share in job.ours.forecast_at or []):
        raise UserError(f"forecast_at {job.ours.forecast_at}: each must lie between 0 and 1, a share of the steps.")
    if job.ranking_loss is not None:
        job.objective()  # refuse before any work
    if job.twin == "output_layer" and (job.ours.pilot_fraction or job.ours.forecast_at):
        raise UserError(
            "--pilot_fraction and --forecast_at take features of a model that has changed; those of the output layer "
            "stay as they are: leave them out, or forecast adapters or all weights."
        )
    if job.training.truncation_mode != "keep_start":
        raise UserError("truncation_mode keep_end is deprecated in TRL and not supported here: use keep_start.")
    return job


def fill(kinds: Sequence[type], values: dict[str, Any]) -> list[Any]:
    """One instance of each of TRL's and our dataclasses `kinds` with these values, which are `checked`.

    Raises:
        UserError: values that TRL refuses, no model.
    """
    try:
        parts = [
            kind(**{item.name: values[item.name] for item in fields(kind) if item.name in values}) for kind in kinds
        ]
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"TRL refuses these arguments: {error}") from error
    if not values.get("model_name_or_path"):
        raise UserError("no model: pass --model_name_or_path (a hub id, folder, .gguf file, or smollm2-135m).")
    return parts


def without_restart(explicit: dict[str, Any]) -> dict[str, Any]:
    """What a repetition needs of what the user said."""
    return {name: value for name, value in explicit.items() if name != "restart"}


def _flag_value(value: Any) -> str:
    import shlex

    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(shlex.quote(str(item)) for item in values)
