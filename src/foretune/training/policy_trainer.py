"""Policy optimisation with TRL's `RLOOTrainer`: exact policy gradient of expected reward − β KL in expectation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, get_scheduler
from trl import ModelConfig, RLOOConfig, RLOOTrainer

from foretune.models.encoding import encode_prompt
from foretune.models.reward import FrozenReward, answered
from foretune.training.build import lora_config, prepare_trainable
from foretune.training.terminal import quieten

NAMES = ("proxy", "heldout")


def build_policy_trainer(
    model: PreTrainedModel,
    judges: Sequence[FrozenReward],
    arguments: RLOOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trainable: str,
    lora: ModelConfig,
    prompts: Sequence[Any],
    callbacks: Sequence[TrainerCallback],
) -> RLOOTrainer:
    """The trainer: it maximises the first judge's reward and logs those of all.

    Args:
        model: the policy.
        judges: reward models.
        arguments: the run's.
        tokenizer: of policy and judges.
        trainable: unembedding, lora or full.
        lora: describes the adapters.
        prompts: text or messages.
        callbacks: to add.
    """
    prepare_trainable(model, trainable)
    if trainable == "unembedding":
        # answers are drawn without autocast: a float32 output layer over a bfloat16 decoder
        model.get_output_embeddings().register_forward_pre_hook(_as_weights)
    arguments.reward_weights = [1.0] + [0.0] * (len(judges) - 1)
    trainer = RLOOTrainer(
        model=model,
        reward_funcs=[_reward(judge, name, tokenizer) for judge, name in zip(judges, NAMES, strict=False)],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tokenizer,
        peft_config=lora_config(lora, model) if trainable == "lora" else None,
        callbacks=list(callbacks),
    )
    quieten(trainer)
    return trainer


def _as_weights(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].to(layer.weight.dtype), *inputs[1:])


def _reward(judge: FrozenReward, name: str, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float]]:
    """The judge as TRL calls it."""

    def reward(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        sequences = [
            answered(encode_prompt(prompt, tokenizer), ids, tokenizer.eos_token_id)
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        return judge(sequences).tolist()

    reward.__name__ = name
    return reward


def planned_rates(trainer: RLOOTrainer) -> list[float]:
    """The learning rate of every step of a run that has not begun."""
    arguments = trainer.args
    steps = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return rates
