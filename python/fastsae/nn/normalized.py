"""SAEs of activations that are normalized token by token, as some libraries train them.

Sources: the options `normalize_activations` and `reshape_activations` of SAELens; Gao et al. 2024
(arXiv 2406.04093), whose released SAEs normalize as `layer_norm` does.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastsae.nn.context import STEP, StepContext
from fastsae.nn.loss import SAEOutput
from fastsae.nn.sae import SAE
from fastsae.nn.scaler import Columns
from fastsae.types import SparseActs

KINDS = ("none", "layer_norm", "constant_norm_rescale")
SHAPES = ("none", "hook_z")
EPS = 1e-5


class NormalizedSAE(nn.Module):
    """An SAE whose input is normalized, and whose output is put back to the scale of the input.

        layer_norm               u = (x - mean) / (std + 1e-5),   x_hat = std sae(u) + mean
        constant_norm_rescale    u = c x,  c = sqrt(d_in) / |x|,  x_hat = sae(u) / c

    Mean, std (with d_in - 1) and norm are of each token; 1e-5 is not in the way back, as in SAELens
    and in OpenAI's code. A transcoder's output is not put back: it has another scale than x.
    Factors that are the same for all tokens need no wrapper: `ActivationScaler` folds them.

    The code is that of `u`, so `decode` needs to know x. Use it where an SAE is used: `encode`,
    `encode_sparse`, `forward`, `reconstruct`, `evaluate`, `models.splice`. To train, train `sae` on
    `normalize(x)`, or use `loss` in a loop of your own.

    Args:
        sae: takes normalized rows.
        normalize_activations: `none`, `layer_norm` or `constant_norm_rescale`.
        reshape_activations: `none`, or `hook_z`: x may be `[..., heads, d_head]`, the heads of an
            attention, which are one row of the SAE side by side.

    Raises:
        ValueError: another name.
    """

    def __init__(
        self,
        sae: SAE,
        normalize_activations: str = "none",
        reshape_activations: str = "none",
    ) -> None:
        super().__init__()
        if normalize_activations not in KINDS:
            self._fail(f"normalize_activations in {', '.join(KINDS)}, got {normalize_activations}")
        if reshape_activations not in SHAPES:
            self._fail(f"reshape_activations in {', '.join(SHAPES)}, got {reshape_activations}")
        self.sae = sae
        self.normalize_activations = normalize_activations
        self.reshape_activations = reshape_activations

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.sae.d_in

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.sae.d_sae

    @property
    def columns(self) -> Columns:
        """The column blocks of a training batch, as `SAE.columns`."""
        return self.sae.columns

    @property
    def W_enc_rows(self) -> Tensor:
        """The encoder `[d_sae, d_in]` of the SAE inside."""
        return self.sae.W_enc_rows

    @property
    def W_enc(self) -> Tensor:
        """The encoder `[d_in, d_sae]` of the SAE inside."""
        return self.sae.W_enc

    @property
    def b_enc(self) -> Tensor:
        """The encoder's bias `[d_sae]`, of normalized activations."""
        return self.sae.b_enc

    @property
    def b_dec(self) -> Tensor:
        """The decoder's bias, in units of normalized activations."""
        return self.sae.b_dec

    @property
    def W_dec(self) -> Tensor:
        """The decoder `[d_sae, d_in]` of the SAE inside, in units of normalized activations."""
        return self.sae.W_dec

    @property
    def metadata(self) -> dict[str, Any]:
        """Free-form facts of the SAE inside."""
        return self.sae.metadata

    @metadata.setter
    def metadata(self, value: dict[str, Any]) -> None:
        self.sae.metadata = value

    def normalize(self, x: Tensor) -> Tensor:
        """Return what the SAE takes for `x: [..., d_in]`; same shape, in its dtype."""
        return self._normalized(self._flat(x))[0]

    def output_scale(self, x: Tensor) -> Tensor | float:
        """Return what the decoder's output for `x: [..., d_in]` is multiplied with: `[..., 1]`, or
        1 where nothing is put back."""
        return self._normalized(self._flat(x))[2] if self._restores else 1.0

    def encode_sparse(self, x: Tensor) -> SparseActs:
        """Return the sparse code of `x: [..., d_in]`, leading dimensions flattened to rows."""
        return self.sae.encode_sparse(self.normalize(x))

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense code `[..., d_sae]` of `x: [..., d_in]`."""
        return self.sae.encode(self.normalize(x))

    def decode(self, acts: Tensor | SparseActs, x: Tensor | None = None) -> Tensor:
        """Return the reconstruction from the code of `x`, whose scale it has.

        Args:
            acts: `[..., d_sae]`, or sparse.
            x: `[..., d_in]`, what the code is of; may be left out where nothing is normalized.

        Raises:
            ValueError: x is needed and not given.
        """
        y = self.sae.decode(acts)
        if not self._restores:
            return y
        if x is None:
            self._fail("decode(acts, x) with x, whose scale the reconstruction has, got no x")
        _, mean, scale = self._normalized(self._flat(x).reshape(*y.shape[:-1], self.d_in))
        return y * scale + mean

    def reconstruct(self, x: Tensor, acts: SparseActs) -> Tensor:
        """Return the reconstruction `[n, d]` from the code `acts` of `x: [n, d_in]`."""
        u, mean, scale = self._normalized(self._flat(x))
        y = self.sae.reconstruct(u, acts)
        return y * scale + mean if self._restores else y

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of `x: [..., d_in]`: in its shape, for transcoders
        `[..., d_out]`."""
        u, mean, scale = self._normalized(self._flat(x))
        y: Tensor = self.sae(u)
        if self._restores:
            y = y * scale + mean
        return y.reshape(x.shape) if y.shape[-1] == self.d_in else y

    def loss(
        self, x: Tensor, target: Tensor | None = None, *, context: StepContext = STEP
    ) -> SAEOutput:
        """See `SAE.loss`; of normalized activations, in their units."""
        if target is None and self.columns.targets:
            self._fail("a target, the layer's output y, got None")
        return self.sae.loss(self.normalize(x), target, context=context)

    def training_loss(self, batch: Tensor, context: StepContext = STEP) -> SAEOutput:
        """Return the loss of a training batch `[n, sum(columns.widths)]`; see `loss`."""
        x, target, _ = self.columns.split(batch)
        return self.loss(x, None if target is x else target, context=context)

    def extra_repr(self) -> str:
        """Show the constructor arguments in `repr`."""
        return (
            f"normalize_activations={self.normalize_activations}, "
            f"reshape_activations={self.reshape_activations}"
        )

    @property
    def _restores(self) -> bool:
        return self.normalize_activations != "none" and not self.columns.targets

    def _flat(self, x: Tensor) -> Tensor:
        """Return `x` in the dtype of the SAE, with heads side by side."""
        if self.reshape_activations == "hook_z" and x.shape[-1] != self.d_in:
            if x.ndim < 2 or x.shape[-1] * x.shape[-2] != self.d_in:
                self._fail(f"x [..., heads, d_head] with {self.d_in} numbers, got {[*x.shape]}")
            x = x.flatten(-2)
        return x.to(self.sae.W_enc_rows.dtype)

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Return u, and the mean and the scale that put it back: `[..., 1]` each."""
        if self.normalize_activations == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            std = x.std(-1, keepdim=True)
            return (x - mean) / (std + EPS), mean, std
        if self.normalize_activations == "constant_norm_rescale":
            scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / self.d_in**0.5
            scale = torch.where(scale > 0, scale, 1)  # a row of zeros stays one
            return x / scale, 0.0, scale
        return x, 0.0, 1.0

    def _fail(self, expectation: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: expected {expectation}")
