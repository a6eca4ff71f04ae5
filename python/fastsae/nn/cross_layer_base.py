"""Cross-layer transcoders: latents that read one layer's MLP input and write all later outputs.

Sources: Ameisen et al. 2025, "Circuit tracing: revealing computational graphs in language models",
Transformer Circuits; Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model
diffing", Transformer Circuits, October update.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.batch_topk import BatchTopKSAE
from fastsae.nn.check import check_rows, is_whole
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.jumprelu import JumpReLUSAE
from fastsae.nn.layer_auxk import dead_of_layers, layered_auxk_loss
from fastsae.nn.layer_decoders import DECODERS
from fastsae.nn.layer_encoders import LayerEncoders
from fastsae.nn.layered import separated
from fastsae.nn.loss import SAEOutput, error_of
from fastsae.nn.parameters import plain
from fastsae.nn.sae import SAE
from fastsae.nn.scaler import Columns
from fastsae.nn.topk import TopKSAE
from fastsae.types import SparseActs


class CrossLayerMixin(LayerEncoders, SAE, register=False):
    """Mixin that turns an SAE class into a cross-layer transcoder; list it before that class.

        z_l     = x_l W_enc_l + b_enc_l,   f = select(z_0, ..., z_(L-1))
        y_hat_m = sum_(l <= m) f_l W_dec_(l -> m) + b_dec_m

    x_l and y_l are the input and the output of the MLP of layer l. Latents of all layers are
    numbered in one row, those of layer l from `l d_transcoder` on, and a code is one `SparseActs`
    over all of them. Inputs are `[..., n_layers d_model]`, the layers side by side, and so are
    outputs. Training data are all x, then all y, `[n, 2 n_layers d_model]`; the trainer scales each
    of these blocks on its own, so no layer dominates the loss, `fvu` over all outputs together, and
    folds the scales in at the end. mse is in scaled units.

    What a latent writes to all layers together has norm 1 while training (of tied decoders, its one
    row), so penalties need no weighting by it: `ReLUCrossLayerTranscoder(penalty="tanh")` has the
    paper's. See `nn.layer_decoders` for the kinds of decoders, and the selecting class for its
    options.

    Args:
        d_model: width of the input and of the output of a layer.
        n_layers: number of layers.
        d_transcoder: latents of each layer.
        k: as in the selecting class, over the latents of all layers; of each layer for
            select="layer".
        select: `token`, k entries of a token's latents of all layers, whichever are largest; or
            `layer`, k in every layer. For a batch of n tokens with BatchTopK, k n of these.
        decoders: `full`, `own`, `tied` or `low_rank`.
        rank: numbers a decoder row has, for `low_rank` alone.
        k_aux: dead latents of each layer that reconstruct the residual of each token; None takes
            the power of two closest to d_model / 2.

    Raises:
        ValueError: a size is no integer or below 1, another select or kind of decoders, a rank
            without low_rank or above d_model, and as in the selecting class.

    Gradients: all through the sparse ops, a layer at a time; no gradient is padded to other layers.
    Numerics: selection over all layers is exact and compares what the encoders return, which has
        been rounded if it is of 16 bits. Outputs are summed in float32 (float64 for float64).
    Cost: that of n_layers SAEs of d_transcoder latents, with decoders of
        n_layers (n_layers + 1) / 2 blocks; nothing of size [n, n_layers d_transcoder].
    """

    def __init__(
        self,
        d_model: int,
        n_layers: int,
        d_transcoder: int,
        k: float | None = None,
        *,
        select: str = "token",
        decoders: str = "full",
        rank: int | None = None,
        k_aux: int | None = None,
        **kwargs: Any,
    ) -> None:
        d_model, n_layers, d_transcoder = plain(d_model), plain(n_layers), plain(d_transcoder)
        sizes = (("d_model", d_model), ("n_layers", n_layers), ("d_transcoder", d_transcoder))
        for name, size in sizes:
            if type(size) is not int or size < 1:
                self._fail(f"{name} to be an integer >= 1, got {size!r}")
        if select not in ("token", "layer"):
            self._fail(f"select to be token or layer, got {select!r}")
        if decoders not in DECODERS:
            self._fail(f"decoders to be one of {', '.join(DECODERS)}, got {decoders!r}")
        rank = plain(rank)
        if decoders == "low_rank" and not (is_whole(rank) and 1 <= int(rank or 0) <= d_model):
            self._fail(f"rank to be an integer in 1..d_model = {d_model}, got {rank!r}")
        if decoders != "low_rank" and rank is not None:
            self._fail(f"rank for decoders='low_rank' alone, got {rank!r} for {decoders!r}")
        self.d_model, self.n_layers, self.d_transcoder = d_model, n_layers, d_transcoder
        self.select, self.decoders = select, decoders
        self.rank = None if rank is None else int(rank)
        if select == "layer":
            if not isinstance(self, TopKSAE | BatchTopKSAE):
                self._fail("select='token', as latents have thresholds of their own, got 'layer'")
            if k is not None and k > d_transcoder:
                self._fail(f"k <= d_transcoder = {d_transcoder} for select='layer', got k = {k}")
            if isinstance(self, BatchTopKSAE):
                kwargs["shape"] = (n_layers,)
        if k_aux is None:
            k_aux = min(d_transcoder, 2 ** max(0, round(math.log2(d_model / 2))))
        elif not 1 <= k_aux <= d_transcoder:
            self._fail(f"1 <= k_aux <= d_transcoder = {d_transcoder}, got k_aux = {k_aux}")
        if kwargs.setdefault("apply_b_dec_to_input", False):
            self._fail("apply_b_dec_to_input to be False, as b_dec is of the outputs, got True")
        super().__init__(d_model * n_layers, d_transcoder * n_layers, k, k_aux=k_aux, **kwargs)  # type: ignore[call-arg,arg-type]
        self.d_out = self.d_in
        for name in ("absolute", "select_by_decoder_norm"):
            if getattr(self, name, False):
                self._fail(f"{name} to be False, got True")

    @property
    def columns(self) -> Columns:
        """The column blocks of a training batch: inputs of all layers, then their outputs."""
        widths = (self.d_model,) * self.n_layers
        return Columns(widths, widths)

    def layers(self, x: Tensor) -> Tensor:
        """Return `x: [..., n_layers * d_model]` as `[..., n_layers, d_model]`: a view."""
        layers: Tensor = x.unflatten(-1, (self.n_layers, self.d_model))
        return layers

    def decode(self, acts: Tensor | SparseActs) -> Tensor:
        """Return the outputs of all layers: `[..., d_out]`, or `[n, d_out]` for sparse acts.

        Entries of value 0 of a JumpReLU get gradients, which its estimates need.
        """
        if acts.shape[-1] != self.d_sae:
            self._fail(f"acts to be [..., d_sae] with d_sae = {self.d_sae}, got {[*acts.shape]}")
        if isinstance(acts, SparseActs):
            return (self._written(acts) + self.b_dec).to(self.b_dec.dtype)
        blocks = acts.split(self.d_transcoder, -1)
        y_hat = self._summed(lambda layer: blocks[layer] @ self.W_decs[layer]) + self.b_dec
        return y_hat.to(acts.dtype)

    def _written(self, acts: SparseActs) -> Tensor:
        parts = separated(acts, self.n_layers)
        every = isinstance(self, JumpReLUSAE) and parts[0].values.requires_grad

        def write(layer: int) -> Tensor:
            return ops.sparse_decode(parts[layer], self.W_decs[layer], inactive_grad=every)

        return self._summed(write)

    def loss(
        self, x: Tensor, target: Tensor | None = None, *, context: StepContext = STEP
    ) -> SAEOutput:
        """See `SAE.loss`; the target is all outputs: `[..., n_layers d_model]`.

        Up to k_aux dead latents of every layer reconstruct together what is left of all outputs.
        """
        if target is None:
            self._fail("a target, the outputs of all layers, got None")
        out = super().loss(x, target, context=replace(context, dead=None))
        dead = dead_of_layers(self, context)
        if any(mask is not None for mask in dead):
            error = error_of(target, out.reconstruction).detach().flatten(0, -2)
            inputs = self._inputs(self._rows(x, "x"))
            out.aux_loss = layered_auxk_loss(self, inputs, error, dead, self.k_aux)
            out.loss = out.loss + self.auxk_alpha * out.aux_loss
        return out

    @torch.no_grad()
    def initialize_rows_(self, batch: Tensor, seed: int = 0) -> None:
        """See `SAE.initialize_rows_`; latents of all layers start at the same tokens, and what one
        writes to every layer is the direction of that token's output there."""
        blocks = [self._directions(t, seed) for t in batch.split(self.d_model, 1)]
        given, wanted = blocks[: self.n_layers], blocks[self.n_layers :]
        self.W_enc_rows.copy_(torch.cat(given))
        for layer, W in enumerate(self.W_decs):
            rows = torch.cat(wanted[layer:] if self.decoders in ("full", "low_rank") else
                             wanted[layer : layer + 1], 1)  # fmt: skip
            if self.decoders == "low_rank":  # whose maps have orthonormal rows at the start
                rows = rows @ self.W_maps[layer].to(rows.dtype).t()
            W.copy_(rows)
        self.normalize_decoder_()

    @property
    def start_rows(self) -> int:
        """See `SAE.start_rows`."""
        return self.d_transcoder

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        config = super().config()
        del config["d_in"], config["d_sae"]
        own = ("d_model", "n_layers", "d_transcoder", "select", "decoders", "rank")
        return {**{key: getattr(self, key) for key in own}, **config}

    def _rows(self, x: Tensor, name: str) -> Tensor:
        return check_rows(type(self).__name__, x, name, like=self.b_dec.unsqueeze(0))

    def _target_rows(self, target: Tensor) -> Tensor:
        like = self.b_dec.unsqueeze(0)
        return check_rows(type(self).__name__, target, "target", like=like, width="d_out")
