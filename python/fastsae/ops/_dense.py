"""Codes that are hardly sparse: matmuls over all latents, where they are faster than gathers.

A gather reads a row of the dictionary for every entry, a matmul all of them once for a block of
tokens. At the start of a run with a penalty, half of the latents are active on every token; then
the same sums are made of matrices. They are the sums of the sparse kernels in another order. Rules:

    an op is dense where more than SHARE of all entries are active, and there are LEAST of them;
    on the CPU in float32 and float64, where the number of entries is known without a wait;
    entries of a row ascend, as those of every encoder do;
    what is not finite, and would spread over entries that are not there, is left to the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.ops._matmul import matmul, where_active
from fastsae.types import SparseActs, can_look, lists_every_latent

SHARE = {"sparse_decode": 1 / 4, "sparse_decode_values_grad": 1 / 5, "sparse_weight_grad": 1 / 3}
"""By `python -m bench.crossover` at (n 1024, d 576, d_sae 9216) on two threads of AVX-512: dense
pays from about 0.4, 0.22 and 0.45 on Zen 4, and did from 0.17, 0.2 and 0.25 on another machine."""
FULL_SHARE = 1 / 5
"""From which share on a code is kept as a dense matrix, see `SparseActs.full`."""
PROBED = 16
"""Rows of a batch that tell how full its code is."""
MOST = 1 << 28
"""Entries of a dense code that is kept, at most."""
LEAST_WIDTH = 256
"""Of a dictionary's rows: what is done to every entry does not depend on it, and has to be small
beside the matmul."""
LEAST = 1 << 18
"""Entries below which a call is too short to matter."""
CHUNK_BYTES = 1 << 26
"""Of a block of the dense code that is held at a time."""


def pays(op: str, entries: int, n: int, d_sae: int, d: int) -> bool:
    """Return whether `op` of a code with so many entries is faster with dense matmuls."""
    return entries >= LEAST and d >= LEAST_WIDTH and entries > SHARE[op] * n * d_sae


def applies(acts: SparseActs, d: int) -> bool:
    """Return whether a code on the CPU is decoded to `d` columns, or its gradient is made, by a
    matmul; not on other devices, where finding it out would be a wait."""
    if acts.is_full:
        return True
    entries = counted(acts)
    return any(pays(op, entries, acts.n, acts.d_sae, d) for op in _RULES)


def counted(acts: SparseActs) -> int:
    """Return the number of entries of a code on the CPU, 0 where finding it out would be a wait."""
    if not can_look(acts.values):
        return 0
    return _counted(acts.indices, acts.offsets)


def looks_full(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> bool:
    """Return whether the positive pre-activations of `x: [n, d_in]` are kept as a dense matrix.

    A few rows say so: it depends on the batch alone, so a run that is resumed does the same.
    """
    n, d_sae = x.shape[0], W_enc.shape[0]
    biases = [b_enc] if b_dec is None else [b_enc, b_dec]
    if not LEAST <= n * d_sae <= MOST or not plain([x, W_enc, *biases]):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    with torch.no_grad():
        rows = x[torch.arange(min(n, PROBED)) * n // min(n, PROBED)]
        z = torch.nn.functional.linear(rows if b_dec is None else rows - b_dec, W_enc, b_enc)
        return int((z > 0).sum()) > FULL_SHARE * z.numel()


def run(op: str, arguments: tuple[Any, ...]) -> Any:
    """Return what the native op returns, made of dense matmuls; None where they do not apply."""
    rule = _RULES.get(op)
    if rule is None:
        return None
    if not plain([a for a in arguments[:-1] if isinstance(a, Tensor)]):  # but bf16_W_dec
        return None
    try:
        with _float_matmuls():
            return rule(*arguments)
    except _NotDense:
        return None


def _float_matmuls() -> Any:
    """Keep matmuls in the dtype of their factors: arguments are already cast as autocast has it."""
    return torch.autocast("cpu", enabled=False)


def plain(tensors: list[Tensor]) -> bool:
    """Return whether tensors are ordinary ones on the CPU, all in float32 or all in float64."""
    if not all(map(can_look, tensors)):
        return False
    floats = {t.dtype for t in tensors if t.is_floating_point()}
    return len(floats) == 1 and floats <= {torch.float32, torch.float64}


def _finite(out: Tensor) -> bool:
    """Return whether all numbers are finite, or False where only their sum is not."""
    return bool(out.sum().isfinite())


def _counted(indices: Tensor, offsets: Tensor | None) -> int:
    """Return the number of entries of a code."""
    return indices.numel() if offsets is None else int(offsets[-1])


class _NotDense(Exception):
    """Leaves a code to the kernels, which say what is wrong with it, or can do it."""


def _check_entries(values: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> None:
    """Raise _NotDense unless entries have the shapes of a layout, and W is a matrix."""
    if W.ndim != 2 or values.ndim != (2 if offsets is None else 1) or values.shape != indices.shape:
        raise _NotDense


def _blocks(
    values: Tensor, indices: Tensor, offsets: Tensor | None, n: int, width: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield blocks of rows: these, their entries, and places of those in the block's matrix.

    Args:
        values: like indices.
        indices: column of every entry, rows one after the other.
        offsets: [n + 1]; None: as many entries in each row.
        n: rows.
        width: columns.

    Raises:
        _NotDense: the entries of a row do not ascend, or are not what they should be.
    """
    count = _counted(indices, offsets)
    if values.shape != indices.shape or indices.dtype != torch.int32 or n == 0:
        raise _NotDense
    if offsets is None:
        ends = torch.arange(n + 1) * (count // n)
    else:
        ends = offsets.long()
        ordered = bool((ends.diff() >= 0).all()) and int(ends[0]) == 0
        if offsets.dtype != torch.int32 or not ordered or count > indices.numel():
            raise _NotDense
    flat = indices.reshape(-1)
    step = max(1, CHUNK_BYTES // (width * values.element_size()))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        entries = slice(int(ends[rows.start]), int(ends[rows.stop]))
        counts = ends[rows.start : rows.stop + 1].diff()
        base = torch.arange(len(counts)) * width
        places = flat[entries].long()
        if places.numel():
            lowest, highest = (int(end) for end in places.aminmax())
            if lowest < 0 or highest >= width:
                raise _NotDense
            places += torch.repeat_interleave(base, counts)
            if not bool((places[1:] > places[:-1]).all()):
                raise _NotDense
        yield rows, entries, places


def _filled(values: Tensor, rows: slice, places: Tensor, width: int) -> Tensor:
    """Return the matrix of a block of rows: the values at their places, else 0."""
    dense = values.new_zeros((rows.stop - rows.start) * width)
    dense[places] = values
    return dense.view(-1, width)


def _rows_read(W: Tensor, bf16_W: Tensor | None) -> Tensor:
    """Return the matrix that a decoder multiplies with: W, or what its copy in bfloat16 holds."""
    if bf16_W is None:
        return W
    right = W.dtype == torch.float32 and bf16_W.dtype == torch.bfloat16
    if not (right and bf16_W.shape == W.shape and can_look(bf16_W)):
        raise _NotDense
    return bf16_W.to(W.dtype)


def _decode(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W: Tensor,
    bias: Tensor | None,
    bf16_W: Tensor | None,
) -> Tensor | None:
    _check_entries(values, indices, offsets, W)
    d_sae, n = W.shape[0], values.shape[0] if offsets is None else offsets.shape[0] - 1
    if offsets is None and lists_every_latent(indices, d_sae):
        out = matmul(values, _rows_read(W, bf16_W), bias)
        return out if _finite(out) else None
    if not pays("sparse_decode", _counted(indices, offsets), n, d_sae, W.shape[1]):
        return None
    W = _rows_read(W, bf16_W)
    out, flat = W.new_empty(n, W.shape[1]), values.reshape(-1)
    for rows, entries, places in _blocks(values, indices, offsets, n, d_sae):
        out[rows] = matmul(_filled(flat[entries], rows, places, d_sae), W)
    if not _finite(out):
        return None
    return out if bias is None else out.add_(bias)


def _values_grad(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W: Tensor,
    bf16_W: Tensor | None,
) -> Tensor | None:
    _check_entries(values, indices, offsets, W)
    if grad.ndim != 2 or grad.shape[1] != W.shape[1]:
        raise _NotDense
    d_sae, n = W.shape[0], grad.shape[0]
    if offsets is None and lists_every_latent(indices, d_sae):
        return matmul(grad, _rows_read(W, bf16_W).t(), where=values)
    if not pays("sparse_decode_values_grad", _counted(indices, offsets), n, d_sae, W.shape[1]):
        return None
    W = _rows_read(W, bf16_W)
    out = values.new_zeros(values.numel())
    for rows, entries, places in _blocks(values, indices, offsets, n, d_sae):
        torch.take(matmul(grad[rows], W.t()), places, out=out[entries])
    return where_active(values, out.view(values.shape))


def weight_grads(
    indices: Tensor, offsets: Tensor | None, d_sae: int, pairs: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]] | None:
    """Return what `sparse_weight_grad` does for several numbers on the same entries; None where
    dense matmuls do not apply.

    Args:
        indices: of the entries.
        offsets: [n + 1] or None.
        d_sae: number of latents.
        pairs: values, like indices, and x [n, d]: of each, weight [d_sae, d] and bias [d_sae].
    """
    if not plain([indices, *(t for pair in pairs for t in pair)]):
        return None
    x = pairs[0][1]
    with _float_matmuls():
        if offsets is None and lists_every_latent(indices, d_sae):
            found = [(matmul(values.t(), x), values.sum(0)) for values, x in pairs]
        elif pays("sparse_weight_grad", _counted(indices, offsets), x.shape[0], d_sae, x.shape[1]):
            try:
                found = _weight_grads(indices, offsets, d_sae, pairs)
            except _NotDense:
                return None
        else:
            return None
    return found if all(_finite(weight) for weight, _ in found) else None


def _weight_grads(
    indices: Tensor, offsets: Tensor | None, d_sae: int, pairs: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """See `weight_grads`, a block of rows at a time."""
    found = [(x.new_zeros(d_sae, x.shape[1]), x.new_zeros(d_sae)) for _, x in pairs]
    for rows, entries, places in _blocks(pairs[0][0], indices, offsets, len(pairs[0][1]), d_sae):
        for (values, x), (weight, bias) in zip(pairs, found, strict=True):
            dense = _filled(values.reshape(-1)[entries], rows, places, d_sae)
            weight += matmul(dense.t(), x[rows])
            bias += dense.sum(0)
    return found


_RULES = {
    "sparse_decode": _decode,
    "sparse_decode_values_grad": _values_grad,
}
