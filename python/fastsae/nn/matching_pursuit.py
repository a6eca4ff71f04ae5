"""Matching-pursuit SAE: latents are chosen one after the other, each for what is still unexplained.

Source: Costa et al. 2025, "From flat to hierarchical: extracting sparse representations with
matching pursuit" (arXiv 2506.03093); the stopping rules are those of SAELens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.nn.check import is_whole
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.parameters import plain
from fastsae.nn.sae import SAE
from fastsae.nn.scaler import ActivationScaler
from fastsae.types import SparseActs


class MatchingPursuitSAE(SAE):
    """Sparse autoencoder without an encoder: its code comes from the decoder alone.

        r <- x - b_dec
        repeat:  j = argmax_i relu(r . W_dec_i),   a = relu(r . W_dec_j)
                 f_j <- f_j + a,   r <- r - a W_dec_j

    A token is done after `max_iterations`, when |r| < residual_threshold, or when an iteration
    brought no new latent. Rows of W_dec are used as they are, so those of norm 1 are the usual
    pursuit. `W_enc_rows` is the parameter `W_dec`, and `b_enc` is 0 and not trained. Without
    `apply_b_dec_to_input`, b_dec is not added to the reconstruction either. See `SAE` for the other
    arguments; there are no dead latents to revive, so auxk_alpha is 0.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        max_iterations: most latents per token; None: d_in.
        residual_threshold: norm of the residual at which a token is done; 0: none.
        stop_on_duplicate_support: whether a token is done once an iteration brings no new latent.

    Raises:
        ValueError: max_iterations is not an integer above 0, or residual_threshold is negative.

    Gradients: W_dec and b_dec, through the values and residuals of all iterations.
    Cost: 2 n d_in d_sae flops in each iteration.
    """

    FLOAT32: ClassVar[tuple[str, ...]] = ("stop_norm",)

    stop_norm: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        max_iterations: int | None = None,
        *,
        residual_threshold: float = 0.01,
        stop_on_duplicate_support: bool = True,
        auxk_alpha: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, auxk_alpha=auxk_alpha, **kwargs)
        if max_iterations is not None and (not is_whole(max_iterations) or max_iterations < 1):
            self._fail(f"max_iterations to be an integer >= 1 or None, got {max_iterations}")
        if not residual_threshold >= 0:
            self._fail(f"residual_threshold >= 0, got {residual_threshold}")
        if auxk_alpha:
            self._fail(f"auxk_alpha = 0, since there is no encoder to train, got {auxk_alpha}")
        self.max_iterations = None if max_iterations is None else int(max_iterations)
        self.residual_threshold = plain(residual_threshold)
        self.stop_on_duplicate_support = bool(stop_on_duplicate_support)
        self.W_enc_rows = self.W_dec
        self.b_enc.requires_grad_(False)
        stop = torch.tensor(float(residual_threshold), dtype=torch.float32)
        self.register_buffer("stop_norm", stop.to(self.b_enc.device))

    def _encode(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        residual = x if (bias := self._input_bias()) is None else x - bias
        seen = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        values: list[Tensor] = []
        for _ in range(self.max_iterations or self.d_in):
            with torch.no_grad():
                j = ops.encode_topk(residual, self.W_dec, self.b_enc, 1).indices[:, 0].long()
            rows = self.W_dec[j]
            value = torch.where(done, 0, (residual * rows).sum(1).relu())
            residual = residual - value.unsqueeze(1) * rows
            with torch.no_grad():
                new = (seen != j.unsqueeze(1)).all(1) & (value > 0)
                seen = torch.cat([seen, torch.where(value > 0, j, -1).unsqueeze(1)], 1)
                values.append(value)
                if self.stop_on_duplicate_support:
                    done = done | ~new
                if self.residual_threshold > 0:
                    done = done | (torch.linalg.vector_norm(residual, dim=1) < self.stop_norm)
                if bool(done.all()):
                    break
        return self._merged(torch.stack(values, 1), seen)

    def _merged(self, values: Tensor, latents: Tensor) -> SparseActs:
        """Return the code of `values: [n, m]` of `latents`, -1 for none, those of one added up."""
        latents, order = latents.sort(1)
        values = values.gather(1, order)
        first = torch.ones_like(latents, dtype=torch.bool)
        first[:, 1:] = latents[:, 1:] != latents[:, :-1]
        place = first.cumsum(1) - 1
        total = torch.zeros_like(values).scatter_add(1, place, values)
        chosen = first & (latents >= 0)
        row = torch.arange(len(values), device=values.device).unsqueeze(1).expand_as(latents)
        counts = chosen.sum(1)
        offsets = nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        return SparseActs(
            total[row[chosen], place[chosen]], latents[chosen].int(), offsets, self.d_sae
        )

    def decode(self, acts: Tensor | SparseActs) -> Tensor:
        """See `SAE.decode`; without b_dec where it is not subtracted from x."""
        x_hat = super().decode(acts)
        return x_hat if self.apply_b_dec_to_input else x_hat - self.b_dec

    @property
    def holds_units(self) -> bool:
        """See `SAE.holds_units`: the norm of a residual."""
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.W_enc_rows = self.W_dec  # torch makes two of them on the way from meta
        return self

    @torch.no_grad()
    def fit_encoder_scale_(self, batch: Tensor) -> None:
        """Do nothing: there is no encoder."""

    @torch.no_grad()
    def rescale_code_(self, scaler: ActivationScaler) -> None:
        """See `SAE.rescale_code_`: the threshold is a norm of activations."""
        super().rescale_code_(scaler)
        self.stop_norm.div_(scaler.code_scale)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        own = ("max_iterations", "residual_threshold", "stop_on_duplicate_support")
        return {**super().config(), **{key: getattr(self, key) for key in own}}
