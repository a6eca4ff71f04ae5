"""The types that ops and references share: sparse activations and small records of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import default_collate_fn_map


@dataclass(eq=False)
class SparseActs:
    """Sparse activations of `n` tokens over `d_sae` latents, in one of two layouts.

    - fixed k (TopK): `values: [n, k]`, `indices: [n, k]`, `offsets = None`.
    - variable (batch-wise selection, thresholds): `values: [capacity]`, `indices: [capacity]`,
      `offsets: [n + 1]`, rows ascending. Row i owns entries `offsets[i] : offsets[i + 1]`;
      entries at or past `offsets[-1]` are padding (value 0, index 0), which everything ignores.
      `capacity` follows from shapes alone, so no op has to ask the device how many there are.

    A code that is hardly sparse may come as `full`: the fixed layout with k = d_sae, whose values
    are the dense matrix.

    An entry whose value is exactly 0 is inactive: it decodes to nothing, gets no gradient and does
    not count as firing.

    It is a pytree whose leaves are its tensors, may be loaded with `torch.load(weights_only=True)`,
    and a DataLoader collates a list of them with `cat`.

    Args:
        values: floating point; may require grad.
        indices: int32, each in [0, d_sae).
        offsets: int32 or None.
        d_sae: number of latents.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    d_sae: int

    @classmethod
    def full(cls, dense: Tensor) -> SparseActs:
        """Return `dense: [n, d_sae]` as a code with an entry for every latent, not copied."""
        d_sae = dense.shape[1]
        every = torch.arange(d_sae, dtype=torch.int32, device=dense.device)
        return cls(dense, every.expand(dense.shape[0], -1), None, d_sae)

    @property
    def is_full(self) -> bool:
        """Whether this is from `full`, so that `values` is the dense code. On the CPU only:
        elsewhere it would be a wait."""
        return self.offsets is None and lists_every_latent(self.indices, self.d_sae)

    @property
    def n(self) -> int:
        """Number of tokens (rows)."""
        if self.offsets is None:
            return self.values.shape[0]
        return self.offsets.shape[0] - 1

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, d_sae)`, the shape of `to_dense()`."""
        return self.n, self.d_sae

    def rows(self) -> Tensor:
        """Return the row of every entry: int64, shape of `values`; `n` for padding."""
        device = self.values.device
        if self.offsets is None:
            return torch.arange(self.n, device=device).unsqueeze(1).expand(self.values.shape)
        return owners(self.offsets, self.values.shape[0])

    def row_counts(self) -> Tensor:
        """Return the number of active entries of every row: int64 `[n]`."""
        if self.offsets is None:
            return torch.count_nonzero(self.values.detach(), 1)
        active = self.values.detach() != 0
        counts = torch.zeros(self.n + 1, dtype=torch.int64, device=self.values.device)
        return counts.index_add_(0, self.rows(), active.long())[:-1]

    def l0(self) -> Tensor:
        """Return the mean number of active latents per token: float32 scalar."""
        active = self.values.detach() != 0
        if self.offsets is not None:  # padding is at the end
            active &= torch.arange(active.shape[0], device=active.device) < self.offsets[-1]
        return active.sum().float() / max(self.n, 1)

    def fired(self) -> Tensor:
        """Return which latents are active for at least one token: bool `[d_sae]`."""
        return self.counts() > 0

    def counts(self) -> Tensor:
        """Return for how many tokens each latent is active: int32 `[d_sae]`."""
        if self.is_full:
            return torch.count_nonzero(self.values.detach(), 0).int()
        counts = torch.zeros(self.d_sae, dtype=torch.int32, device=self.values.device)
        active = self.values.detach().flatten() != 0
        return counts.index_add_(0, self.indices.flatten().long(), active.int())

    def to_dense(self) -> Tensor:
        """Return the dense `[n, d_sae]` matrix; differentiable in `values`."""
        if self.is_full:
            return self.values.clone()
        dense = self.values.new_zeros(self.n + 1, self.d_sae)
        return dense.index_put((self.rows(), self.indices.long()), self.values, accumulate=True)[
            : self.n
        ]

    def to_csr(self) -> Tensor:
        """Return the active entries as a `torch.sparse_csr` tensor of shape `[n, d_sae]`."""
        active = self.values != 0
        rows, cols = self.rows()[active], self.indices[active].long()
        order = torch.argsort(rows * self.d_sae + cols)
        crow = torch.zeros(self.n + 1, dtype=torch.int64, device=self.values.device)
        crow[1:] = torch.bincount(rows, minlength=self.n).cumsum(0)
        values = self.values[active]
        return torch.sparse_csr_tensor(crow, cols[order], values[order], size=self.shape)

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseActs:
        """Return the nonzero entries of `dense: [n, d_sae]` in the variable layout.

        Differentiable in `dense`. The number of entries depends on the data, so on a GPU this waits
        for the device.
        """
        if dense.ndim != 2:
            raise ValueError(
                f"SparseActs.from_dense: expected dense to be [n, d_sae], got {list(dense.shape)}"
            )
        rows, cols = dense.nonzero(as_tuple=True)
        offsets = torch.zeros(dense.shape[0] + 1, dtype=torch.int32, device=dense.device)
        offsets[1:] = torch.bincount(rows, minlength=dense.shape[0]).cumsum(0)
        return cls(dense[rows, cols], cols.int(), offsets, dense.shape[1])

    def to(self, *args: Any, **kwargs: Any) -> SparseActs:
        """Move or cast like `Tensor.to`; a dtype applies to `values` only."""
        values = self.values.to(*args, **kwargs)
        indices = self.indices.to(values.device)
        offsets = None if self.offsets is None else self.offsets.to(values.device)
        return SparseActs(values, indices, offsets, self.d_sae)

    @classmethod
    def cat(cls, parts: Sequence[SparseActs]) -> SparseActs:
        """Return the rows of all parts, one after the other; differentiable in their `values`.

        Args:
            parts: at least one; over the same d_sae latents, of one dtype and device.

        Returns:
            The fixed layout where all parts have it with the same k, otherwise the variable one,
            with as many places as the parts have together and all padding at the end.

        Raises:
            ValueError: there are no parts, or their d_sae differ.
        """
        sizes = {part.d_sae for part in parts}
        if len(sizes) != 1:
            raise ValueError(
                "SparseActs.cat: expected parts over the same d_sae latents, got d_sae = "
                f"{sorted(sizes)}"
            )
        (d_sae,) = sizes
        if all(p.offsets is None for p in parts) and len({p.values.shape[1] for p in parts}) == 1:
            values, indices = (torch.cat([getattr(p, t) for p in parts]) for t in _LEAVES[:2])
            return cls(values, indices, None, d_sae)
        flat = [part._variable() for part in parts]
        n = sum(part.n for part in parts)
        values, indices = (torch.cat([getattr(p, t) for p in flat]) for t in _LEAVES[:2])
        counts, rows, first = [], [], 0
        for part in flat:
            assert part.offsets is not None
            counts.append(part.offsets.diff())
            owner = part.rows()
            rows.append(torch.where(owner < part.n, owner + first, n))
            first += part.n
        order = torch.cat(rows).argsort(stable=True)  # padding last
        offsets = torch.cat([counts[0].new_zeros(1), *counts]).cumsum(0, dtype=torch.int32)
        return cls(values[order], indices[order], offsets, d_sae)

    def _variable(self) -> SparseActs:
        """Return the same entries in the variable layout."""
        if self.offsets is not None:
            return self
        n, k = self.values.shape
        offsets = torch.arange(n + 1, device=self.values.device, dtype=torch.int32) * k
        return SparseActs(self.values.flatten(), self.indices.flatten(), offsets, self.d_sae)

    def trimmed(self) -> SparseActs:
        """Return the same entries without padding. On a GPU this waits for the device."""
        if self.offsets is None:
            return self
        count = int(self.offsets[-1])
        return SparseActs(self.values[:count], self.indices[:count], self.offsets, self.d_sae)

    def detach(self) -> SparseActs:
        """Return the same entries cut from the graph."""
        return SparseActs(self.values.detach(), self.indices, self.offsets, self.d_sae)


# As a pytree the tensors are the leaves: two in the fixed layout, three in the variable one.
_LEAVES = ("values", "indices", "offsets")


def _flatten(acts: SparseActs) -> tuple[list[Tensor], int]:
    leaves = [acts.values, acts.indices]
    return leaves if acts.offsets is None else [*leaves, acts.offsets], acts.d_sae


def _flatten_with_keys(acts: SparseActs) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], int]:
    leaves, d_sae = _flatten(acts)
    return [(pytree.GetAttrKey(k), t) for k, t in zip(_LEAVES, leaves, strict=False)], d_sae


def _unflatten(leaves: Iterable[Any], d_sae: Any) -> SparseActs:
    values, indices, *offsets = leaves
    return SparseActs(values, indices, offsets[0] if offsets else None, d_sae)


pytree.register_pytree_node(
    SparseActs,
    _flatten,
    _unflatten,
    serialized_type_name="fastsae.SparseActs",
    flatten_with_keys_fn=_flatten_with_keys,
)


def lists_every_latent(indices: Tensor, d_sae: int) -> bool:
    """Return whether every row of `indices: [n, k]` is 0 .. d_sae - 1, by being the same memory."""
    if indices.ndim != 2 or indices.shape[1] != d_sae or not len(indices) or indices.stride(0):
        return False
    if not can_look(indices):
        return False
    return bool((indices[0] == torch.arange(d_sae, dtype=torch.int32)).all())


def is_plain(t: Tensor) -> bool:
    """Return whether a tensor is an ordinary one: no subclass, nothing of vmap or torch.func."""
    functorch = torch._C._functorch  # batched gradients of autograd.grad are of the older kind
    wrapped = functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)
    return type(t) in (Tensor, torch.nn.Parameter) and not wrapped


def can_look(t: Tensor) -> bool:
    """Return whether reading a number of `t` is free: an ordinary tensor of the CPU, eagerly."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and is_plain(t)


def owners(offsets: Tensor, entries: int) -> Tensor:
    """Return which list owns each entry: int64 `[entries]`, the number of lists for padding."""
    # The first offset is 0. Added, it makes one row per sample under vmap; searchsorted wants that,
    # and contiguous tensors.
    entry = torch.arange(entries, device=offsets.device, dtype=torch.int32) + offsets[0]
    return torch.searchsorted(offsets, entry, right=True).sub_(1)


class TopK(NamedTuple):
    """The k largest entries of each row: `values [..., k]`, `indices [..., k]` int32."""

    values: Tensor
    indices: Tensor


class BatchTopK(NamedTuple):
    """A matrix-wide selection and the smallest kept value (float32 or float64, `[]`)."""

    acts: SparseActs
    threshold: Tensor


class LatentScores(NamedTuple):
    """What `latent_scores` returns."""

    scores: Tensor
    """[d_sae]: of every latent, over the batch."""
    threshold: Tensor
    """[]: the smallest value that BatchTopK among all latents would keep, +inf if none."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums and thresholds of `dtype` inputs are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LatentLists(NamedTuple):
    """The active entries of a `SparseActs`, grouped by latent, rows ascending inside each.

    Latent f owns entries `offsets[f] : offsets[f + 1]` of `rows` and `slots`: the tokens, and the
    positions in the flattened `values` of the source. `offsets: [d_sae + 1]`,
    `rows, slots: [capacity]`, all int32; entries at or past `offsets[-1]` are 0.
    """

    offsets: Tensor
    rows: Tensor
    slots: Tensor

    def counts(self) -> Tensor:
        """Return how often each latent fired: int32 `[d_sae]`."""
        return self.offsets.diff()


class DecodeError(NamedTuple):
    """What `sparse_decode_error` returns; all but the first in the dtype of sums."""

    reconstruction: Tensor
    """[n, d_out], in the dtype of the dictionary."""
    error: Tensor
    """[n, d_out]: the reconstruction minus the target."""
    squared: Tensor
    """[n]: the sum of error^2 of each token."""
    products: Tensor
    """In the shape of the values: of each active entry, the product of the token's error with the
    latent's row, half of the gradient of `squared` in the value; 0 for the others. Detached."""


class StepTensors(NamedTuple):
    """The parameters of an SAE as the ops take them, or one of Adam's averages of them."""

    W_enc: Tensor
    """[d_sae, d_in]"""
    W_dec: Tensor
    """[d_sae, d_out]"""
    b_enc: Tensor
    """[d_sae]"""
    b_dec: Tensor
    """[d_out]"""


class MoreGradients(NamedTuple):
    """Gradients that other parts of a loss have in whole parameters; None where there is none."""

    W_enc: Tensor | None = None
    """[d_sae, d_in]"""
    W_dec: Tensor | None = None
    """[d_sae, d_out]"""
    b_enc: Tensor | None = None
    """[d_sae]"""
    b_dec: Tensor | None = None
    """[d_out]; not more, but all that does not come through the encoder's input"""


class LatentGradients(NamedTuple):
    """Gradients of some latents only: what an auxiliary loss of dead latents leaves."""

    latents: Tensor
    """[e] int32, all different"""
    W_enc: Tensor
    """[e, d_in]"""
    W_dec: Tensor
    """[e, d_out]"""
    b_enc: Tensor
    """[e]"""


def _collate(parts: Sequence[SparseActs], **_: Any) -> SparseActs:
    return SparseActs.cat(parts)


default_collate_fn_map[SparseActs] = _collate
torch.serialization.add_safe_globals([SparseActs, TopK, BatchTopK, LatentLists])
