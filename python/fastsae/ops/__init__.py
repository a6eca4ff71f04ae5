"""The ops: native kernels behind checked functions, differentiable, compilable, on any device.

Both weight matrices are feature-major here: `W_enc [d_sae, d_in]`, `W_dec [d_sae, d_out]`.

Every op has derivatives of any order in reverse and forward mode, or says that it has none. They
work under `torch.func`, vmap, `torch.compile` and `torch.export`, with a dynamic batch size too.
"""

from fastsae.ops.batch_topk import batch_topk
from fastsae.ops.encode_batch_topk import encode_batch_topk
from fastsae.ops.encode_feature_topk import encode_feature_topk
from fastsae.ops.encode_gradient_topk import encode_gradient_topk
from fastsae.ops.encode_group_max import encode_group_max
from fastsae.ops.encode_threshold import encode_threshold
from fastsae.ops.encode_topk import encode_topk
from fastsae.ops.feature_topk import feature_topk
from fastsae.ops.group_by_latent import group_by_latent
from fastsae.ops.latent_scores import latent_scores
from fastsae.ops.sparse_adam_step import sparse_adam_step_
from fastsae.ops.sparse_decode import sparse_decode
from fastsae.ops.sparse_decode_error import sparse_decode_error
from fastsae.ops.sparse_decode_values_grad import sparse_decode_values_grad
from fastsae.ops.sparse_weight_grad import sparse_weight_grad
from fastsae.ops.threshold_select import threshold_select
from fastsae.ops.topk import topk
from fastsae.types import (
    BatchTopK,
    DecodeError,
    LatentGradients,
    LatentLists,
    LatentScores,
    MoreGradients,
    SparseActs,
    StepTensors,
    TopK,
)

__all__ = [
    "BatchTopK",
    "DecodeError",
    "LatentGradients",
    "LatentLists",
    "LatentScores",
    "MoreGradients",
    "SparseActs",
    "StepTensors",
    "TopK",
    "batch_topk",
    "encode_batch_topk",
    "encode_feature_topk",
    "encode_gradient_topk",
    "encode_group_max",
    "encode_threshold",
    "encode_topk",
    "feature_topk",
    "group_by_latent",
    "latent_scores",
    "sparse_adam_step_",
    "sparse_decode",
    "sparse_decode_error",
    "sparse_decode_values_grad",
    "sparse_weight_grad",
    "threshold_select",
    "topk",
]
