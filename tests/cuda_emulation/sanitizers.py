"""How a Python is started so that a sanitizer watches the emulated kernels in it.

Neither Python nor torch is instrumented, so the sanitizer's runtime is loaded before both, and told
to watch only what was compiled for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPTIONS = {
    # Races only between instrumented accesses; 512 threads of a block need the longer history.
    "tsan": (
        "TSAN_OPTIONS",
        "ignore_noninstrumented_modules=1:history_size=4:exitcode=66:halt_on_error=1",
    ),
    # Python frees little at its end, and its allocators are its own.
    "asan": ("ASAN_OPTIONS", "detect_leaks=0:exitcode=66"),
}
UBSAN_OPTIONS = "print_stacktrace=1:halt_on_error=1:exitcode=66"
REPORT = re.compile(r"WARNING: ThreadSanitizer|ERROR: AddressSanitizer|runtime error:")
FLAGS = {
    "plain": (),
    "tsan": ("-fsanitize=thread",),
    "asan": ("-fsanitize=address,undefined", "-fno-omit-frame-pointer"),
}
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def runtime(library: Path, kind: str) -> str:
    """Return what goes before Python: the sanitizer's runtime, and C++'s, whose throw it wants."""
    linked = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    found = re.findall(rf"lib(?:{kind}|stdc\+\+)\S* => (\S+)", linked)
    assert len(found) == 2, f"{library.name}: expected to be linked with lib{kind}, got:\n{linked}"
    return " ".join(found)


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


def run_program(program: Path, kind: str, order: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program of `Build.program`, its threads in an order of the emulator."""
    command = [str(program)]
    if kind == "tsan" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # see run_calls
    found = {**os.environ, "EMU_ORDER": order, "UBSAN_OPTIONS": UBSAN_OPTIONS}
    found |= dict([OPTIONS[kind]] if kind in OPTIONS else [])
    return subprocess.run(command, env=found, capture_output=True, text=True, timeout=600)


@dataclass(frozen=True)
class Build:
    """Builds the emulated operators again from a changed copy of csrc, on what CMake built."""

    recipe: dict[str, Any]
    folder: Path
    emulators: dict[str, list[Path]] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Path, folder: Path) -> Build:
        """Read what CMake wrote down: compiler, torch, objects."""
        return cls(json.loads(recipe.read_text()), folder)

    def emulator(self, kind: str) -> list[Path]:
        """Return the emulator's objects of that kind, compiled at the first call."""
        if kind not in self.emulators:
            # It is not instrumented for ThreadSanitizer, but tells it which thread it runs.
            flags = ("-DEMU_TSAN=1",) if kind == "tsan" else FLAGS[kind]
            self.emulators[kind] = [
                self._compile(HERE / f"{name}.cpp", ROOT / "csrc", f"{name}_{kind}.o", flags)
                for name in ("async_units", "block", "fiber", "launch", "stream")
            ]
        return self.emulators[kind]

    def launcher(self, file: str, csrc: Path, kind: str, prefix: str = "") -> Path:
        """Return the object of `cuda/<file>.cu` of a copy of csrc."""
        name = f"{prefix or csrc.name}_{file}_{kind}.o"
        return self._compile(csrc / f"cuda/{file}.cu", csrc, name, FLAGS[kind])

    def program(self, csrc: Path, source: Path, launchers: tuple[str, ...], kind: str) -> Path:
        """Build a program, named like the folder of its C++ file, with launchers of some csrc."""
        name = f"{source.parent.name}_{source.stem}_{kind}"
        objects = [
            self._compile(source, csrc, f"{name}.o", FLAGS[kind]),
            *(self.launcher(file, csrc, kind, source.parent.name) for file in launchers),
            *self.emulator(kind),
        ]
        self._run(*FLAGS[kind], "-pthread", "-o", name, *map(str, objects))
        return self.folder / name

    def library(
        self, name: str, launchers: dict[str, Path], kind: str, emulator: list[Path]
    ) -> Path:
        """Link operators, the given launchers, and the built ones of all other files."""
        built = {Path(o).name.removesuffix(".cu.o"): o for o in self.recipe["launchers"]}
        # The changed ones first: of two copies of an inline function the linker takes the first.
        objects = [*launchers.values(), *(o for file, o in built.items() if file not in launchers)]
        out = self.folder / f"{name}.so"
        self._run(
            *(
                "-shared",
                *FLAGS[kind],
                "-pthread",
                "-o",
                str(out),
                *map(str, (*objects, *emulator)),
            ),
            *(*self.recipe["operators"], "-Wl,--no-as-needed", self.recipe["torch"]),
        )
        return out

    def _compile(self, source: Path, csrc: Path, name: str, flags: tuple[str, ...]) -> Path:
        out = self.folder / name
        include = (f"-I{csrc}", f"-I{HERE}")
        self._run(
            *("-std=c++20", "-fPIC", "-O1", "-g1", "-fvisibility=hidden", "-w", *flags, *include),
            *("-DFASTSAE_EMULATED", "-x", "c++", "-c", str(source), "-o", str(out)),
        )
        return out

    def _run(self, *arguments: str) -> None:
        command = [*filter(None, [shutil.which("ccache")]), self.recipe["compiler"], *arguments]
        # The folder is another one each time, which is nothing that an object depends on.
        cached = {"CCACHE_BASEDIR": str(self.folder), "CCACHE_NOHASHDIR": "1"}
        done = subprocess.run(
            command, cwd=self.folder, env=os.environ | cached, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def narrowed_copy(folder: Path) -> Path:
    """Copy csrc, with kernels for float32 only: a quarter of the time to compile."""
    shutil.copytree(ROOT / "csrc", folder)
    file = folder / "cuda/number.cuh"
    formats = r"(auto with_format\()Format format(, Call&& f\) \{\n).*?\n\}"
    only = r"\1Format\2  return f(Float32{});\n}"
    text, count = re.subn(formats, only, file.read_text(), flags=re.DOTALL)
    assert count == 1, f"number.cuh: expected one with_format, got {count}"
    file.write_text(text)
    return folder
