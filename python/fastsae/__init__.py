"""fastsae: sparse autoencoders over handwritten C++ and CUDA ops."""

from fastsae import ops
from fastsae.ops import SparseActs

__version__ = "0.1.0"
__all__ = ["SparseActs", "ops"]
