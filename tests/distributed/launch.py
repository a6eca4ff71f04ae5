"""Start processes as a user does."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def once(tmp_path_factory, name, make):
    """Return the file `name` that `make(path)` writes, which is called by one worker of xdist."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    path = root / f"distributed-{name}"
    with (root / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(path)
    return path


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
