"""Programs of several processes on the CPU: a process without threads imports all, once, and is forked then."""

import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_program(path, *arguments):
    """Runs a test's program, which calls `fork_processes`, to its end."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, path, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def fork_processes(n_processes, target):
    """Calls target(rank) in so many processes that find each other on loopback, as torchrun would.

    Where one does not end well, the others are killed.

    Returns:
        The exit status of each; -N where it died of signal N.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = {}
    for rank in range(n_processes):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                if n_processes > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_processes)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                target(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        ranks[process] = rank
    statuses = [0] * n_processes
    while ranks:
        process, status = os.wait()
        statuses[ranks.pop(process)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return statuses
