"""TRL's trainers of SimPO, CPO, ORPO and KTO, on the same encoded pairs as DPO's.

CPOTrainer and ORPOTrainer tokenise in a way of their own (another end token after a conversation, another border
between prompt and response), so that methods could not be compared. Here every trainer is given the tokens that
`DPOTrainer` would train on.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, KTOConfig, KTOTrainer

from foretune.models.encoding import EncodedPair
from foretune.objectives import unpaired_order

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # a notice at import, which names nothing to be done
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402


class _Encoded:
    """Mixed into a trainer whose rows are encoded already."""

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:  # noqa: ARG002
        """Nothing to add."""
        return {}


class EncodedCPOTrainer(_Encoded, CPOTrainer):
    """CPO and SimPO."""


class EncodedORPOTrainer(_Encoded, ORPOTrainer):
    """ORPO."""


class EncodedKTOTrainer(KTOTrainer):
    """KTO."""

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, dataset_name: str) -> Dataset:  # noqa: ARG002
        """Each row gets its neighbour's response in the batch, for the KL term, as in TRL."""

        def rotated(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            answers = rows["completion_ids"]
            return {"KL_completion_ids": [*answers[-1:], *answers[:-1]]}

        return dataset.map(rotated, batched=True, batch_size=args.per_device_train_batch_size)


class Method(NamedTuple):
    """How TRL trains a method.

    Attributes:
        trainer: the class.
        config: of its arguments.
        options: arguments that make the method.
    """

    trainer: type[Trainer]
    config: type[Any]
    options: Mapping[str, Any]


WHOLE_ROWS = {"remove_unused_columns": False}  # their collator needs every column
METHODS = {
    "simpo": Method(EncodedCPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, **WHOLE_ROWS}),
    "cpo": Method(EncodedCPOTrainer, CPOConfig, {"loss_type": "sigmoid", **WHOLE_ROWS}),
    "orpo": Method(EncodedORPOTrainer, ORPOConfig, WHOLE_ROWS),
    # references once, before training; the estimate of the KL needs the rows in a fixed order
    "kto": Method(
        EncodedKTOTrainer,
        KTOConfig,
        {"loss_type": "kto", "precompute_ref_log_probs": True, "train_sampling_strategy": "sequential"},
    ),
}


def build_method_trainer(
    name: str,
    model: PreTrainedModel,
    arguments: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: Sequence[EncodedPair],
    test: Sequence[EncodedPair] | None = None,
    **given: Any,
) -> Trainer:
    """The trainer of a method, for a run of as many pairs a step as DPO's would be.

    Args:
        name: one of METHODS.
        model: what is trained.
        arguments: the run's; beta is the method's own.
        tokenizer: of the model.
        train: the training pairs in their order.
        test: the held-out pairs, None: nothing is evaluated.
        **given: further arguments of the trainer.
    """
    method = METHODS[name]
    shared = {item.name for item in fields(method.config) if item.init} & {item.name for item in fields(arguments)}
    values = {key: getattr(arguments, key) for key in shared} | {"loss_type": None, **method.options}
    if name == "kto" and all(train[0].responses):
        values["per_device_train_batch_size"] *= 2  # a pair is two rows
        values["per_device_eval_batch_size"] *= 2

    def rows(pairs: Sequence[EncodedPair]) -> Dataset:
        return Dataset.from_list(_unpaired_rows(pairs, arguments) if name == "kto" else [*_pair_rows(pairs)])

    return method.trainer(
        model=model,
        args=method.config(**{key: value for key, value in values.items() if value is not None}),
        train_dataset=rows(train),
        eval_dataset=None if test is None else rows(test),
        processing_class=tokenizer,
        **given,
    )


def _pair_rows(pairs: Iterable[EncodedPair]) -> Iterator[dict[str, list[int]]]:
    """Rows as CPOTrainer and ORPOTrainer make them."""
    for pair in pairs:
        row = {"prompt_input_ids": pair.prompt_ids, "prompt_attention_mask": [1] * len(pair.prompt_ids)}
        for side, answer in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            row[f"{side}_input_ids"] = pair.prompt_ids + answer
            row[f"{side}_attention_mask"] = [1] * len(row[f"{side}_input_ids"])
            row[f"{side}_labels"] = [-100] * len(pair.prompt_ids) + answer
        yield row


def _unpaired_rows(pairs: Iterable[EncodedPair], arguments: DPOConfig) -> list[dict[str, Any]]:
    """Both responses of each pair, or the one that is there, shuffled once: KTOTrainer takes rows in their order."""
    rows = [
        {"prompt_ids": pair.prompt_ids, "completion_ids": answer, "label": label}
        for pair in pairs
        for answer, label in ((pair.chosen_ids, True), (pair.rejected_ids, False))
        if answer
    ]
    return [rows[index] for index in unpaired_order(len(rows), arguments)]
