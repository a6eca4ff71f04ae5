"""Sparse autoencoder modules: one class per file, weights feature-major, losses without units."""

from fastsae.nn.average import average_saes
from fastsae.nn.batch_topk import BatchTopKSAE, MutualChoiceSAE
from fastsae.nn.context import StepContext, group_reduce
from fastsae.nn.cross_layer import (
    BatchTopKCrossLayerTranscoder,
    CrossLayerTranscoder,
    JumpReLUCrossLayerTranscoder,
    ReLUCrossLayerTranscoder,
)
from fastsae.nn.crosscoder import CrossCoder, ReLUCrossCoder, TopKCrossCoder
from fastsae.nn.feature_choice import FeatureChoiceSAE
from fastsae.nn.gated import GatedSAE
from fastsae.nn.gradient import GradientSAE
from fastsae.nn.gradient_pursuit import gradient_pursuit
from fastsae.nn.group_max import GroupMaxSAE
from fastsae.nn.jumprelu import JumpReLUSAE
from fastsae.nn.loss import SAEOutput
from fastsae.nn.matching_pursuit import MatchingPursuitSAE
from fastsae.nn.matryoshka import HierarchicalTopKSAE, MatryoshkaSAE
from fastsae.nn.normalized import NormalizedSAE
from fastsae.nn.relu import ReLUSAE
from fastsae.nn.sae import SAE
from fastsae.nn.sampled import SampledSAE
from fastsae.nn.scaler import ActivationScaler, Columns
from fastsae.nn.supervised_head import SupervisedHead
from fastsae.nn.topk import TopKSAE
from fastsae.nn.transcoder import (
    BatchTopKTranscoder,
    GroupMaxTranscoder,
    JumpReLUTranscoder,
    ReLUTranscoder,
    Transcoder,
)

__all__ = [
    "SAE",
    "ActivationScaler",
    "BatchTopKCrossLayerTranscoder",
    "BatchTopKSAE",
    "BatchTopKTranscoder",
    "Columns",
    "CrossCoder",
    "CrossLayerTranscoder",
    "FeatureChoiceSAE",
    "GatedSAE",
    "GradientSAE",
    "GroupMaxSAE",
    "GroupMaxTranscoder",
    "HierarchicalTopKSAE",
    "JumpReLUCrossLayerTranscoder",
    "JumpReLUSAE",
    "JumpReLUTranscoder",
    "MatchingPursuitSAE",
    "MatryoshkaSAE",
    "MutualChoiceSAE",
    "NormalizedSAE",
    "ReLUCrossCoder",
    "ReLUCrossLayerTranscoder",
    "ReLUSAE",
    "ReLUTranscoder",
    "SAEOutput",
    "SampledSAE",
    "StepContext",
    "SupervisedHead",
    "TopKCrossCoder",
    "TopKSAE",
    "Transcoder",
    "average_saes",
    "gradient_pursuit",
    "group_reduce",
]
