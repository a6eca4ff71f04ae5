"""Somebody's language model: load it, find its sites, read, replace, splice."""

from fastsae.models.load import load_model
from fastsae.models.sites import Site, describe, find_blocks, read, read_gradients, resolve
from fastsae.models.splice import ablate, replace, splice

__all__ = [
    "Site",
    "ablate",
    "describe",
    "find_blocks",
    "load_model",
    "read",
    "read_gradients",
    "replace",
    "resolve",
    "splice",
]
