"""Read an SAE of any format: fastsae's own folders, and those of other libraries."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from fastsae._files.peek import pickled_names
from fastsae.interop import folder
from fastsae.interop.weights import Options, listed
from fastsae.nn import SAE, NormalizedSAE

HUB = "hf:"


class Format(Protocol):
    """What the module of a format has."""

    NAME: str

    def matches(self, path: Path) -> bool:
        """Return whether a file or folder is of this format, by the names in it."""

    def read(self, path: Path, options: Options) -> SAE | NormalizedSAE:
        """Return the SAE in eval mode."""


FORMATS = (
    "folder",
    "saelens",
    "dictionary_learning",
    "sparsify",
    "gemma_scope",
    "llama_scope",
    "llamascopium",
    "circuit_tracer",
    "saev",
    "openai",
    "hypothesaes",
    "overcomplete",
)
"""Modules of formats, in the order in which they are asked; imported by the first `load`."""


APART = ("saelens", "sparsify", "dictionary-learning")
"""Formats that have no file of their own in common: two of them in a folder are two SAEs."""


def formats() -> tuple[Format, ...]:
    """Return the formats in the order in which they are asked."""
    return tuple(cast("Format", import_module(f"fastsae.interop.{name}")) for name in FORMATS)


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    format: str | None = None,
    layer: int | None = None,
    k: int | None = None,
    threshold: float | None = None,
    allow_pickle: bool = False,
) -> SAE | NormalizedSAE:
    """Read an SAE that `save` or another library wrote; in eval mode.

        sae = fastsae.load("runs/sae")
        sae = fastsae.load("hf:google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")

    The format is recognized by the files: `docs/interop.md` lists them, with what is exact. What no
    class computes is refused. Scales and norms that the other library folds when it loads a file
    are folded in float64 and rounded once. Every byte of fastsae's own folders is compared with its
    checksum; one of a version that wrote none is read with a warning, and so is a checkpoint in the
    middle of a run.

    Args:
        path: a folder or file, or `hf:OWNER/NAME` of a repository on the Hugging Face hub, which
            may go on with a folder or file in it; that needs `huggingface_hub`.
        device: of the module.
        dtype: of its parameters; None: as stored.
        format: the name of a format, where files could be of several; None: recognized.
        layer: which one, of files of several layers.
        k: active latents per token, where files do not say (overcomplete).
        threshold: of all latents, where files do not say (overcomplete's BatchTopK).
        allow_pickle: whether a file may run any code while it is read, as whole modules do that
            were pickled. Only for files that you trust.

    Raises:
        FileNotFoundError: no such path, or a file is missing in it.
        ValueError: a file is damaged or edited, of no known format, or what it holds cannot be
            represented.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"load: expected dtype to be a floating torch.dtype, got {dtype!r}")
    options = Options(device, dtype, layer, k, threshold, allow_pickle)
    found = _fetched(str(path)) if str(path).startswith(HUB) else Path(path)
    if format is not None:
        return _named(format).read(found, options)
    matching = [candidate for candidate in formats() if candidate.matches(found)]
    if matching:
        whole = [candidate.NAME for candidate in matching if candidate.NAME in APART]
        if len(whole) > 1:
            raise ValueError(
                f"load: expected {found} to be of one format, got files of {', '.join(whole)}; "
                "give format="
            )
        return matching[0].read(found, options)
    if not found.exists():
        raise FileNotFoundError(f"load: expected {found}, found none")
    raise _unknown(found)


def _named(name: str) -> Format:
    by_name = {candidate.NAME: candidate for candidate in formats()}
    if name not in by_name:
        raise ValueError(f"load: expected format to be one of {', '.join(by_name)}, got {name!r}")
    return by_name[name]


def _unknown(path: Path) -> ValueError | FileNotFoundError:
    names = ", ".join(candidate.NAME for candidate in formats())
    if path.is_dir():
        held = sorted(entry.name for entry in path.iterdir())
        inside = ", ".join(held[:8]) + (", ..." if len(held) > 8 else "")
        if folder.WEIGHTS in held or folder.CONFIG in held:
            missing = folder.CONFIG if folder.WEIGHTS in held else folder.WEIGHTS
            return FileNotFoundError(f"load: expected {path} to hold {missing}, found none")
        if "state.json" in held and any(name.startswith("shard-") for name in held):
            return ValueError(
                f"load: expected an SAE in {path}, got a checkpoint of several processes; "
                "fit(resume=...) continues it, with any number of them, and writes the SAE"
            )
        return ValueError(
            f"load: expected {path} to be of one of the formats {names}, got a folder with "
            f"{inside or 'nothing'}"
        )
    of_parent = [candidate.NAME for candidate in formats() if candidate.matches(path.parent)]
    if of_parent:
        return ValueError(
            f"load: expected the folder of an SAE of {of_parent[0]}, {path.parent}, got a file in "
            f"it, {path.name}"
        )
    pickled = pickled_names(path)
    inside = f" of torch.save that names {listed(pickled)}" if pickled else ""
    return ValueError(
        f"load: expected {path} to be of one of the formats {names}, got a file{inside}"
    )


def _fetched(name: str) -> Path:
    """Return the local folder or file of `hf:owner/name/inside`, downloaded if need be."""
    parts = name.removeprefix(HUB).strip("/").split("/")
    if len(parts) < 2 or not all(parts) or ".." in parts:
        raise ValueError(f"load: expected hf:OWNER/NAME or hf:OWNER/NAME/FOLDER, got {name!r}")
    try:
        hub: Any = import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"load: expected huggingface_hub to be installed for {name}: "
            "pip install huggingface_hub"
        ) from None
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    wanted = [inside, f"{inside}/*"] if inside else None
    root = Path(hub.snapshot_download(repository, allow_patterns=wanted))
    if not (root / inside).exists():
        raise FileNotFoundError(f"load: expected {inside} in {repository}, found none")
    return root / inside
