"""Crosscoders: one code for the activations of several layers, or of several models.

Source: Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing",
Transformer Circuits, October update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.nn.batch_topk import BatchTopKSAE
from fastsae.nn.parameters import plain
from fastsae.nn.relu import ReLUSAE
from fastsae.nn.sae import SAE
from fastsae.nn.scaler import Columns
from fastsae.nn.topk import TopKSAE


class CrossCoderMixin(SAE, register=False):
    """Mixin that turns an SAE class into a crosscoder; list it before the class that selects.

        z = sum_l (x_l - b_dec_l) W_enc_l + b_enc,   f = select(z),   x_hat_l = f W_dec_l + b_dec_l

    The same as an SAE of the layers side by side, `[..., n_layers * d_layer]`, which is what all
    methods take; `layers` gives views by layer. Two things differ: the trainer scales every layer
    on its own, so that none dominates, and `layer_norms` says where each latent writes. While
    training, a latent's rows of all layers together have norm 1. mse is in scaled units, as the
    layers have different ones.

    Args:
        d_layer: width of the activations of one layer.
        n_layers: number of layers.
        d_sae: number of latents.
        k: as in the selecting class.

    Raises:
        ValueError: n_layers below 1, and as in the selecting class.
    """

    def __init__(
        self, d_layer: int, n_layers: int, d_sae: int, k: float | None = None, **kwargs: Any
    ) -> None:
        if n_layers < 1:
            self._fail(f"n_layers >= 1, got {n_layers}")
        super().__init__(d_layer * n_layers, d_sae, k, **kwargs)  # type: ignore[call-arg,arg-type]
        self.d_layer, self.n_layers = plain(d_layer), plain(n_layers)

    @property
    def columns(self) -> Columns:
        """The column blocks of a training batch: the layers."""
        return Columns((self.d_layer,) * self.n_layers)

    def layers(self, x: Tensor) -> Tensor:
        """Return `x: [..., n_layers * d_layer]` as `[..., n_layers, d_layer]`: a view."""
        layers: Tensor = x.unflatten(-1, (self.n_layers, self.d_layer))
        return layers

    @torch.no_grad()
    def layer_norms(self) -> Tensor:
        """Return the norms of each latent's decoder rows by layer: `[d_sae, n_layers]`.

        Divided by their sum over layers they say how much of a latent belongs to each; for two
        models side by side, values near 0 and 1 are latents of one model alone.
        """
        return self.layers(self.W_dec).square().sum(2).sqrt()

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        config = super().config()
        del config["d_in"]
        return {"d_layer": self.d_layer, "n_layers": self.n_layers, **config}


class CrossCoder(CrossCoderMixin, BatchTopKSAE):
    """BatchTopK crosscoder: `CrossCoder(d_layer, n_layers, d_sae, k)`; see `CrossCoderMixin`."""


class TopKCrossCoder(CrossCoderMixin, TopKSAE):
    """TopK crosscoder; see `CrossCoderMixin`."""


class ReLUCrossCoder(CrossCoderMixin, ReLUSAE):
    """ReLU crosscoder with a sparsity penalty; see `CrossCoderMixin` and `ReLUSAE`.

    The penalty weighs a latent by its norm over all layers together, which is 1, not by the sum of
    its norms by layer as in the paper.
    """
