"""Keep your own trainer, and see what every behaviour does: a callback on a plain `DPOTrainer`.

The model is a tiny Llama with random weights, so that this is quick; the data are bundled. Run:
`python examples/own_trainer.py`
"""

import tempfile

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer

from foretune.data import load_preferences
from foretune.models.encoding import encode
from foretune.models.load import resolve_name
from foretune.training.observer import BehaviourObserver

BEHAVIOURS = ["brief-answers", "warm-tone"]
STEPS = 20


def main() -> None:
    """Train for 20 steps and read the margins of both behaviours."""
    set_seed(0)
    folder, _ = resolve_name("smollm2-135m")  # for its tokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_preferences("bundled:free_text", behaviours=BEHAVIOURS, max_pairs_per_behaviour=32)

    with tempfile.TemporaryDirectory() as output:
        arguments = DPOConfig(
            output_dir=output,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            precompute_ref_log_probs=True,  # a model without a name has no second copy to load
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        pairs = list(encode(data.train, tokenizer, split="train", max_length=arguments.max_length))
        logged: list[dict[str, float]] = []
        observer = BehaviourObserver(pairs, count=5, beta=arguments.beta, log=logged.append)
        trainer = DPOTrainer(
            model=tiny_llama(len(tokenizer)),
            args=arguments,
            train_dataset=data.train,
            processing_class=tokenizer,
            callbacks=[observer],
        )
        trainer.train()

    steps = sorted(observer.observations)
    for step, metrics in zip(steps, logged, strict=True):
        margins = {name: metrics[f"observed_train_rewards/margins/{name}"] for name in BEHAVIOURS}
        print(f"step {step:2}: " + ", ".join(f"{name} {margin:+.4f}" for name, margin in margins.items()))
    assert steps == [0, 5, 10, 15, 20], steps
    for name in BEHAVIOURS:
        key = f"observed_train_rewards/margins/{name}"
        assert logged[0][key] == 0.0, "before the first step the model is its own reference"
        assert logged[-1][key] > 0.0, f"{name} was not learned"


def tiny_llama(vocabulary: int) -> LlamaForCausalLM:
    """A random model of two layers."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).to(torch.float32)


if __name__ == "__main__":
    main()
