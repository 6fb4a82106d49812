"""One process of a test run: the command line with small shards, and with a death where the test wants one.

`python worker.py [--die RANK:MOMENT] verb …`; MOMENT is `shard` (before this process writes its second shard) or
`step` (at the third optimiser step).
"""

import os
import signal
import sys


def main(arguments: list[str]) -> None:
    from foretune import processes
    from foretune.cli.main import main as foretune
    from foretune.features import unembedding
    from foretune.models import kernels

    unembedding.PAIRS_PER_SHARD = 8
    # each process measures which kernel is faster; while others compute, they need not agree
    kernels.onednn_is_faster = lambda: False
    if arguments[0] == "--die":
        rank, moment = arguments[1].split(":")
        if int(rank) == processes.rank():
            {"shard": die_at_second_shard, "step": die_at_third_step}[moment]()
        arguments = arguments[2:]
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_the_cpu()
    foretune(arguments)


def allow_fsdp_on_the_cpu() -> None:
    """Accelerate looks at FSDP's settings on accelerators alone; torch's FSDP2 itself runs over gloo too."""
    from accelerate import DistributedType, PartialState

    start = PartialState.__init__

    def starting(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = starting


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_second_shard() -> None:
    from foretune.features.store import ShardStore

    write, written = ShardStore.write, []

    def dying(self, index, tensors):
        written.append(index)
        if len(written) == 2:
            self.path(index).with_suffix(f".{os.getpid()}.partial").write_bytes(b"half a shard")
            die()
        write(self, index, tensors)

    ShardStore.write = dying


def die_at_third_step() -> None:
    from foretune.training.observer import BehaviourObserver

    def dying(self, args, state, control, **kwargs):
        if state.global_step == 2:
            die()

    BehaviourObserver.on_step_begin = dying


if __name__ == "__main__":
    main(sys.argv[1:])
