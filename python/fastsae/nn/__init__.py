"""Sparse autoencoder modules: one class per file, weights feature-major, losses without units."""

from fastsae.nn.batch_topk import BatchTopKSAE, MutualChoiceSAE
from fastsae.nn.feature_choice import FeatureChoiceSAE
from fastsae.nn.io import load
from fastsae.nn.loss import SAEOutput
from fastsae.nn.sae import SAE
from fastsae.nn.topk import TopKSAE

__all__ = [
    "SAE",
    "BatchTopKSAE",
    "FeatureChoiceSAE",
    "MutualChoiceSAE",
    "SAEOutput",
    "TopKSAE",
    "load",
]
