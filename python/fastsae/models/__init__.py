"""Somebody's language model: load it, find its sites, read, replace, splice."""

from fastsae.models.blocks import find_blocks
from fastsae.models.check import SiteReport, check_sites
from fastsae.models.load import load_model, load_tokenizer
from fastsae.models.read import read, read_gradients
from fastsae.models.resolve import resolve
from fastsae.models.sites import Site, describe
from fastsae.models.splice import ablate, replace, splice

__all__ = [
    "Site",
    "SiteReport",
    "ablate",
    "check_sites",
    "describe",
    "find_blocks",
    "load_model",
    "load_tokenizer",
    "read",
    "read_gradients",
    "replace",
    "resolve",
    "splice",
]
