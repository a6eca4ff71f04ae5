"""The four parameters of a sparse autoencoder and how they lie in memory.

Both matrices are stored feature-major, one contiguous row of `d_in` numbers per latent, which is
how the kernels read them. `W_enc_rows` is the parameter, as in the weight of an `nn.Linear`;
`W_enc`, the matrix of the papers, is its transposed view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsae.nn.check import check_rows
from fastsae.nn.loss import upcast
from fastsae.nn.parallel import ALONE, Parallel


class Parameters(nn.Module):
    """W_enc_rows and W_dec `[d_sae, d_in]`, b_enc `[d_sae]` and b_dec `[d_in]`.

    They start tied: rows of W_dec random with norm 1, W_enc its transpose, biases 0. Assigning a
    plain tensor to a parameter, or to `W_enc`, copies it.

    Raises:
        ValueError: a size is no integer or below 1, or dtype is not floating.
    """

    parallel: Parallel = ALONE
    """Over which processes the latents and the batch are spread: `fastsae.distributed.shard_`."""
    FLOAT32: ClassVar[tuple[str, ...]] = ()
    """Parameters and buffers that selection depends on: casts of the module leave them exact."""

    W_enc_rows: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        d_in, d_sae = plain(d_in), plain(d_sae)
        for name, size in (("d_in", d_in), ("d_sae", d_sae)):
            if type(size) is not int or size < 1:
                self._fail(f"{name} to be an integer >= 1, got {size!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            self._fail(f"dtype to be a floating torch.dtype, got {dtype!r}")
        self.d_in, self.d_sae = d_in, d_sae
        self._make_matrices(dtype, device)
        self._drawn = self.W_enc_rows.detach()[:1].clone()
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype, device=device))

    def _make_matrices(self, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        """Make both matrices."""
        self.W_dec = nn.Parameter(unit_rows(self.d_sae, self.d_in, dtype, device))
        self.W_enc_rows = nn.Parameter(self.W_dec.detach().clone())

    @property
    def W_enc(self) -> Tensor:
        """The encoder matrix `[d_in, d_sae]`: a view of the parameter `W_enc_rows`.

        Change it in place or by assignment; gradients are those of `W_enc_rows`.
        """
        return self.W_enc_rows.t()

    @W_enc.setter
    def W_enc(self, value: Tensor) -> None:
        if value.shape != self.W_enc.shape:
            self._fail(f"W_enc to be {[*self.W_enc.shape]}, got {[*value.shape]}")
        self.W_enc_rows = value.detach().t()

    @property
    def matrices(self) -> list[Tensor | None]:
        """The parameters that are matrices: W_enc_rows, then W_dec; None for what is none itself,
        as where it is parametrized."""
        return [self._parameters.get(name) for name in ("W_enc_rows", "W_dec")]

    @property
    def trains_decoder(self) -> bool:
        """Whether an update moves W_dec."""
        return self.W_dec.requires_grad

    @property
    def is_fresh(self) -> bool:
        """Whether this is as constructed: biases of zeros, the random encoder drawn then, and both
        matrices parameters of their own that train."""
        matrices = self.matrices
        if not all(p is not None and p.requires_grad for p in matrices):
            return False
        if matrices[0] is matrices[1] or self.W_enc_rows.is_meta:
            return False
        if bool(self.b_enc.any()) or bool(self.b_dec.any()):
            return False
        first = self.W_enc_rows[:1]
        return torch.allclose(first, self._drawn.to(first), rtol=0, atol=1e-2)

    @torch.no_grad()
    def decoder_norms(self) -> Tensor:
        """Return the norm of what each latent writes, `[d_sae]`, in float32 or float64."""
        norms: Tensor = torch.linalg.vector_norm(upcast(self.W_dec), dim=1)
        return norms

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale every row of W_dec to norm 1; rows of zeros stay.

        Raises:
            RuntimeError: W_dec is parametrized and its rows have other norms, which only the
                parametrization can change.
        """
        norm = self.decoder_norms().unsqueeze(1)
        if not parametrize.is_parametrized(self, "W_dec"):
            self.W_dec.div_(torch.where(norm > 0, norm, 1.0))
            return
        lowest, highest = (float(end) for end in norm.aminmax())
        if not 0.99 < lowest <= highest < 1.01:
            raise RuntimeError(
                f"{type(self).__name__}: expected the parametrization of W_dec to keep rows at "
                f"norm 1, got norms from {lowest:.4g} to {highest:.4g}"
            )

    @torch.no_grad()
    def remove_parallel_grad_(self) -> None:
        """Remove from W_dec.grad what points along each row: it would only change the row's norm.

        With d = row / |row| the gradient becomes g - (g . d) d. Rows of zeros keep theirs. A
        parametrized W_dec has no gradient of its own, and its parametrization keeps the norms.
        """
        if "W_dec" not in self._parameters or (grad := self.W_dec.grad) is None:
            return
        remove_parallel_(grad, self.W_dec)

    def __setattr__(self, name: str, value: Any) -> None:
        # A plain tensor is copied into the parameter, which keeps its layout and its optimizer
        # state; anything else (a new nn.Parameter too) is assigned as in every module.
        if name == "W_enc":
            object.__setattr__(self, name, value)  # the property, for an nn.Parameter too
            return
        held = self.__dict__.get("_parameters", {}).get(name)
        if held is None or not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            super().__setattr__(name, value)
            return
        if value.shape != held.shape:
            self._fail(f"{name} to be {[*held.shape]}, got {[*value.shape]}")
        with torch.no_grad():
            held.copy_(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        W_enc = state_dict.get(f"{prefix}W_enc")  # as other libraries name and lay it out
        if W_enc is not None and f"{prefix}W_enc_rows" not in state_dict:
            state_dict[f"{prefix}W_enc_rows"] = state_dict.pop(f"{prefix}W_enc").t().contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(torch.bfloat16)` must not round what selection depends on.
        before = {name: getattr(self, name).detach() for name in self.FLOAT32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            now = getattr(self, name)
            if not exact.is_meta and now.dtype != exact.dtype:
                now.data = exact.to(now.device)
                if now.grad is not None:
                    now.grad = now.grad.to(exact.dtype)
        return self

    def _rows(self, x: Tensor, name: str) -> Tensor:
        """Check `x: [..., d_in]` and flatten its leading dimensions."""
        return check_rows(type(self).__name__, x, name, like=self.W_enc_rows)

    def _fail(self, expectation: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: expected {expectation}")


def unit_rows(
    rows: int, width: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    """Return random rows of norm 1: `[rows, width]`; on the meta device their shape alone."""
    drawn = torch.empty(rows, width, dtype=dtype, device=device)
    if not drawn.is_meta:  # torch's shape functions of `norm` take seconds to import
        drawn = drawn.normal_()
        drawn /= drawn.norm(dim=1, keepdim=True)
    return drawn


def remove_parallel_(grad: Tensor, rows: Tensor) -> None:
    """Remove from each row of `grad` what points along that of `rows`, in place: both `[f, d]`."""
    along = torch.einsum("fd,fd->f", grad, rows)
    squared = torch.einsum("fd,fd->f", rows, rows)
    share = torch.where(squared > 0, along / squared, 0.0)
    grad.addcmul_(share.unsqueeze(1), rows, value=-1)


def plain(value: Any) -> Any:
    """Return a numpy or 0-d tensor scalar as the Python number it is; anything else unchanged."""
    return value.item() if getattr(value, "shape", None) == () else value
