"""CUB's top-k of one long list, where its headers are: those of nvcc, or `pip install
nvidia-cuda-cccl`, whose folder may also be said in CCCL_INCLUDE. CUDA 13.0 has none yet.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent


def _folders() -> Iterator[Path]:
    if said := os.environ.get("CCCL_INCLUDE"):
        yield Path(said)
    nvcc = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if nvcc:
        yield Path(nvcc).resolve().parents[1] / "include/cccl"
    spec = importlib.util.find_spec("nvidia")
    for root in () if spec is None else spec.submodule_search_locations or ():
        yield Path(root) / "cu13/include/cccl"


def include() -> Path | None:
    """Return the folder of the headers, or None."""
    return next((f for f in _folders() if (f / "cub/device/device_topk.cuh").exists()), None)


def compile_into(library: Path, arch: str, headers: Path) -> None:
    """Compile the program for a GPU such as sm_90.

    Raises:
        RuntimeError: nvcc is missing or refuses.
    """
    nvcc = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if nvcc is None:
        raise RuntimeError("bench.cub: expected nvcc, found none")
    command = [nvcc, f"-arch={arch}", "-O3", "-std=c++20", "-I", str(headers), "-Xcompiler=-fPIC"]
    command += ["-shared", str(HERE / "cub_topk.cu"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"bench.cub: expected nvcc to compile, got {done.stderr[-500:]}")


@cache
def _library() -> ctypes.CDLL | None:
    headers = include()
    if headers is None:
        return None
    major, minor = torch.cuda.get_device_capability()
    file = HERE.parent / f"build/bench_cub_{major}{minor}.so"
    file.parent.mkdir(exist_ok=True)
    compile_into(file, f"sm_{major}{minor}", headers)
    return ctypes.CDLL(str(file))


def available() -> bool:
    """Return whether `topk` can run here."""
    try:
        return torch.cuda.is_available() and _library() is not None
    except RuntimeError as error:
        print(error)
        return False


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of `x` and their places, int32 in `x.flatten()`; in any order.

    Args:
        x: float32 or bfloat16, contiguous, on a GPU.
        k: how many.

    Raises:
        TypeError: another dtype.
        RuntimeError: an error of CUDA.
    """
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"bench.cub: expected float32 or bfloat16, got {x.dtype}")
    library = _library()
    assert library is not None
    values, places = x.new_empty(k), torch.empty(k, dtype=torch.int32, device=x.device)
    size = ctypes.c_size_t(0)
    stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
    space = None
    for _ in range(2):  # first how much room it wants
        code = library.cub_topk(
            int(x.dtype == torch.bfloat16),
            ctypes.c_void_p(None if space is None else space.data_ptr()),
            ctypes.byref(size),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int64(x.numel()),
            ctypes.c_int64(k),
            ctypes.c_void_p(values.data_ptr()),
            ctypes.c_void_p(places.data_ptr()),
            stream,
        )
        if code:
            raise RuntimeError(f"bench.cub: expected cub::DeviceTopK to run, got CUDA error {code}")
        space = torch.empty(max(size.value, 1), dtype=torch.uint8, device=x.device)
    return values, places
