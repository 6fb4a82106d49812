"""Start the command line on several processes: real launches, over gloo on the CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = str(Path(__file__).parent / "worker.py")


def environment(**more: str) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **more}


def launch(count: int, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    """The command on `count` processes, started by torch's launcher (which `accelerate launch` calls too)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [*launcher, WORKER, *arguments] if count > 1 else [sys.executable, WORKER, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment(**more))


def launch_by_hand(count: int, *arguments: str) -> list[tuple[int, str]]:
    """The same without a launcher that stops the others, as with `srun`: each process's exit code and what it said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        variables = environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        command = [sys.executable, WORKER, *arguments]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables))
    said = [process.communicate(timeout=400)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]
