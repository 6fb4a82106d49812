"""`foretune <verb> …`: chooses the verb before anything heavy is imported; a user's mistake ends with exit code 2."""

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from foretune import processes

VERBS = {
    "audit": "measure how distinguishable each behaviour is, who helps and who hurts whom",
    "forecast": "forecast the configured run per behaviour (audits first)",
    "train": "run it with TRL, every behaviour measured on the way",
    "verify": "lay forecast and run side by side",
    "what_if": "forecast a changed run from a forecast's features, in seconds",
    "compare": "run several methods (dpo, ipo, slic, …) on the same data and lay them side by side",
    "reward": "a reward model: audit, forecast, train with TRL, forecast beside outcome",
    "rlhf": "train a policy on a reward model, every behaviour's reward and KL forecast and measured",
    "report": "write report.html from a run folder and show the summary",
    "replay": "repeat a run folder's verbs in a new folder and compare the numbers",
    "reproduce": "test the paper's claims on your model and data, one page a claim",
    "demo": "all of it, on the embedded model and the bundled data",
}

USAGE = """\
usage: foretune <verb> [arguments]

Know what preference tuning will do to your model before you run it.

{verbs}

audit, forecast and train take the YAML and flags of `trl dpo`, reward and rlhf
those of `trl reward` and `trl rloo`:
  foretune forecast --config dpo.yaml
  foretune forecast --model_name_or_path smollm2-135m --dataset_name bundled:statements --output_dir run
All verbs continue in the same run folder (--output_dir). `foretune <verb> --help` lists a verb's arguments.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 a mistake in the input (one sentence on standard error)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        sys.exit(0 if given else 2)
    if given[0] in ("-V", "--version"):
        from foretune import __version__

        print(f"foretune {__version__}")
        sys.exit(0)
    if given[0] not in VERBS:
        _fail(f"unknown verb '{given[0]}': use {', '.join(VERBS)}.")
    _quiet_libraries()
    _wait_asleep()
    from foretune.errors import UserError

    processes.start()
    try:
        _imported(f"foretune.cli.{given[0]}").run(given[1:])
        processes.leave()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped; run the same command again to continue.", code=130)
    except Exception as error:
        if processes.is_loss(error):
            _fail(processes.LOST, code=1)
        _fail_on_resources(error)


def usage() -> str:
    """The text of `foretune --help`."""
    width = max(map(len, VERBS))
    return USAGE.format(verbs="\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()))


def _fail_on_resources(error: BaseException) -> None:
    """One sentence for a full disk or memory, which no check foresees; anything else is a bug and keeps its trace."""
    import errno

    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        _fail(f"the disk is full ({text}): free some space and run the same command again; it continues.")
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "DefaultCPUAllocator" in text:
        _fail(
            "memory ran out: try a smaller --per_device_train_batch_size or --max_length, or "
            "--gradient_checkpointing True; run the same command again, it continues."
        )
    if processes.count() > 1:
        import traceback

        _fail("".join(traceback.format_exception(error)).rstrip(), code=1)
    raise error


def _fail(sentence: str, *, code: int = 2) -> NoReturn:
    processes.stop(sentence, code=code)


def _wait_asleep() -> None:
    """Let OpenMP threads (GNU's, on Linux) that wait for each other go to sleep after some microseconds.

    By default that takes milliseconds, after each operation: where another process computes, such a thread holds the
    core that the one it waits for needs (measured: design/forward-passes.md). To be set before torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _imported(name: str) -> ModuleType:
    """The module; no garbage is searched for meanwhile, nor later among what it imports.

    Such searches are a fifth of the time of the imports, and half a second before each training run.
    """
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.enable()
        gc.freeze()


def _quiet_libraries() -> None:
    """Hide other libraries' bars and warnings: what a user must know, foretune says itself."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
