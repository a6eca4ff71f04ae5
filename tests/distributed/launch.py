"""Start processes as a user does."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def command(world, script, *args, restarts=0):
    """Return the command line that runs `script` of this folder in `world` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher.append(f"--max-restarts={restarts}")
    return [*launcher, f"--nproc-per-node={world}", str(HERE / script), *map(str, args)]


def settings():
    """Return the environment of a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}


def torchrun(world, script, *args, timeout=300):
    """Run `script` in `world` processes to the end."""
    done = subprocess.run(
        command(world, script, *args),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=settings(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done
