"""The four parameters of a sparse autoencoder and how they lie in memory.

Both matrices are stored feature-major, one contiguous row of `d_in` numbers per latent. `W_enc` is
still a `[d_in, d_sae]` parameter; its strides are those of a transposed `[d_sae, d_in]` tensor, and
gradients, Adam states, copies and casts keep them.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastsae.nn.check import check_rows
from fastsae.nn.loss import upcast


class Parameters(nn.Module):
    """W_enc `[d_in, d_sae]`, W_dec `[d_sae, d_in]`, b_enc `[d_sae]` and b_dec `[d_in]`.

    They start tied: rows of W_dec random with norm 1, W_enc its transpose, biases 0. Assigning a
    plain tensor copies it into the parameter.

    Raises:
        ValueError: a size below 1.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor

    def __init__(
        self, d_in: int, d_sae: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        if min(d_in, d_sae) < 1:
            self._fail(f"d_in >= 1 and d_sae >= 1, got d_in = {d_in}, d_sae = {d_sae}")
        self.d_in, self.d_sae = d_in, d_sae
        rows = torch.randn(d_sae, d_in, dtype=dtype, device=device)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().t())
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype, device=device))

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale every row of W_dec to norm 1; rows of zeros stay."""
        norm = torch.linalg.vector_norm(upcast(self.W_dec), dim=1, keepdim=True)
        self.W_dec.div_(torch.where(norm > 0, norm, 1.0))

    @torch.no_grad()
    def remove_parallel_grad_(self) -> None:
        """Remove from W_dec.grad what points along each row: it would only change the row's norm.

        With d = row / |row| the gradient becomes g - (g . d) d. Rows of zeros keep theirs.
        """
        if (grad := self.W_dec.grad) is None:
            return
        along = torch.einsum("fd,fd->f", grad, self.W_dec)
        squared = torch.einsum("fd,fd->f", self.W_dec, self.W_dec)
        share = torch.where(squared > 0, along / squared, 0.0)
        grad.addcmul_(share.unsqueeze(1), self.W_dec, value=-1)

    def __setattr__(self, name: str, value: Any) -> None:
        # A plain tensor is copied into the parameter, which keeps its layout and its optimizer
        # state; anything else (a new nn.Parameter too) is assigned as in every module.
        held = self.__dict__.get("_parameters", {}).get(name)
        if held is None or not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            super().__setattr__(name, value)
            return
        if value.shape != held.shape:
            self._fail(f"{name} to be {[*held.shape]}, got {[*value.shape]}")
        with torch.no_grad():
            held.copy_(value)

    def _rows(self, x: Tensor, name: str) -> Tensor:
        """Check `x: [..., d_in]` and flatten its leading dimensions."""
        return check_rows(type(self).__name__, x, name, like=self.W_enc)

    def _rows_enc(self) -> Tensor:
        """Return W_enc as the ops take it, `[d_sae, d_in]`: a view, as long as it is feature-major.

        Only a W_enc assigned as a new parameter, or loaded with `assign=True`, costs a copy.
        """
        return self.W_enc.t().contiguous()

    def _fail(self, expectation: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: expected {expectation}")
