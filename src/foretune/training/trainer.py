"""`PreferenceTrainer`: TRL's `DPOTrainer` that keeps behaviours and row weights."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from foretune import processes
from foretune.errors import UserError
from foretune.models.head import causal_model
from foretune.training.behaviour_metrics import BehaviourMetrics, example_values
from foretune.training.shared_prompt_head import add_shared_prompt_head

NOT_SEPARABLE = {"aot", "aot_unpaired"}
EXTRA_INPUTS = {"behaviour_id", "row_weight"}
# Pairs of a batch of reference scores: the pass makes its own batches of them, and shares beginnings among them.
REFERENCE_BATCH = 256


class PreferenceTrainer(DPOTrainer):
    """A drop-in `DPOTrainer`: same arguments, same losses, same numbers on data without the two extra columns.

    - a `behaviour` column: every reward and log-prob metric is also logged per behaviour, as `rewards/margins/{name}`,
      with `num_pairs/{name}` and the displacement of chosen and rejected log-probabilities from the reference;
    - a `weight` column: row i's loss counts w_i / mean(w). Its gradient is scaled at the row's log-probabilities, so
      it works for every TRL loss that is a sum over rows; `aot` losses are refused. The logged loss stays TRL's.
    - with a dictionary of evaluation sets, metrics are logged as `eval_{set}_…`: they do not overwrite each other.

    Args:
        exact_head: compute the output layer in float32 also under bf16 autocast (the default where it is what is
            trained: its updates are smaller than bf16's rounding).
        share_prompts: compute each prompt once for both responses, logits only where a response is scored, and
            reference log-probabilities once, before training, where the run sees every row (as TRL does with
            `precompute_ref_log_probs`): the same numbers to rounding, several times as fast. False: TRL's own way,
            which is also kept for mixture-of-experts models with a router loss and for prompt-learning adapters.
        behaviour_column: the column that names the behaviour, where present.
        weight_column: the column of row weights, where present.
    """

    def __init__(
        self,
        *args: Any,
        exact_head: bool = False,
        share_prompts: bool = True,
        behaviour_column: str = "behaviour",
        weight_column: str = "weight",
        **kwargs: Any,
    ) -> None:
        """Build TRL's trainer, then attach the columns."""
        self._columns = (behaviour_column, weight_column)
        self._head_options = (exact_head, share_prompts)
        self.behaviours: list[str] = []
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        if share_prompts:
            given["args"] = _references_once(given.get("args"), given.get("train_dataset"))
        super().__init__(**given)
        self._mean_weight = _mean_weight(self.train_dataset, weight_column)
        if self._mean_weight != 1.0 and NOT_SEPARABLE & set(self.loss_types):
            raise UserError(
                f"row weights cannot be used with loss_type {', '.join(self.loss_types)}: it sorts the batch, so a "
                "loss belongs to no row; drop the weight column or choose another loss."
            )
        self._behaviour_metrics = {mode: BehaviourMetrics() for mode in ("train", "eval")}
        self._evaluation_prefix = "eval"
        self._collate: Callable = self.data_collator
        self.data_collator = self._collate_with_columns
        self._replace_head()

    def _replace_head(self) -> None:
        exact, share_prompts = self._head_options
        inner = causal_model(self.model)
        if getattr(inner, "_scores_shared_prompts", False):
            return
        learns_prompts = any(config.is_prompt_learning for config in getattr(self.model, "peft_config", {}).values())
        if share_prompts and not (self.aux_loss_enabled or learns_prompts or self._is_vlm):
            add_shared_prompt_head(inner, exact=exact)
            inner._scores_shared_prompts = True
            if self.ref_model is not None:
                add_shared_prompt_head(causal_model(self.accelerator.unwrap_model(self.ref_model)), exact=exact)
        elif exact:
            outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
            add_fused_lm_head(inner, cast_lm_head_to_fp32=True, outputs=outputs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        missing = [name for name in self._columns if name not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *missing]

    def _collate_with_columns(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        behaviour_column, weight_column = self._columns
        batch = self._collate(rows)
        if behaviour_column in rows[0]:
            batch["behaviour_id"] = torch.tensor([self.behaviours.index(str(row[behaviour_column])) for row in rows])
        if weight_column in rows[0]:
            batch["row_weight"] = torch.tensor([float(row[weight_column]) for row in rows])
        return batch

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, noting the behaviours of every data set that will be trained or evaluated on."""
        column = self._columns[0]
        if column in (dataset.column_names or []):
            names = {str(row[column]) for row in dataset.select_columns(column)}
            self.behaviours += sorted(names - set(self.behaviours))
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's, scored as training will score (it is called at the end of TRL's constructor).

        Of several processes the main one writes the results next to the rows and the others read them there, so the
        rows must be in a folder that all see.
        """
        self._replace_head()
        shared = getattr(causal_model(self.model), "_scores_shared_prompts", False)
        if processes.count() > 1:
            folder = Path(self.args.output_dir) / "rows" / name
            processes.on_main(lambda: dataset.save_to_disk(folder))
            dataset = Dataset.load_from_disk(str(folder))
        return super()._precompute_ref_logps(dataset, name, REFERENCE_BATCH if shared else batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, without the columns that no model takes, and without the metrics that it does not read."""
        inputs = {key: inputs[key] for key in inputs if key not in EXTRA_INPUTS}
        if getattr(causal_model(self.model), "_scores_shared_prompts", False):
            inputs["scores_only"] = True
        return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        behaviour_ids = inputs.pop("behaviour_id", None)
        weights = inputs.pop("row_weight", None)
        if not self.precompute_ref_logps:
            references = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = references
        scores: list[Tensor] = []

        def scored(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if "fused_lm_head" in kwargs:
                if weights is not None and torch.is_grad_enabled():
                    outputs.log_probs = _scale_gradient(outputs.log_probs, weights / self._mean_weight)
                scores.append(outputs.log_probs.detach().sum(1))
            return outputs

        with self._references_given():
            loss = super()._compute_loss(scored, inputs, return_outputs)
        if behaviour_ids is not None:
            self._record(behaviour_ids, scores[0], inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        return loss

    def _record(self, behaviour_ids: Tensor, scores: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> None:
        values = example_values(*scores.chunk(2), ref_chosen, ref_rejected, self.beta)
        behaviour_ids, values = self.accelerator.gather_for_metrics((behaviour_ids, values))
        names = [self.behaviours[index] for index in behaviour_ids.tolist()]
        self._behaviour_metrics["train" if self.model.training else "eval"].add(names, values)

    @contextmanager
    def _references_given(self) -> Iterator[None]:
        """While TRL computes the loss, the reference log-probs are in the batch, whatever the user chose."""
        chosen, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = chosen

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """TRL's, remembering which evaluation set is being logged."""
        self._evaluation_prefix = metric_key_prefix
        return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the per-behaviour metrics; evaluation metrics get their own set's prefix."""
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else f"{self._evaluation_prefix}_"
        found = self._behaviour_metrics[mode].summary()
        if mode == "eval":
            found |= {key: sum(values) / len(values) for key, values in self._metrics[mode].items()}
            self._metrics[mode].clear()
        logs |= {f"{prefix}{key}": value for key, value in found.items()}
        self._behaviour_metrics[mode].clear()
        super().log(logs, start_time)

    def log_observation(self, metrics: dict[str, float]) -> None:
        """Log metrics that were measured on fixed pairs (see `BehaviourObserver`), as they are, to `report_to`."""
        log_observation(self, metrics)


def log_observation(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Log metrics as they are, without those that the trainer adds of its own."""
    wanted = trainer.control.should_log  # logging answers a wish to log; TRL's own of this step is still open
    Trainer.log(trainer, dict(metrics))
    trainer.control.should_log = wanted


def _references_once(config: DPOConfig | None, rows: Any) -> DPOConfig | None:
    """The configuration, with reference scores precomputed where TRL can and the run sees every row at least once."""
    if (
        config is None
        or not isinstance(rows, Dataset)
        or config.sync_ref_model
        or config.fsdp  # the policy is sharded when training starts, not before
        or processes.launched_with_fsdp()
        or {"image", "images"} & {*rows.features}
    ):
        return config
    rows_a_step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    seen = config.max_steps * rows_a_step if config.max_steps > 0 else config.num_train_epochs * len(rows)
    if seen < len(rows):
        return config
    config = copy.copy(config)
    config.precompute_ref_log_probs = True
    return config


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factors,) = ctx.saved_tensors
        return gradients[0] * factors[:, None], None


def _scale_gradient(log_probs: Tensor, pair_weights: Tensor) -> Tensor:
    """The same values; gradients of chosen and rejected rows (2n, tokens) multiplied by their pair's weight (n,)."""
    return _ScaleGradient.apply(log_probs, torch.cat([pair_weights, pair_weights]).to(log_probs))  # pyright: ignore


def _mean_weight(rows: Any, column: str) -> float:
    if column not in (rows.column_names or []):
        return 1.0
    weights = [float(weight) for weight in rows[column]]
    mean = sum(weights) / len(weights)
    if not mean > 0:
        raise UserError(f"the column '{column}' sums to {sum(weights)}: at least one row must have a weight above 0.")
    return mean
