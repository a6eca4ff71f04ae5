"""Activations: sources of rows, and harvests of a language model on disk."""

from fastsae.data.arrays import open_activations
from fastsae.data.by_site import SiteBatches, SiteColumns, by_site, only_sites
from fastsae.data.harvest import harvest
from fastsae.data.inputs import ModelInputs
from fastsae.data.source import ActivationSource, IterableSource, TensorSource
from fastsae.data.store import ActivationStore
from fastsae.data.stream import Stream, stream

__all__ = [
    "ActivationSource",
    "ActivationStore",
    "IterableSource",
    "ModelInputs",
    "SiteBatches",
    "SiteColumns",
    "Stream",
    "TensorSource",
    "by_site",
    "harvest",
    "only_sites",
    "open_activations",
    "stream",
]
