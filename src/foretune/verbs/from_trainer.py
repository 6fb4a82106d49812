"""A job from a `DPOTrainer` that somebody has built: same encoding, same truncation, same batches."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from trl import DatasetMixtureConfig, DPOTrainer, ModelConfig, ScriptArguments

from foretune.data import BEHAVIOUR_COLUMNS, DataInfo, PreferenceData
from foretune.data.behaviours import EVERYTHING
from foretune.errors import UserError
from foretune.models.encoding import EncodedPair
from foretune.models.head import causal_model
from foretune.models.load import LoadedModel, weights_hash
from foretune.models.pairs import EncodedPairs
from foretune.records.provenance import pairs_hash
from foretune.training.ranking_trainer import RankingTrainer
from foretune.training.trainer import PreferenceTrainer
from foretune.verbs.arguments import ForetuneArguments
from foretune.verbs.job import Job
from foretune.verbs.prepare import Prepared
from foretune.verbs.values import checked


def prepared_from_trainer(trainer: DPOTrainer, **ours: Any) -> Prepared:
    """Take data, model and arguments from `trainer`; keywords are foretune's own arguments.

    Raises:
        UserError: a trainer past its first step, of rankings, or with several evaluation sets.
    """
    if isinstance(trainer, RankingTrainer):
        raise UserError(
            "forecast(trainer) takes pairs: forecast rankings with forecast(dataset_name=…, ranking_loss=…) instead."
        )
    if trainer.state.global_step:
        raise UserError(
            f"forecast(trainer) needs the trainer before training: this one is at step {trainer.state.global_step}."
        )
    ours = checked((ForetuneArguments,), ours)
    arguments = ForetuneArguments(**{"trainable": _trainable(trainer.model), **ours})
    evaluation = trainer.eval_dataset
    if isinstance(evaluation, dict):
        if len(evaluation) > 1:
            raise UserError("forecast(trainer) takes one evaluation set: build the trainer with the one to forecast.")
        evaluation = next(iter(evaluation.values()))
    sets = {"train": trainer.train_dataset, "test": evaluation}
    column = arguments.behaviour_column or next(
        (name for name in BEHAVIOUR_COLUMNS if name in (trainer.train_dataset.column_names or [])), None
    )
    # TRL's own trainer drops a weight column
    weight = arguments.weight_column if isinstance(trainer, PreferenceTrainer) else None
    pairs = EncodedPairs(
        pair
        for split, rows in sets.items()
        if rows is not None
        for pair in _encoded(rows, split, column, weight, trainer.args.max_length)
    )
    behaviours = pairs.names
    numbers = Counter(zip(pairs.behaviour_of, pairs.split_of, strict=True))
    counts = [
        {"behaviour": name, "split": split, "read": number, "kept": number}
        for name in behaviours
        for split in sets
        if (number := numbers[name, split])
    ]
    name = str(trainer.model.config._name_or_path)
    info = DataInfo("a DPOTrainer", "preference", column, behaviours, counts, [])
    job = Job(
        ScriptArguments(dataset_name="trainer"),
        trainer.args,
        ModelConfig(model_name_or_path=name),
        DatasetMixtureConfig(),
        arguments,
        explicit={**_changed(trainer.args), "model_name_or_path": name, **ours},
        replayable=False,
    )
    job.check_format(info.format)
    loaded = LoadedModel(trainer.model.eval(), trainer.processing_class, name, name, None)
    digests = weights_hash(trainer.model), pairs_hash(pairs)
    texts = {split: _texts(rows, pairs, split) for split, rows in sets.items()}
    return Prepared(job, PreferenceData(texts["train"], texts["test"], info), loaded, pairs, counts, *digests).settled()


def _changed(arguments: Any) -> dict[str, Any]:
    """The trainer's arguments that differ from their defaults: what its forecast depends on."""
    defaults = type(arguments)(output_dir=arguments.output_dir, use_cpu=arguments.use_cpu).to_dict()
    return {key: value for key, value in arguments.to_dict().items() if value != defaults.get(key)}


def _trainable(model: Any) -> str:
    """What a model's trainable parameters are called."""
    if hasattr(model, "peft_config"):
        return "lora"
    head = causal_model(model).get_output_embeddings().weight
    names = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return "unembedding" if len(names) == 1 and names[0] is head else "full"


def _encoded(
    rows: Any, split: str, behaviour: str | None, weight: str | None, max_length: int | None
) -> Iterator[EncodedPair]:
    for index, row in enumerate(rows):
        room = None if max_length is None else max_length - len(row["prompt_ids"])
        yield EncodedPair(
            row.get("pair_id", 2 * index + (split == "test")),
            str(row[behaviour]) if behaviour else EVERYTHING,
            split,
            float(row.get(weight, 1.0)) if weight else 1.0,
            row["prompt_ids"],
            row["chosen_ids"][:room],
            row["rejected_ids"][:room],
            room is not None and max(len(row["chosen_ids"]), len(row["rejected_ids"])) > room,
        )


def _texts(rows: Any, pairs: EncodedPairs, split: str) -> Any:
    """The texts with the pairs' ids, as `Prepared` keeps them."""
    if rows is None:
        return None
    ids = pairs.pair_id[pairs.is_train == (split == "train")]
    kept = rows.select_columns(["prompt", "chosen", "rejected"])
    return kept.add_column("pair_id", ids)
