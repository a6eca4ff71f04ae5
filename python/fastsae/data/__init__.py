"""Activations: harvest them from a language model, store them, read them back shuffled."""

from fastsae.data.harvest import harvest
from fastsae.data.store import ActivationStore

__all__ = ["ActivationStore", "harvest"]
