"""What one does with a trained SAE: attribution, circuits, examples, its error, steering."""

from fastsae.analysis.approximation import Approximation, Share, approximation
from fastsae.analysis.attention import (
    head_attribution,
    recursive_attribution,
    source_attribution,
)
from fastsae.analysis.attributes import (
    LatentUnion,
    Splitting,
    attribute_f1,
    share_found,
    splitting,
    union_f1,
)
from fastsae.analysis.circuits import connections, latent_attribution
from fastsae.analysis.contrast import (
    Activity,
    Contrast,
    contrast,
    expert_activity,
    latent_activity,
)
from fastsae.analysis.control import Edit, edit_success, sparse_edit
from fastsae.analysis.cross_layer import cross_layer_attribution, virtual_weights
from fastsae.analysis.dark_matter import DarkMatter, EarlierOutput, Pursuit, SAEError, dark_matter
from fastsae.analysis.effect import EffectCurve, EffectRow, effect_curve
from fastsae.analysis.error import (
    ErrorAnatomy,
    LinearError,
    TokenErrors,
    error_anatomy,
    fit_linear_error,
    token_errors,
)
from fastsae.analysis.error_cost import ErrorCost, error_cost
from fastsae.analysis.examples import ActivatingExamples, Context, Latent
from fastsae.analysis.firing import Firing, firing
from fastsae.analysis.head_codes import (
    edge_scores,
    head_codes,
    node_scores,
    roc_auc,
    train_code_sae,
)
from fastsae.analysis.ioi import IOIPrompts, IOITask, Solved, solvable, solved
from fastsae.analysis.lens import promoted_tokens
from fastsae.analysis.steer import steer
from fastsae.analysis.supervised import SupervisedDictionary, supervised_dictionary
from fastsae.analysis.task import TaskPrompts, TaskRuns, task_activations
from fastsae.analysis.tune_experts import tune_experts

__all__ = [
    "ActivatingExamples",
    "Activity",
    "Approximation",
    "Context",
    "Contrast",
    "DarkMatter",
    "EarlierOutput",
    "Edit",
    "EffectCurve",
    "EffectRow",
    "ErrorAnatomy",
    "ErrorCost",
    "Firing",
    "IOIPrompts",
    "IOITask",
    "Latent",
    "LatentUnion",
    "LinearError",
    "Pursuit",
    "SAEError",
    "Share",
    "Solved",
    "Splitting",
    "SupervisedDictionary",
    "TaskPrompts",
    "TaskRuns",
    "TokenErrors",
    "approximation",
    "attribute_f1",
    "connections",
    "contrast",
    "cross_layer_attribution",
    "dark_matter",
    "edge_scores",
    "edit_success",
    "effect_curve",
    "error_anatomy",
    "error_cost",
    "expert_activity",
    "firing",
    "fit_linear_error",
    "head_attribution",
    "head_codes",
    "latent_activity",
    "latent_attribution",
    "node_scores",
    "promoted_tokens",
    "recursive_attribution",
    "roc_auc",
    "share_found",
    "solvable",
    "solved",
    "source_attribution",
    "sparse_edit",
    "splitting",
    "steer",
    "supervised_dictionary",
    "task_activations",
    "token_errors",
    "train_code_sae",
    "tune_experts",
    "union_f1",
    "virtual_weights",
]
