"""Several processes on the CPU, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start_processes(n_processes, *command, check=True, **environment):
    """The finished run of a script, in so many processes that find each other on loopback."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n_processes}"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*torchrun, "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
