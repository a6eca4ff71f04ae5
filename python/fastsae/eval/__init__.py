"""Evaluation: reconstruction metrics, and what an SAE costs the model it is spliced into."""

from fastsae.eval.cross_entropy import CrossEntropy, cross_entropy
from fastsae.eval.evaluate import EvalResult, evaluate
from fastsae.eval.metrics import FVU, fvu, norm_limit
from fastsae.models.splice import ablate, replace, splice

__all__ = [
    "FVU",
    "CrossEntropy",
    "EvalResult",
    "ablate",
    "cross_entropy",
    "evaluate",
    "fvu",
    "norm_limit",
    "replace",
    "splice",
]
