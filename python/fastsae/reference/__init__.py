"""Every op in plain torch: the specification, and the answer that every test compares with."""

from fastsae.reference.adam import sparse_adam_step_
from fastsae.reference.cross_layer import (
    cross_layer_batch_topk,
    cross_layer_decoder,
    cross_layer_fvu,
    cross_layer_jumprelu,
    cross_layer_outputs,
    cross_layer_pre_activations,
    cross_layer_topk,
)
from fastsae.reference.decode import (
    group_by_latent,
    sparse_decode,
    sparse_decode_error,
    sparse_decode_values_grad,
    sparse_weight_grad,
)
from fastsae.reference.encode import (
    encode_batch_topk,
    encode_gradient_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
    latent_scores,
    pre_activations,
)
from fastsae.reference.select import (
    batch_topk,
    feature_topk,
    keep_largest,
    threshold_select,
    topk,
)

__all__ = [
    "batch_topk",
    "cross_layer_batch_topk",
    "cross_layer_decoder",
    "cross_layer_fvu",
    "cross_layer_jumprelu",
    "cross_layer_outputs",
    "cross_layer_pre_activations",
    "cross_layer_topk",
    "encode_batch_topk",
    "encode_gradient_topk",
    "encode_group_max",
    "encode_threshold",
    "encode_topk",
    "feature_topk",
    "group_by_latent",
    "keep_largest",
    "latent_scores",
    "pre_activations",
    "sparse_adam_step_",
    "sparse_decode",
    "sparse_decode_error",
    "sparse_decode_values_grad",
    "sparse_weight_grad",
    "threshold_select",
    "topk",
]
