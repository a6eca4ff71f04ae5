"""Every op in plain torch: the specification, and the answer that every test compares with."""

from fastsae.reference.adam import LatentGradients, StepTensors, sparse_adam_step_
from fastsae.reference.decode import FeatureLists, sparse_decode, sparse_weight_grad, transpose
from fastsae.reference.encode import (
    encode_batch_topk,
    encode_threshold,
    encode_topk,
    pre_activations,
)
from fastsae.reference.select import (
    BatchTopK,
    TopK,
    accumulator_dtype,
    batch_topk,
    feature_topk,
    keep_largest,
    threshold_select,
    topk,
)
from fastsae.reference.sparse_acts import SparseActs

__all__ = [
    "BatchTopK",
    "FeatureLists",
    "LatentGradients",
    "SparseActs",
    "StepTensors",
    "TopK",
    "accumulator_dtype",
    "batch_topk",
    "encode_batch_topk",
    "encode_threshold",
    "encode_topk",
    "feature_topk",
    "keep_largest",
    "pre_activations",
    "sparse_adam_step_",
    "sparse_decode",
    "sparse_weight_grad",
    "threshold_select",
    "topk",
    "transpose",
]
