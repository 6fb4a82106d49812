"""Training in the terminal: one bar with the current loss, instead of every metric of every behaviour."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


class TrainingBar(TrainerCallback):
    """A bar over optimiser steps, with the last logged loss and reward accuracy."""

    def __init__(self) -> None:
        """No bar yet."""
        self._bars: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar on the main process."""
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
        self._task = self._bars.add_task("", total=state.max_steps, completed=state.global_step)
        self._bars.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        if self._bars is not None:
            self._bars.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show what was logged last."""
        if self._bars is not None and logs and "loss" in logs:
            accuracy = logs.get("rewards/accuracies")
            text = f"loss {logs['loss']:.4f}" + (f", accuracy {accuracy:.2f}" if accuracy is not None else "")
            self._bars.update(self._task, description=text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bars is not None:
            self._bars.stop()


def quieten(trainer: Trainer) -> None:
    """Take away the callbacks that print every logged metric."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
