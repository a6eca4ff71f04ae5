"""Which rows of a harvest belong to an SAE, for every command that is given both."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastsae.data import ActivationStore
    from fastsae.nn import SAE, NormalizedSAE


def activations_of(
    sae: SAE | NormalizedSAE,
    folder: str | os.PathLike[str],
    sites: Sequence[str] | None,
    *,
    split: str = "train",
    partial: bool = False,
) -> ActivationStore:
    """Open a harvest at some sites; None: those that the SAE was trained on, if it has them."""
    from fastsae.data import ActivationStore
    from fastsae.data.shards import Manifest
    from fastsae.interop.hooks import sites_in

    trained_on = sites_in(sae.metadata)
    held = Manifest.read(Path(folder), partial=partial).sites
    chosen = sites or (trained_on if set(trained_on) <= set(held) else None)
    return ActivationStore(folder, chosen, split=split, partial=partial)
