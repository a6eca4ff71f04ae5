"""Compare registers, static shared memory and spills of every kernel with committed ceilings.

    python -m bench.resources           # print and compare
    python -m bench.resources --write   # take the current values as the new ceilings

Reads what ptxas reported in the build (cmake/keep_ptxas_report.sh). Dynamic shared memory is chosen
at launch and is not part of it. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CEILINGS = ROOT / "csrc/cuda/resources.json"
OBJECTS = ROOT / "build/editable/CMakeFiles/fastsae_cuda.dir/csrc/cuda"


@dataclass(frozen=True)
class Used:
    """What one kernel takes on one architecture."""

    registers: int
    shared: int
    """Static shared memory, bytes."""
    spills: int = 0
    """Stores and loads, bytes."""


Resources = dict[str, dict[str, Used]]  # kernel -> architecture -> what it takes


def _arch(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def short(name: str) -> str:
    """Return a demangled kernel without namespaces, argument list and return type."""
    cast = r"\((anonymous namespace|int|bool|unsigned int|[\w:]+::Move)\)(::)?|<unnamed>::"
    name = re.sub(cast, "", name)
    name = re.sub(r"fastsae::cuda::|^void ", "", name)
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i].replace(" ", "")
    return name.replace(" ", "")


def parse(text: str) -> Resources:
    """Return what ptxas -v said, its names demangled."""
    found: Resources = {}
    kernel, arch, spills = "", "", 0
    for line in text.splitlines():
        if m := re.search(r"Compiling entry function '(.+)' for '(\w+)'", line):
            kernel, arch, spills = short(m[1]), m[2], 0
        elif m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills += int(m[1]) + int(m[2])
        elif m := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            used = Used(int(m[1]), int(shared[1]) if shared else 0, spills)
            found.setdefault(kernel, {})[arch] = used
    return found


def serialized(text: str) -> list[str]:
    """Return one line for each wait that ptxas put between products of a warpgroup, which then run
    one after another: it says so, and nothing else tells.
    """
    found = re.findall(r"\((C75\d\d)\) (.+?) in function '(.+)'", text)
    return [
        f"{short(kernel)}: expected products that ptxas adds nothing to, got {code}: {what}"
        for code, what, kernel in found
    ]


def problems(
    found: Resources, ceilings: Mapping[str, Mapping[str, list[int]]], spilling: Mapping[str, int]
) -> list[str]:
    """Return one line for each kernel that is above its ceiling or has none."""
    lines = []
    for kernel, archs in found.items():
        for arch, used in archs.items():
            at = f"{kernel} on {arch}"
            if used.spills > spilling.get(kernel, 0):
                most = spilling.get(kernel, "no")
                lines.append(f"{at}: expected {most} bytes of spills, got {used.spills}")
            if arch not in ceilings.get(kernel, {}):
                lines.append(f"{at}: expected a ceiling in {CEILINGS.name}, got none")
                continue
            registers, shared = ceilings[kernel][arch]
            if used.registers > registers:
                lines.append(f"{at}: expected at most {registers} registers, got {used.registers}")
            if used.shared > shared:
                lines.append(f"{at}: expected at most {shared} bytes shared, got {used.shared}")
    lines += [
        f"{kernel}: expected a kernel for its ceiling, got none"
        for kernel in sorted({*ceilings, *spilling} - {*found})
    ]
    return lines


def table(found: Resources) -> str:
    """Return a table of kernels by architecture: registers / shared bytes, and any spills."""
    archs = sorted({arch for used in found.values() for arch in used}, key=_arch)
    width = max(map(len, found), default=0)
    lines = [" ".join([f"{'registers / shared bytes':{width}}", *(f"{a:>16}" for a in archs)])]
    for kernel in sorted(found):
        cells = []
        for arch in archs:
            u = found[kernel].get(arch)
            text = f"{u.registers} / {u.shared}" if u else ""
            cells.append(f"{text + (f' !{u.spills}' if u and u.spills else ''):>16}")
        lines.append(" ".join([f"{kernel:{width}}", *cells]))
    return "\n".join(lines)


def written(found: Resources, nvcc: str, spilling: Mapping[str, int]) -> str:
    """Return the file of ceilings, one line per kernel; `spills_allowed` is edited by hand."""
    kernels = ",\n".join(
        f"    {json.dumps(kernel)}: "
        + json.dumps(
            {
                a: [u.registers, u.shared]
                for a, u in sorted(found[kernel].items(), key=lambda item: _arch(item[0]))
            }
        )
        for kernel in sorted(found)
    )
    marks = json.dumps(dict(spilling))
    head = f'"nvcc": {json.dumps(nvcc)},\n  "spills_allowed": {marks}'
    return f'{{\n  {head},\n  "ceilings": {{\n{kernels}\n  }}\n}}\n'


def reports_of(objects: Path) -> str:
    """Return what ptxas reported about every launcher that still exists, its names demangled."""
    reports = sorted(objects.glob("*.cu.o.ptxas"))
    reports = [
        r for r in reports if (ROOT / "csrc/cuda" / r.name.removesuffix(".o.ptxas")).exists()
    ]
    if not reports:
        sys.exit(f"resources: expected reports of ptxas in {objects}, got none: make build")
    text = "".join(r.read_text() for r in reports)
    names = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return names.stdout


def main() -> int:
    """Parse arguments, read, print, compare."""
    from fastsae import _host

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=Path, default=OBJECTS, help="folder of the build")
    parser.add_argument("--write", action="store_true", help="write the ceilings")
    arguments = parser.parse_args()
    text = reports_of(arguments.objects)
    found = parse(text)
    nvcc = ".".join(str(_host.build_info()["cuda"]).split(".")[:2])
    known = json.loads(CEILINGS.read_text()) if CEILINGS.exists() else {}
    spilling = known.get("spills_allowed", {})
    print(table(found))
    if arguments.write:
        CEILINGS.write_text(written(found, nvcc, spilling))
        return 0
    if known.get("nvcc") != nvcc:
        print(f"not compared: the ceilings are those of nvcc {known.get('nvcc')}, this is {nvcc}")
        return 0
    lines = problems(found, known["ceilings"], spilling) + serialized(text)
    print("\n".join(f"resources: {line}" for line in lines), end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
