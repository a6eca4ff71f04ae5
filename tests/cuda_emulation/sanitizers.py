"""How a Python is started so that a sanitizer watches the emulated kernels in it.

Neither Python nor torch is instrumented, so the sanitizer's runtime is loaded before both, and told
to watch only what was compiled for it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OPTIONS = {
    # Races only between instrumented accesses; 512 threads of a block need the longer history.
    "tsan": ("TSAN_OPTIONS", "ignore_noninstrumented_modules=1:history_size=4:exitcode=66"),
    # Python frees little at its end, and its allocators are its own.
    "asan": ("ASAN_OPTIONS", "detect_leaks=0:exitcode=66"),
}
UBSAN_OPTIONS = "print_stacktrace=1:halt_on_error=1:exitcode=66"
REPORT = re.compile(r"WARNING: ThreadSanitizer|ERROR: AddressSanitizer|runtime error:")
ROOT = Path(__file__).resolve().parents[2]


def runtime(library: Path, kind: str) -> str:
    """Return the sanitizer's runtime that a library was linked with."""
    linked = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"lib{kind}\S* => (\S+)", linked)
    assert found, f"{library.name}: expected to be linked with lib{kind}, got:\n{linked}"
    return found[1]


def environment(library: Path, kind: str) -> dict[str, str]:
    """Return the environment of a process that loads a library of that kind; plain: no sanitizer.

    Four blocks run at a time however few cores there are: a race between blocks needs two.
    """
    found = {**os.environ, "EMU_THREADS": "4", "PYTHONPATH": str(ROOT)}
    if kind in OPTIONS:
        name, value = OPTIONS[kind]
        found |= {"LD_PRELOAD": runtime(library, kind), name: value, "UBSAN_OPTIONS": UBSAN_OPTIONS}
    return found


def run_calls(library: Path, kind: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `tests.cuda_emulation.run_calls` with the emulated operators of a library."""
    command = [sys.executable, "-m", "tests.cuda_emulation.run_calls", "--library", str(library)]
    # ThreadSanitizer knows where addresses lie, and a kernel may scatter them further than that.
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    if kind == "tsan" and bits.exists() and int(bits.read_text()) > 28 and shutil.which("setarch"):
        command = ["setarch", "-R", *command]
    return subprocess.run(
        [*command, "--namespace", "fastsae_emulated", *arguments],
        env=environment(library, kind),
        capture_output=True,
        text=True,
        timeout=600,
    )
