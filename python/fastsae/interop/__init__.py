"""Files that other libraries read and write."""

from fastsae.interop.load import load
from fastsae.interop.save import save, to_sae_lens

__all__ = ["load", "save", "to_sae_lens"]
