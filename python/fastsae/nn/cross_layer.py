"""Cross-layer transcoders, one class for each way to select; see `cross_layer_base`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.batch_topk import BatchTopKSAE
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.cross_layer_base import CrossLayerMixin
from fastsae.nn.jumprelu import JumpReLUSAE
from fastsae.nn.layer_decoders import LayerDictionary
from fastsae.nn.layered import largest
from fastsae.nn.relu import ReLUSAE
from fastsae.nn.topk import TopKSAE
from fastsae.types import BatchTopK, SparseActs, TopK


class CrossLayerTranscoder(CrossLayerMixin, TopKSAE):
    """TopK cross-layer transcoder: `CrossLayerTranscoder(d_model, n_layers, d_transcoder, k)`.

    Every token keeps the k largest latents of all layers, or of each; see `CrossLayerMixin`.
    """

    def _largest(self, x: Tensor, k: int, context: StepContext = STEP) -> SparseActs:
        most = min(k, self.d_transcoder)

        def encode(layer: int, x: Tensor, own: LayerDictionary) -> TopK:
            return ops.encode_topk(
                x, own.W_enc, own.b_enc, most, compute_dtype=context.compute_dtype
            )

        k_of_all = None if self.select == "layer" else k
        return largest(self._each(x, encode), self.d_transcoder, k_of_all)


class BatchTopKCrossLayerTranscoder(CrossLayerMixin, BatchTopKSAE):
    """BatchTopK cross-layer transcoder; see `CrossLayerMixin` and `BatchTopKSAE`.

    At inference latents are compared with one threshold, or with one for each layer,
    `threshold: [n_layers]`.
    """

    def _encode_batch(self, x: Tensor, context: StepContext = STEP) -> BatchTopK:
        return self._batch(x, self.k, context)

    def _encode_above_threshold(self, x: Tensor) -> SparseActs:
        self._check_threshold()
        return self._above(x, self.threshold.clamp_min(0))


class JumpReLUCrossLayerTranscoder(CrossLayerMixin, JumpReLUSAE):
    """JumpReLU cross-layer transcoder; see `CrossLayerMixin` and `JumpReLUSAE`.

    Every latent has a threshold, and the penalty counts active latents of all layers.
    """

    def _smallest_kept(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        assert self.k is not None
        divisor = None
        if threshold is not None:
            smallest = torch.finfo(torch.float32).tiny ** 0.5
            divisor = threshold.clamp_min(smallest).to(self.b_enc.dtype)
        return self._batch(x, self.k, divisor=divisor).threshold


class ReLUCrossLayerTranscoder(CrossLayerMixin, ReLUSAE):
    """ReLU cross-layer transcoder with a sparsity penalty; see `CrossLayerMixin` and `ReLUSAE`."""

    def _positive(self, x: Tensor, context: StepContext) -> SparseActs:
        return self._above(x, self.b_enc.new_zeros(()), context)
