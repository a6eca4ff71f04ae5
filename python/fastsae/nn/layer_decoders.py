"""The parameters of a cross-layer transcoder, and four kinds of decoders, by what a latent writes.

    W_enc_rows  [n_layers d_transcoder, d_model]   rows of one layer after those of the one before
    W_decs[l]   [d_transcoder, width]              one row for each latent of layer l

    full        width (n_layers - l) d_model: a row holds what is written to l, l + 1, ... in turn
    own         width d_model, written to layer l alone: transcoders of single layers side by side
    tied        width d_model, written to l and all later layers, to layer m times output_scale[m]
    low_rank    width rank: the row of `full` is that of W_decs[l] times W_maps[l] [rank, ...]

No decoder has room for the layers before its own. Source: Ameisen et al. 2025, "Circuit tracing",
for `full`; the other kinds trade what can be written for memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsae.nn.loss import upcast
from fastsae.nn.parameters import Parameters, remove_parallel_, unit_rows
from fastsae.nn.scaler import divided, per_column

DECODERS = ("full", "own", "tied", "low_rank")


class LayerDictionary(NamedTuple):
    """Views of the parameters of the latents of one layer."""

    W_enc: Tensor
    """[d_transcoder, d_model]"""
    b_enc: Tensor
    """[d_transcoder]"""
    W_dec: Tensor
    """[d_transcoder, width]: the parameter `W_decs[l]`."""


class LayerDecoders(Parameters):
    """Mixin of the parameters; `CrossLayerMixin` sets the sizes before they are made."""

    d_model: int
    n_layers: int
    d_transcoder: int
    decoders: str
    rank: int | None
    W_decs: nn.ParameterList
    W_maps: nn.ParameterList
    output_scale: Tensor

    def _make_matrices(self, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        self.W_enc_rows = nn.Parameter(unit_rows(self.d_sae, self.d_model, dtype, device))
        wide = [self.d_model * (self.n_layers - layer) for layer in range(self.n_layers)]
        widths = {
            "full": wide,
            "own": [self.d_model] * self.n_layers,
            "tied": [self.d_model] * self.n_layers,
            "low_rank": [self.rank or 0] * self.n_layers,
        }[self.decoders]
        rows = (unit_rows(self.d_transcoder, width, dtype, device) for width in widths)
        self.W_decs = nn.ParameterList([nn.Parameter(W) for W in rows])
        if self.decoders == "low_rank":
            assert self.rank is not None
            maps = (_orthonormal_rows(self.rank, width, dtype, device) for width in wide)
            self.W_maps = nn.ParameterList([nn.Parameter(W) for W in maps])
        if self.decoders == "tied":
            ones = torch.ones(self.n_layers, dtype=dtype, device=device)
            self.register_buffer("output_scale", ones)

    @property
    def dictionaries(self) -> list[LayerDictionary]:
        """The dictionaries of the layers, in order: views of W_enc_rows and b_enc, and W_decs.

        All gradients of them come through `ops.encode_*` of these W_enc and b_enc and
        `ops.sparse_decode` of these W_dec; those of W_maps through a matmul after it.
        """
        size = (self.n_layers, self.d_transcoder)
        W_enc, b_enc = (t.unflatten(0, size).unbind() for t in (self.W_enc_rows, self.b_enc))
        return [LayerDictionary(*each) for each in zip(W_enc, b_enc, self.W_decs, strict=True)]

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """Not there: one matrix for all layers would be mostly zeros."""
        self._fail("code that takes a decoder for each layer, W_decs, got one that reads W_dec")

    @property
    def matrices(self) -> list[Tensor | None]:
        """See `Parameters.matrices`."""
        maps = [*self.W_maps] if self.decoders == "low_rank" else []
        return [self._parameters.get("W_enc_rows"), *self.W_decs, *maps]

    @property
    def trains_decoder(self) -> bool:
        """See `Parameters.trains_decoder`."""
        trained: set[bool] = {W.requires_grad for W in self.W_decs}
        if len(trained) > 1:
            self._fail("all or none of W_decs to be frozen, got some")
        return trained.pop()

    @torch.no_grad()
    def decoder_norms(self) -> Tensor:
        """See `Parameters.decoder_norms`: over all layers that a latent writes to, where each has
        a row of its own; of tied decoders, that of the row."""
        return torch.cat([self._norms(layer) for layer in range(self.n_layers)])

    def _norms(self, layer: int) -> Tensor:
        W = upcast(self.W_decs[layer])
        if self.decoders == "low_rank":  # |w M|^2 = w M M^T w^T
            M = upcast(self.W_maps[layer])
            return ((W @ (M @ M.t())) * W).sum(1).clamp_min(0).sqrt()
        norms: Tensor = torch.linalg.vector_norm(W, dim=1)
        return norms

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale the rows of W_decs to what has norm 1, see `decoder_norms`; rows of zeros stay."""
        for layer, W in enumerate(self.W_decs):
            norm = self._norms(layer).unsqueeze(1)
            W.div_(torch.where(norm > 0, norm, 1.0))

    @torch.no_grad()
    def remove_parallel_grad_(self) -> None:
        """See `Parameters.remove_parallel_grad_`: of the rows of W_decs."""
        for W in self.W_decs:
            if W.grad is not None:
                remove_parallel_(W.grad, W)

    @torch.no_grad()
    def divide_columns_(self, inputs: Sequence[float], targets: Sequence[float]) -> None:
        """See `SAE.divide_columns_`; scales of tied decoders go into `output_scale`."""
        for (W_enc, _, _), by in zip(self.dictionaries, inputs, strict=True):
            W_enc.copy_(divided(W_enc, by))
        if self.decoders == "tied":
            self.output_scale.div_(self.output_scale.new_tensor(targets))
            return
        wide = self.W_maps if self.decoders == "low_rank" else self.W_decs
        for layer, W in enumerate(wide):
            to = targets[layer:] if self.decoders != "own" else targets[layer : layer + 1]
            W.copy_(divided(W, per_column(to, [self.d_model] * len(to), self.b_enc)))

    def written(self, layer: int) -> Tensor:
        """Return what the latents of a layer write to it and to every later one:
        `[d_transcoder, n_layers - layer, d_model]`, a view of W_decs[layer] if `full`."""
        W: Tensor = self.W_decs[layer]
        later = self.n_layers - layer
        if self.decoders == "low_rank":
            W = W @ self.W_maps[layer]
        if self.decoders in ("full", "low_rank"):
            return W.view(self.d_transcoder, later, self.d_model)
        row = W.unsqueeze(1)
        if self.decoders == "own":
            return nn.functional.pad(row, (0, 0, 0, later - 1))
        return row * self.output_scale[layer:].to(W.dtype).unsqueeze(1)

    def _summed(self, write: Callable[[int], Tensor | None]) -> Tensor:
        """Return the outputs side by side, `[..., n_layers d_model]` without b_dec, in float32 or
        float64.

        Args:
            write: from a layer to its code times W_decs[layer]: [..., width]; None for nothing.
        """
        parts: list[Tensor | None] = [None] * self.n_layers
        for layer in range(self.n_layers):
            if (out := write(layer)) is None:
                continue
            if self.decoders == "low_rank":
                out = out @ self.W_maps[layer]
            for later, block in enumerate(upcast(out).split(self.d_model, -1), start=layer):
                before = parts[later]
                parts[later] = block if before is None else before + block
        if self.decoders == "tied":
            sums = list(accumulate(parts, _plus))
            scales = self.output_scale.unbind()
            parts = [None if s is None else s * by for s, by in zip(sums, scales, strict=True)]
        some = next(part for part in parts if part is not None)
        return torch.cat([torch.zeros_like(some) if p is None else p for p in parts], -1)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def _orthonormal_rows(
    rows: int, width: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    drawn = torch.empty(width, rows, dtype=dtype, device=device)
    if drawn.is_meta:
        return drawn.t().contiguous()
    found: Tensor = torch.linalg.qr(upcast(drawn.normal_())).Q.t()
    return found.to(drawn.dtype).contiguous()
