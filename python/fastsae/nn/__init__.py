"""Sparse autoencoder modules: one class per file, weights feature-major, losses without units."""

from fastsae.nn.batch_topk import BatchTopKSAE, MutualChoiceSAE
from fastsae.nn.feature_choice import FeatureChoiceSAE
from fastsae.nn.gated import GatedSAE
from fastsae.nn.io import load
from fastsae.nn.jumprelu import JumpReLUSAE
from fastsae.nn.loss import SAEOutput
from fastsae.nn.relu import ReLUSAE
from fastsae.nn.sae import SAE
from fastsae.nn.soup import soup
from fastsae.nn.supervised_head import SupervisedHead
from fastsae.nn.topk import TopKSAE

__all__ = [
    "SAE",
    "BatchTopKSAE",
    "FeatureChoiceSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "MutualChoiceSAE",
    "ReLUSAE",
    "SAEOutput",
    "SupervisedHead",
    "TopKSAE",
    "load",
    "soup",
]
