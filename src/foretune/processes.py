"""The processes of one run, as `accelerate launch`, torchrun or SLURM start them: who am I, wait, share, stop together.

With one process every function returns at once and imports nothing. With several, what is said between them goes over
a gloo group of its own: a broken connection ends a wait at once, while a main process that computes for hours does not
(the default group's time-out is for training and stays the user's `--ddp_timeout`).
"""

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from foretune.errors import UserError

Result = TypeVar("Result")

LOST = (
    "another process of this run stopped, or the job was ended from outside; what is finished is kept, "
    "run the same command again to continue."
)
# Network file systems show a new file to other machines after at most this many seconds (their attribute cache).
VISIBLE_AFTER = 90.0
# A signal and a broken connection can stop a process at the same time: the second waits while the first speaks.
_stopping = threading.RLock()


class ProcessLostError(RuntimeError):
    """Another process failed, so this one has nothing to wait for; its own failure is told there."""


def count() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes tables and speaks to the user."""
    return rank() == 0


def launched_with_fsdp() -> bool:
    """Whether the launcher was told to divide parameters over the processes."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def mine(items: Sequence[Result]) -> Sequence[Result]:
    """This process's share of `items`: every count()-th, which may be none."""
    return items[rank() :: count()]


def together(work: Callable[[], Result] = lambda: None) -> list[Result]:
    """Every process does its `work`, all wait, and all get all results, in the order of ranks.

    Raises:
        UserError: in every process, where the work of one raised it.
        ProcessLostError: the work of another process raised something else.
    """
    if count() == 1:
        return [work()]
    outcomes: list[Any] = [None] * count()
    try:
        outcome = (work(), None)
    except Exception as error:
        with suppress(RuntimeError):  # the others may be gone already
            _exchange((None, str(error) if isinstance(error, UserError) else ""), outcomes)
        raise
    _exchange(outcome, outcomes)
    for _, failure in outcomes:
        if failure is not None:
            raise UserError(failure) if failure else ProcessLostError(LOST)
    return [result for result, _ in outcomes]


def on_main(work: Callable[[], Result]) -> Result:
    """The main process does `work` while the others wait; all get its result, or the UserError that it raised."""
    return together(lambda: work() if is_main() else None)[0]  # pyright: ignore


def wait_until(holds: Callable[[], bool]) -> bool:
    """Whether `holds` becomes true while a network file system may still be showing the old state."""
    deadline = time.monotonic() + VISIBLE_AFTER
    while not holds():
        if count() == 1 or time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def check_shared(folder: Path) -> None:
    """Refuse a folder that is not the same for all processes.

    Raises:
        UserError: what the main process wrote cannot be seen by all.
    """
    if count() == 1:
        return

    def leave_token() -> Path:
        token = folder / f".seen-by-all-{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --output_dir.") from error
        return token

    import socket

    token = on_main(leave_token)
    seen = together(lambda: (socket.gethostname(), wait_until(token.exists)))
    if is_main():
        token.unlink(missing_ok=True)
    if blind := sorted({host for host, found in seen if not found}):
        raise UserError(
            f"{folder} is not the same folder on all machines ({', '.join(blind)} cannot see what the main process "
            "writes): choose an --output_dir on storage that they share."
        )


def check_same(what: str, value: str) -> None:
    """Refuse to go on where processes hold different `value`s of `what`.

    Raises:
        UserError: they differ.
    """
    values = together(lambda: value)
    if len(set(values)) > 1:
        odd = [str(number) for number, other in enumerate(values) if other != values[0]]
        raise UserError(
            f"the processes see different {what} (process {', '.join(odd)} and the main process): start all of them "
            "with the same command, and give files by paths that lead to the same content on every machine."
        )


def sum_over(value: int) -> int:
    """The sum of `value` over all processes; all must call this equally often."""
    if count() == 1:
        return value
    import torch

    total = torch.tensor(value)
    torch.distributed.all_reduce(total, group=_group())
    return int(total)


def as_one_process() -> AbstractContextManager[None]:
    """Inside, transformers and accelerate see one process: each process runs a `Trainer` of its own."""
    single = {"backend": None, "num_processes": 1, "process_index": 0, "local_process_index": 0}
    return _state_of_accelerate("NO", single)


def with_whole_parameters() -> AbstractContextManager[None]:
    """Inside, a `Trainer` divides batches over the processes but no parameters, however the command was launched."""
    return _state_of_accelerate(None, {})


@contextmanager
def _state_of_accelerate(kind: str | None, changes: dict[str, Any]) -> Iterator[None]:
    if count() == 1:
        yield
        return
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import patch_environment

    states = (PartialState._shared_state, AcceleratorState._shared_state)
    kept = [dict(state) for state in states]
    kind = kind or ("MULTI_CPU" if str(PartialState().device).startswith("cpu") else "MULTI_GPU")
    PartialState._shared_state.update({**changes, "distributed_type": DistributedType(kind)})
    AcceleratorState._shared_state.clear()
    try:
        with patch_environment(accelerate_use_fsdp="false"):
            yield
    finally:
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)


def start() -> None:
    """Prepare a command line's process: a SIGTERM, which launchers send when another process has died, ends it.

    Python runs signal handlers between two of its instructions, so not while a process waits in a collective: the
    signal wakes a thread instead.
    """
    if count() == 1:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reader, 1) != bytes([signal.SIGTERM]):
            pass
        stop(LOST, code=143)

    threading.Thread(target=watch, daemon=True).start()


def stop(sentence: str | None, *, code: int) -> NoReturn:
    """End this process; of all processes of the run that stop, one says its sentence (None: it has been said)."""
    if count() > 1:
        _stopping.acquire()  # never given back: the process ends here
    if count() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # let it finish its sentence
    if sentence and (count() == 1 or first_to_speak()):
        print(f"foretune: {sentence}", file=sys.stderr)
    if count() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main() and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        time.sleep(3)  # no launcher keeps the store, this process does: those that stop too must be able to ask it
    os._exit(code)  # the usual way out would wait for processes that are gone


def is_loss(error: BaseException) -> bool:
    """Whether `error` says that another process is gone."""
    if count() == 1:
        return False
    import torch

    text = str(error).lower()
    broken = any(word in text for word in ("gloo", "nccl", "connection closed by peer", "connection reset by peer"))
    known = isinstance(error, ProcessLostError | torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and broken
    )
    earlier = error.__cause__ or error.__context__
    return known or (earlier is not None and is_loss(earlier))


def first_to_speak() -> bool:
    """Whether no other process of the run has spoken yet; asked at the launcher's store, where all can reach it."""
    import torch

    try:
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            # a launcher's store is there, if slow at times; without one, nobody may be left to answer
            timeout=timedelta(seconds=20 if "TORCHELASTIC_USE_AGENT_STORE" in os.environ else 5),
        )
        return store.add(f"foretune/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        # no launcher keeps a store, and the main process, which did, is gone or has not begun
        return rank() == (1 if torch.distributed.is_initialized() else 0)


def leave() -> None:
    """Take leave of the others at the end of a command."""
    if count() > 1 and "torch" in sys.modules:
        import torch

        if torch.distributed.is_initialized():
            together()
            torch.distributed.destroy_process_group()


def _exchange(mine: Any, into: list[Any]) -> None:
    import torch

    torch.distributed.all_gather_object(into, mine, group=_group())


@cache
def _group() -> Any:
    """The processes' own gloo group, made by all of them at their first exchange."""
    import torch

    if not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
