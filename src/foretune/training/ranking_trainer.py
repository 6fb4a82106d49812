"""`RankingTrainer`: TRL's `DPOTrainer` on K ranked responses to each prompt instead of two."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from foretune import processes
from foretune.errors import UserError
from foretune.models.encoding import encode_rankings
from foretune.models.head import causal_model
from foretune.objectives.ranking import RankingObjective, is_worse
from foretune.training.behaviour_metrics import DISPLACEMENT_KEYS, LOGP_KEYS, REWARD_KEYS, example_values
from foretune.training.shared_prompt_head import add_shared_prompt_head
from foretune.training.trainer import REFERENCE_BATCH, PreferenceTrainer

COLUMNS = ("prompt_ids", "responses", "ranks", "ref_logps")


class RankingTrainer(PreferenceTrainer):
    """A `PreferenceTrainer` whose example is a prompt with all its responses.

    A batch of `per_device_train_batch_size` prompts computes each prompt once for its K responses (K may differ from
    row to row), and reference log-probabilities once, before training. Metrics have TRL's keys: they are means over all
    pairs of a ranking that are not tied, then over rankings.

    Args:
        objective: the loss of a prompt's responses; TRL's `loss_type` is not used.
        args: TRL's arguments.
        train_dataset: rows as of `load_preferences` for rankings: contrasts, with `ranking`, `chosen_rank` and
            `rejected_rank`.
        processing_class: the tokenizer.
        eval_dataset: rows of the same kind, or None.
        share_prompts: compute each prompt once (False: separate sequences, the slow way).
        **kwargs: further arguments of `PreferenceTrainer`.

    Raises:
        UserError: several processes; models that need router losses, images or virtual tokens.
    """

    def __init__(
        self,
        *,
        objective: RankingObjective,
        args: DPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        """Encode the rankings, then build TRL's trainer on them."""
        if processes.count() > 1:
            raise UserError("rankings are trained by one process: start foretune without a launcher.")
        self.objective = objective
        sets = [
            None if rows is None else encoded_rankings(rows, processing_class, max_length=args.max_length)
            for rows in (train_dataset, eval_dataset)
        ]
        super().__init__(
            args=args,
            train_dataset=sets[0],
            eval_dataset=sets[1],
            processing_class=processing_class,
            data_collator=collate,
            **kwargs,
        )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Rows are encoded already; note their behaviours."""
        self.behaviours += sorted({*dataset[self._columns[0]]} - {*self.behaviours})
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLUMNS, *self._columns]

    def _replace_head(self) -> None:
        learns_prompts = any(config.is_prompt_learning for config in getattr(self.model, "peft_config", {}).values())
        if self.aux_loss_enabled or learns_prompts or self._is_vlm:
            raise UserError(
                "rankings cannot be trained with router losses, prompt-learning adapters or images: use LoRA or full "
                "fine-tuning of a text model."
            )
        exact, pack = self._head_options
        for model in (self.model, self.ref_model):
            inner = None if model is None else causal_model(self.accelerator.unwrap_model(model))
            if inner is not None and not getattr(inner, "_scores_shared_prompts", False):
                add_shared_prompt_head(inner, exact=exact, pack=pack)
                inner._scores_shared_prompts = True

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The reference's log-probabilities of all responses, as a column."""
        self._replace_head()
        found = []
        for batch in DataLoader(dataset, batch_size=REFERENCE_BATCH, collate_fn=collate):  # pyright: ignore
            inputs = {key: value.to(self.accelerator.device) for key, value in batch.items()}
            scores = self._reference_scores(inputs)
            found += [own.tolist() for own in scores.cpu().split(batch["num_responses"].tolist())]
        return dataset.add_column("ref_logps", found)  # pyright: ignore

    def _reference_scores(self, inputs: dict[str, Any]) -> Tensor:
        """Log-probabilities of all responses of a batch, one after another (TRL returns two halves)."""
        own = {key: value for key, value in inputs.items() if key != "ranks"}
        return torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, own))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        behaviour_ids, weights = inputs.pop("behaviour_id", None), inputs.pop("row_weight", None)
        reference = inputs.pop("ref_logps", None)
        if reference is None:
            reference = self._reference_scores(inputs)
        ranks = inputs.pop("ranks")
        labels = inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, -100)
        outputs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        scores, last = outputs.log_probs.sum(1), inputs["num_responses"][:, None] - 1
        log_ratios = in_rows(scores - reference, ranks)
        losses = self.objective.torch_value(log_ratios - log_ratios.gather(1, last), ranks)
        if weights is not None:
            losses = losses * (weights / self._mean_weight).to(losses)
        self._record_rankings(behaviour_ids, in_rows(scores.detach(), ranks), in_rows(reference, ranks), ranks)
        return (losses.mean(), outputs) if return_outputs else losses.mean()

    def _record_rankings(self, behaviour_ids: Tensor | None, scores: Tensor, reference: Tensor, ranks: Tensor) -> None:
        mode, (row, better, worse) = "train" if self.model.training else "eval", is_worse(ranks).nonzero(as_tuple=True)
        sides = [values[row, place] for values in (scores, reference) for place in (better, worse)]
        of_pairs = example_values(*sides, self.beta)
        count = torch.bincount(row, minlength=len(ranks))[:, None]
        values = of_pairs.new_zeros(len(ranks), of_pairs.shape[1]).index_add(0, row, of_pairs) / count
        for key, mean in zip(REWARD_KEYS + LOGP_KEYS + DISPLACEMENT_KEYS, values.mean(0).tolist(), strict=True):
            self._metrics[mode][key].append(mean)
        if behaviour_ids is not None:
            self._behaviour_metrics[mode].add([self.behaviours[index] for index in behaviour_ids.tolist()], values)


def encoded_rankings(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None) -> Dataset:
    """One row a ranking: prompt_ids, responses (token ids), ranks, behaviour and weight."""
    found = [
        {
            **ranking._asdict(),
            "ranks": [row["chosen_rank"] for row in contrasts] + [contrasts[-1]["rejected_rank"]],
            "behaviour": contrasts[-1]["behaviour"],
            "weight": contrasts[-1]["weight"],
        }
        for ranking, contrasts in encode_rankings(rows, tokenizer, max_length=max_length)  # pyright: ignore
    ]
    return Dataset.from_list(found)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of rankings: their responses one after another, prompt included, padded at the end.

    Returns:
        input_ids, attention_mask, completion_mask, shape (responses, tokens); num_responses, shape (rankings,); ranks,
        shape (rankings, K), 0 where there is no response; and ref_logps, shape (responses,), where rows have it.
    """
    sequences = [(row["prompt_ids"], response) for row in rows for response in row["responses"]]
    columns = {
        "input_ids": [prompt + response for prompt, response in sequences],
        "attention_mask": [[1] * (len(prompt) + len(response)) for prompt, response in sequences],
        "completion_mask": [[0] * len(prompt) + [1] * len(response) for prompt, response in sequences],
        "ranks": [row["ranks"] for row in rows],
    }
    batch = {name: pad_sequence([*map(torch.tensor, own)], batch_first=True) for name, own in columns.items()}
    batch["num_responses"] = torch.tensor([len(row["responses"]) for row in rows])
    if "ref_logps" in rows[0]:
        batch["ref_logps"] = torch.tensor([score for row in rows for score in row["ref_logps"]])
    return batch


def in_rows(values: Tensor, ranks: Tensor) -> Tensor:
    """Values of all responses, one after another, in the shape of `ranks`; 0 where there is no response."""
    return values.new_zeros(ranks.shape).masked_scatter(ranks > 0, values)
