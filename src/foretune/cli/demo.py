"""`foretune demo`: audit, forecast, a real LoRA run and the comparison, on the embedded model and the bundled data."""

from collections.abc import Sequence

from foretune.cli.finish import finish
from foretune.models.embedded import EMBEDDED_MODEL
from foretune.verbs.job import parse_job
from foretune.verbs.progress import Progress
from foretune.verbs.run_all import run_all

DEMO = {
    "--model_name_or_path": EMBEDDED_MODEL,
    "--dataset_name": "bundled:statements",
    "--use_peft": "True",
    "--learning_rate": "2e-4",
    "--lr_scheduler_type": "constant_with_warmup",
    "--warmup_steps": "5",
    "--per_device_train_batch_size": "16",
    "--num_train_epochs": "1",
    "--observe_pairs": "20",
    "--output_dir": "demo",
}


def run(arguments: Sequence[str]) -> None:
    """Run everything; any argument overrides the demo's own."""
    defaults = [word for flag, value in DEMO.items() if flag not in arguments for word in (flag, value)]
    finish(run_all(parse_job([*defaults, *arguments], prog="foretune demo"), Progress()))
