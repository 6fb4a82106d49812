"""Real runs of the study's model, with TRL: LoRA or all weights, one group of rows, right labels or flipped ones.

The paper's settings (its code): AdamW with a constant learning rate, β = 0.01, one epoch; LoRA with r = 8, α = 32,
dropout 0.05 on the q and v projections. Rows, batch, epochs and learning rate are scaled to a small model and a few
minutes; flags override them.
"""

import copy
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from foretune.claims.study import Behaviour, Study
from foretune.models.encoding import EncodedPair
from foretune.models.head import causal_model
from foretune.objectives import DPO
from foretune.training.build import lora_config, prepare_trainable
from foretune.training.observer import BehaviourObserver
from foretune.training.terminal import quieten
from foretune.training.trainer import PreferenceTrainer
from foretune.verbs.job import Job, job_from
from foretune.verbs.real_run import packed, training_key

FloatArray = NDArray[np.float64]
LORA, FULL = "lora", "full"
WORDS = {LORA: "LoRA", FULL: "all weights"}
RATES = {LORA: 2e-4, FULL: 1e-5}
DEFAULTS = {
    "lr_scheduler_type": "constant",
    "num_train_epochs": 4,
    "per_device_train_batch_size": 8,
    "lora_r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "save_strategy": "no",
    "disable_tqdm": True,
}
OBSERVATIONS = 5
PROMPTS_AT_ONCE = 16


class Life(NamedTuple):
    """What one run did to the rows it was trained on.

    Attributes:
        steps: at which the rows were scored, shape (T,).
        log_probs: of chosen and rejected, as they are in the data, shape (T, 2, n).
    """

    steps: FloatArray
    log_probs: FloatArray

    def margins(self) -> FloatArray:
        """Log-ratios of chosen over rejected against the start, shape (T, n)."""
        ratio = self.log_probs[:, 0] - self.log_probs[:, 1]
        return ratio - ratio[0]

    def losses(self, beta: float, *, flipped: bool = False) -> FloatArray:
        """DPO losses of the rows, shape (T, n); `flipped`: with chosen and rejected exchanged."""
        return DPO(beta=beta).value(-self.margins() if flipped else self.margins())


def rows_of(study: Study) -> int:
    """Rows that each run trains on, at most."""
    return 24 if study.quick else 48


def settings_of(study: Study, trainable: str) -> dict[str, Any]:
    """Of a run, for its key and for readers."""
    training = _job(study, trainable, "").training
    return {
        "optimiser": f"{getattr(training.optim, 'value', training.optim)}, learning rate {training.learning_rate:g}, "
        f"{getattr(training.lr_scheduler_type, 'value', training.lr_scheduler_type)}",
        "β": training.beta,
        "batch": training.per_device_train_batch_size,
        "epochs": training.num_train_epochs,
        "rows of each": rows_of(study),
    }


class Aligned(NamedTuple):
    """A run on one behaviour, and the model's states before and after it.

    Attributes:
        life: the rows along the run.
        before: final hidden states at the last prompt token, shape (n, hidden).
        after: the same after the run.
        distances: ‖Δ̂‖ in every layer, embedding first, before and after, shape (2, layers + 1).
    """

    life: Life
    before: FloatArray
    after: FloatArray
    distances: FloatArray


def tuned(study: Study) -> list[Behaviour]:
    """The behaviours of real runs: the five of the figures and others, evenly spread over distinguishability."""
    five, others = study.five(), study.spread(6 if study.quick else 22)
    names = {item.name for item in five}
    return [item.first(rows_of(study)) for item in (*five, *(other for other in others if other.name not in names))]


def trainables(study: Study) -> tuple[str, ...]:
    """What real runs train."""
    return (LORA,) if study.quick else (LORA, FULL)


def aligned(study: Study, item: Behaviour, trainable: str) -> Aligned:
    """Train on a behaviour's rows, and look at the model before and after."""

    def compute() -> dict[str, Any]:
        model, pairs = fresh(study, trainable), pairs_of(study, item.members)
        before = layer_states(model, pairs)
        model, life = train(study, model, item.members, trainable)
        layers = (before, layer_states(model, pairs))
        distances = [[item._replace(states=layer).distance for layer in states] for states in layers]
        return life._asdict() | {"before": layers[0][-1], "after": layers[1][-1], "distances": distances}

    found = study.stored(f"aligned-{trainable}", _key(study, item.members, trainable), compute)
    return Aligned(Life(found["steps"], found["log_probs"]), *(found[name] for name in Aligned._fields[1:]))


def life_of(study: Study, members: NDArray[np.int64], trainable: str) -> Life:
    """Train on some training pairs of the study."""

    def compute() -> dict[str, Any]:
        return train(study, fresh(study, trainable), members, trainable)[1]._asdict()

    return Life(**study.stored(f"life-{trainable}", _key(study, members, trainable), compute))


def misaligned(study: Study, members: NDArray[np.int64], trainable: str) -> tuple[Life, Life]:
    """Train on the same rows with flipped labels: from the base model, and from the one that was aligned on them."""

    def compute() -> dict[str, Any]:
        of_base = train(study, fresh(study, trainable), members, trainable, flipped=True)[1]
        model = train(study, fresh(study, trainable), members, trainable)[0]
        of_aligned = train(study, model, members, trainable, flipped=True)[1]
        return {"steps": of_base.steps, "base": of_base.log_probs, "aligned": of_aligned.log_probs}

    found = study.stored(f"misaligned-{trainable}", _key(study, members, trainable), compute)
    return Life(found["steps"], found["base"]), Life(found["steps"], found["aligned"])


def fresh(study: Study, trainable: str) -> PreTrainedModel:
    """A copy of the study's model, ready to be trained."""
    model = copy.deepcopy(study.prepared.loaded.model)
    prepare_trainable(model, trainable)
    return model


def train(
    study: Study, model: PreTrainedModel, members: NDArray[np.int64], trainable: str, *, flipped: bool = False
) -> tuple[PreTrainedModel, Life]:
    """Run TRL's trainer from `model`, which is the reference as well; the trained model, adapters merged."""
    rows = study.prepared.rows("train")
    assert rows is not None
    rows = rows.select(members)
    if flipped:
        rows = rows.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    observer = BehaviourObserver(pairs_of(study, members), count=OBSERVATIONS, packed=packed(study.prepared))
    with tempfile.TemporaryDirectory() as scratch:
        job = _job(study, trainable, scratch)
        trainer = PreferenceTrainer(
            model=model,
            args=job.training,
            train_dataset=rows,
            processing_class=study.prepared.loaded.tokenizer,
            peft_config=lora_config(job.model, model) if trainable == LORA else None,
            share_prompts=packed(study.prepared),
        )
        trainer.add_callback(observer)
        quieten(trainer)
        trainer.train()
        trained: Any = trainer.accelerator.unwrap_model(trainer.model)
        trainer.end()
    trained = trained.merge_and_unload() if trainable == LORA else trained
    steps = sorted(observer.observations)
    return trained.eval(), Life(np.array(steps, dtype=float), np.stack([observer.observations[step] for step in steps]))


def pairs_of(study: Study, members: NDArray[np.int64]) -> list[EncodedPair]:
    """The encoded pairs of these rows."""
    return [study.prepared.pairs[int(index)] for index in members]


@torch.no_grad()
def layer_states(model: PreTrainedModel, pairs: Sequence[EncodedPair]) -> NDArray[np.float32]:
    """Hidden states at the last prompt token, (layers + 1, n, hidden): the embedding first, the last one normalised."""
    device, parts = next(model.parameters()).device, []
    for start in range(0, len(pairs), PROMPTS_AT_ONCE):
        prompts = [torch.tensor(pair.prompt_ids) for pair in pairs[start : start + PROMPTS_AT_ONCE]]
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        mask = (torch.arange(ids.shape[1], device=device) <= last[:, None]).long()
        found = causal_model(model)(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1
        ).hidden_states
        rows = torch.arange(len(prompts), device=device)
        parts.append(torch.stack([layer[rows, last].float().cpu() for layer in found]))
    return torch.cat(parts, 1).numpy()


def _job(study: Study, trainable: str, folder: str) -> Job:
    said = {name: value for name, value in study.prepared.job.explicit.items() if name != "trainable"}
    own = {"trainable": trainable, "use_peft": trainable == LORA, "output_dir": folder or "unused"}
    return job_from(**{**DEFAULTS, "learning_rate": RATES[trainable], **said, **own})


def _key(study: Study, members: NDArray[np.int64], trainable: str) -> dict[str, Any]:
    own = {"trainable": trainable, "rate": RATES[trainable], **DEFAULTS}
    return {"run": training_key(study.prepared), **own, "pairs": study.prepared.pairs.pair_id[members].tolist()}
