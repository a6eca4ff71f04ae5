"""What one does with a trained SAE: attribution, circuits, examples, its error, steering."""

from fastsae.analysis.attention import (
    head_attribution,
    recursive_attribution,
    source_attribution,
)
from fastsae.analysis.circuits import connections, latent_attribution
from fastsae.analysis.cross_layer import cross_layer_attribution, virtual_weights
from fastsae.analysis.effect import EffectCurve, EffectRow, effect_curve
from fastsae.analysis.error import ErrorAnatomy, error_anatomy
from fastsae.analysis.examples import ActivatingExamples, Context, Latent
from fastsae.analysis.firing import Firing, firing
from fastsae.analysis.head_codes import (
    edge_scores,
    head_codes,
    node_scores,
    roc_auc,
    train_code_sae,
)
from fastsae.analysis.lens import promoted_tokens
from fastsae.analysis.steer import steer

__all__ = [
    "ActivatingExamples",
    "Context",
    "EffectCurve",
    "EffectRow",
    "ErrorAnatomy",
    "Firing",
    "Latent",
    "connections",
    "cross_layer_attribution",
    "edge_scores",
    "effect_curve",
    "error_anatomy",
    "firing",
    "head_attribution",
    "head_codes",
    "latent_attribution",
    "node_scores",
    "promoted_tokens",
    "recursive_attribution",
    "roc_auc",
    "source_attribution",
    "steer",
    "train_code_sae",
    "virtual_weights",
]
