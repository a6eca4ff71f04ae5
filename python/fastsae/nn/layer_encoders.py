"""Encoders of several layers: every layer reads its own input, and selection looks at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.layer_decoders import LayerDecoders, LayerDictionary
from fastsae.nn.layered import joined, largest_of_batch
from fastsae.nn.threshold_sae import entry_capacity
from fastsae.types import BatchTopK, SparseActs

T = TypeVar("T")


class LayerEncoders(LayerDecoders):
    """Mixin of the rules of selection that classes need for the latents of all layers."""

    select: str

    def _inputs(self, x: Tensor) -> list[Tensor]:
        """Return the inputs of the layers, contiguous: [n, d_model] each."""
        return [part.contiguous() for part in x.split(self.d_model, 1)]

    def _each(self, x: Tensor, encode: Callable[[int, Tensor, LayerDictionary], T]) -> list[T]:
        """Return what `encode` makes of every layer, its input and its dictionary."""
        layers = zip(self._inputs(x), self.dictionaries, strict=True)
        return [encode(layer, *given) for layer, given in enumerate(layers)]

    def _above(self, x: Tensor, threshold: Tensor, context: StepContext = STEP) -> SparseActs:
        """Return the entries of `x: [n, d_in]` above `threshold`: [], [n_layers] or [d_sae]."""
        by = threshold.detach()
        of_layers = by.expand(self.n_layers) if by.ndim == 0 else by.view(self.n_layers, -1)
        if by.shape == (self.n_layers,):
            of_layers = by
        room = self._room(x.shape[0])

        def encode(layer: int, x: Tensor, own: LayerDictionary) -> SparseActs:
            return ops.encode_threshold(
                x,
                own.W_enc,
                own.b_enc,
                of_layers[layer],
                room,
                compute_dtype=context.compute_dtype,
            )

        return joined(self._each(x, encode))

    def _batch(
        self, x: Tensor, k: float, context: StepContext = STEP, divisor: Tensor | None = None
    ) -> BatchTopK:
        """Return the k n largest positive entries of all layers, or of each, with the smallest.

        Args:
            x: [n, d_in].
            k: mean number of entries per token.
            context: of the step.
            divisor: [d_sae], of pre-activations; None: 1.
        """
        by = None if divisor is None else divisor.split(self.d_transcoder)

        def encode(layer: int, x: Tensor, own: LayerDictionary) -> BatchTopK:
            W_enc, b_enc = own.W_enc, own.b_enc
            if by is not None:
                W_enc, b_enc = W_enc / by[layer].unsqueeze(1), b_enc / by[layer]
            most = min(k, self.d_transcoder)
            return ops.encode_batch_topk(x, W_enc, b_enc, most, compute_dtype=context.compute_dtype)

        found = self._each(x, encode)
        parts = [part.acts for part in found]
        if self.select == "layer":
            return BatchTopK(joined(parts), torch.stack([part.threshold for part in found]))
        return largest_of_batch(parts, torch.sym_int(k * x.shape[0]))

    def _projected(self, x: Tensor) -> Tensor:
        each = zip(x.split(self.d_model), self.dictionaries, strict=True)
        return torch.cat([own.W_enc @ part for part, own in each])

    def _room(self, n: int) -> int:
        """Return the places that the code of n tokens gets in a layer: as many as that of an SAE of
        so many latents has in a token, and in small batches a share of those it has in all."""
        k = getattr(self, "k", None) or 0
        per_token = max(8 * math.ceil(k), 4096 // self.n_layers, 256)
        return entry_capacity(n, self.d_transcoder, per_token, (1 << 22) // self.n_layers)
