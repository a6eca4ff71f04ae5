"""fastsae: sparse autoencoders over handwritten C++ and CUDA ops."""

from fastsae import data, eval, nn, ops, reference, train
from fastsae.nn import (
    SAE,
    BatchTopKSAE,
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    MutualChoiceSAE,
    ReLUSAE,
    SAEOutput,
    SupervisedHead,
    TopKSAE,
    load,
    soup,
)
from fastsae.ops import SparseActs
from fastsae.train import TrainConfig, Trainer

__version__ = "0.1.0"
__all__ = [
    "SAE",
    "BatchTopKSAE",
    "FeatureChoiceSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "MutualChoiceSAE",
    "ReLUSAE",
    "SAEOutput",
    "SparseActs",
    "SupervisedHead",
    "TopKSAE",
    "TrainConfig",
    "Trainer",
    "data",
    "eval",
    "load",
    "nn",
    "ops",
    "reference",
    "soup",
    "train",
]
