"""Folders as versions without checksums wrote them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def strip_checksums(folder: Path) -> None:
    """Turn a saved SAE into one of a version that wrote no checksums."""
    file = folder / "sae_weights.safetensors"
    save_file(load_file(file), file)
    cfg = json.loads((folder / "cfg.json").read_text())
    for name in ("checksum", "weights"):
        del cfg["metadata"]["fastsae"][name]
    (folder / "cfg.json").write_text(json.dumps(cfg))
