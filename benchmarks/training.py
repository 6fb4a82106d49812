"""`PreferenceTrainer` against TRL's `DPOTrainer`: LoRA runs of one epoch with the same rows, batch, dtype and seed.

Criteria, fixed before the first run: at least 4 times TRL's rows per second on persona and 1.7 times on HH dialogue,
both trainers as they are by default; and in float32 the same loss to 1e-4 at each of 50 steps. Timed is everything from
the constructor to the end of training: encoding, reference log-probabilities, all steps. "TRL, references once" is TRL
with `precompute_ref_log_probs`.

    python benchmarks/training.py --data ../shared/data
"""

import argparse
import os
import random
import tempfile
from pathlib import Path
from statistics import median

os.environ["TQDM_DISABLE"] = "1"

import torch
from datasets import Dataset
from harness import race, read, times_faster, write
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from foretune.data import load_preferences
from foretune.models.load import load_model
from foretune.training.trainer import PreferenceTrainer

SOURCES = {"persona": "persona", "hh": "hh/harmless-base-test.jsonl.gz"}
# rows of a batch, and in all; TRL's float32 batch of 8 dialogues needs 17 GB
SIZES = {
    "persona": {torch.bfloat16: (16, 96), torch.float32: (16, 48)},
    "hh": {torch.bfloat16: (8, 16), torch.float32: (4, 8)},
}
COLUMNS = ["prompt", "chosen", "rejected"]


def rows_of(source: Path, count: int) -> Dataset:
    """A random sample of rows."""
    rows = load_preferences(str(source), test_fraction=0.0).train
    return rows.select(random.Random(0).sample(range(len(rows)), count)).select_columns(COLUMNS)


def train(kind: type[DPOTrainer], rows: Dataset, dtype: torch.dtype, batch: int, **options) -> list[float]:
    """One run; the logged losses."""
    loaded = load_model("smollm2-135m", dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=1e-4,
            bf16=dtype == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            max_length=512,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        trainer = kind(
            model=loaded.model,
            args=arguments,
            train_dataset=rows,
            processing_class=loaded.tokenizer,
            peft_config=adapters,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def study(source: Path, dtype: torch.dtype, count: int, batch: int, rounds: int, earlier: dict | None) -> dict:
    """One data set in one dtype; rounds are added to those of an earlier study of the same."""
    rows = rows_of(source, count)
    methods = {
        "foretune": lambda: train(PreferenceTrainer, rows, dtype, batch),
        "TRL": lambda: train(DPOTrainer, rows, dtype, batch),
    }
    if dtype == torch.bfloat16 and batch == 16:
        methods["TRL, references once"] = lambda: train(DPOTrainer, rows, dtype, batch, precompute_ref_log_probs=True)
    seconds = race(methods, rounds=rounds, earlier=earlier and earlier["seconds"], warm_up=False)
    return {
        "rows": count,
        "batch": batch,
        "seconds": seconds,
        "rows_per_second": {name: count / median(times) for name, times in seconds.items()},
        "times_faster": times_faster(seconds, "foretune"),
    }


def same_losses(source: Path, steps: int = 50, batch: int = 2) -> dict:
    """Largest difference of the losses at any step, float32."""
    rows = rows_of(source, steps * batch)
    ours, theirs = (torch.tensor(train(kind, rows, torch.float32, batch)) for kind in (PreferenceTrainer, DPOTrainer))
    return {
        "steps": len(ours),
        "largest_difference": float((ours - theirs).abs().max()),
        "first_loss": float(theirs[0]),
        "last_loss": float(theirs[-1]),
    }


def main() -> None:
    """Run the studies and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="add rounds to the recorded ones, instead of starting anew")
    parser.add_argument("--sources", nargs="+", default=[*SOURCES], choices=[*SOURCES])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args()
    found: dict = read("training") or {"studies": {}}
    for name in options.sources:
        for dtype, (batch, count) in SIZES[name].items():
            if str(dtype).removeprefix("torch.") not in options.dtypes:
                continue
            title = f"{name}, {str(dtype).removeprefix('torch.')}"
            print(title, flush=True)
            earlier = found["studies"].get(title) if options.add else None
            found["studies"][title] = study(options.data / SOURCES[name], dtype, count, batch, options.rounds, earlier)
            print({key: found["studies"][title][key] for key in ("rows_per_second", "times_faster")}, flush=True)
            write("training", found)
    if "persona" in options.sources and "float32" in options.dtypes:
        found["same_losses"] = same_losses(options.data / SOURCES["persona"])
        print(found["same_losses"], flush=True)
        write("training", found)


if __name__ == "__main__":
    main()
