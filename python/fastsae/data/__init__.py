"""Activations: sources of rows, and harvests of a language model on disk."""

from fastsae.data.harvest import harvest
from fastsae.data.source import ActivationSource, IterableSource, TensorSource
from fastsae.data.store import ActivationStore

__all__ = ["ActivationSource", "ActivationStore", "IterableSource", "TensorSource", "harvest"]
