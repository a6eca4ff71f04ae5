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

from fastsae.types import SparseActs, lists_every_latent

SHARE = {"sparse_decode": 1 / 6, "sparse_decode_values_grad": 1 / 5, "sparse_weight_grad": 1 / 4}
FULL_SHARE = 1 / 5
"""From which share on a code is kept as a dense matrix, see `SparseActs.full`."""
PROBED = 16
"""Rows of a batch that tell how full its code is."""
MOST = 1 << 28
"""Entries of a dense code that is kept, at most."""
"""Measured on two AVX2 cores at (n 1024, d 576, d_sae 9216), by `python -m bench.crossover`."""
LEAST = 1 << 18
"""Entries below which a call is too short to matter."""
CHUNK_BYTES = 1 << 26
"""Of a block of the dense code that is held at a time."""


def pays(op: str, entries: int, n: int, d_sae: int) -> bool:
    """Return whether `op` of a code with so many entries is faster with dense matmuls."""
    return entries >= LEAST and entries > SHARE[op] * n * d_sae


def counted(acts: SparseActs) -> int:
    """Return the number of entries of a code on the CPU, 0 where finding it out would be a wait."""
    if torch.compiler.is_compiling() or not _is_plain(acts.values):
        return 0
    return _counted(acts.indices, acts.offsets)


def looks_full(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> bool:
    """Return whether the positive pre-activations of `x: [n, d_in]` are kept as a dense matrix.

    A few rows say so: it depends on the batch alone, so a run that is resumed does the same.
    """
    n, d_sae = x.shape[0], W_enc.shape[0]
    biases = [b_enc] if b_dec is None else [b_enc, b_dec]
    if not LEAST <= n * d_sae <= MOST or not _plain([x, W_enc, *biases]):
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
    if rule is None or not _plain([a for a in arguments if isinstance(a, Tensor)]):
        return None
    return rule(*arguments)


def _plain(tensors: list[Tensor]) -> bool:
    """Return whether tensors are ordinary ones on the CPU, all in float32 or all in float64."""
    if torch.compiler.is_compiling() or not all(map(_is_plain, tensors)):
        return False
    floats = {t.dtype for t in tensors if t.is_floating_point()}
    return len(floats) == 1 and floats <= {torch.float32, torch.float64}


def _is_plain(t: Tensor) -> bool:
    functorch = torch._C._functorch  # batched gradients of autograd.grad are of the older kind
    wrapped = functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)
    return type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and not wrapped


def _finite(out: Tensor) -> bool:
    """Return whether all numbers are finite, or False where only their sum is not."""
    return bool(out.sum().isfinite())


def _counted(indices: Tensor, offsets: Tensor | None) -> int:
    """Return the number of entries of a code."""
    return indices.numel() if offsets is None else int(offsets[-1])


def _blocks(
    indices: Tensor, offsets: Tensor | None, n: int, width: int, itemsize: int
) -> Iterator[tuple[int, int, int, int, Tensor]] | None:
    """Return blocks of rows: first and last row and entry, and places in the block's matrix.

    None where the entries of a row do not ascend, or an index is out of range.

    Args:
        indices: column of every entry, rows one after the other.
        offsets: [n + 1]; None: as many entries in each row.
        n: rows.
        width: columns.
        itemsize: bytes of a number.
    """
    count = _counted(indices, offsets)
    flat = indices.reshape(-1)[:count].long()
    if offsets is None:
        rows = torch.arange(n).repeat_interleave(count // max(n, 1))
    else:
        if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
            return None
        rows = torch.repeat_interleave(offsets.diff().long())
    lowest, highest = (int(end) for end in flat.aminmax())
    if lowest < 0 or highest >= width:
        return None
    flat += rows * width
    if not bool((flat[1:] > flat[:-1]).all()):
        return None

    def blocks() -> Iterator[tuple[int, int, int, int, Tensor]]:
        step = max(1, CHUNK_BYTES // (width * itemsize))
        ends = offsets if offsets is not None else torch.arange(n + 1) * (count // max(n, 1))
        for start in range(0, n, step):
            stop = min(start + step, n)
            first, last = int(ends[start]), int(ends[stop])
            yield start, stop, first, last, flat[first:last] - start * width

    return blocks()


def _filled(block: tuple[int, int, int, int, Tensor], values: Tensor, width: int) -> Tensor:
    """Return the matrix of a block of rows: the values at their places, else 0."""
    start, stop, first, last, places = block
    dense = values.new_zeros((stop - start) * width)
    dense[places] = values[first:last]
    return dense.view(stop - start, width)


def _decode(
    values: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor, bias: Tensor | None
) -> Tensor | None:
    d_sae, n = W.shape[0], values.shape[0] if offsets is None else offsets.shape[0] - 1
    if offsets is None and lists_every_latent(indices, d_sae):
        out = values @ W if bias is None else torch.addmm(bias, values, W)
        return out if _finite(out) else None
    if not pays("sparse_decode", _counted(indices, offsets), n, d_sae):
        return None
    blocks = _blocks(indices, offsets, n, d_sae, W.element_size())
    if blocks is None:
        return None
    out, flat = W.new_empty(n, W.shape[1]), values.reshape(-1)
    for block in blocks:
        torch.mm(_filled(block, flat, d_sae), W, out=out[block[0] : block[1]])
    if not _finite(out):
        return None
    return out if bias is None else out.add_(bias)


def _values_grad(
    grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor
) -> Tensor | None:
    d_sae, n = W.shape[0], grad.shape[0]
    if offsets is None and lists_every_latent(indices, d_sae):
        return (grad @ W.t()).masked_fill_(values == 0, 0)
    if not pays("sparse_decode_values_grad", _counted(indices, offsets), n, d_sae):
        return None
    blocks = _blocks(indices, offsets, n, d_sae, W.element_size())
    if blocks is None:
        return None
    out = values.new_zeros(values.numel())
    for start, stop, first, last, places in blocks:
        torch.take(grad[start:stop] @ W.t(), places, out=out[first:last])
    return torch.where(values != 0, out.view(values.shape), 0)


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
    if not _plain([indices, *(t for pair in pairs for t in pair)]):
        return None
    x = pairs[0][1]
    if offsets is None and lists_every_latent(indices, d_sae):
        found = [(values.t() @ x, values.sum(0)) for values, x in pairs]
        return found if all(_finite(weight) for weight, _ in found) else None
    if not pays("sparse_weight_grad", _counted(indices, offsets), x.shape[0], d_sae):
        return None
    blocks = _blocks(indices, offsets, x.shape[0], d_sae, x.element_size())
    if blocks is None:
        return None
    found = [(x.new_zeros(d_sae, x.shape[1]), x.new_zeros(d_sae)) for _, x in pairs]
    for block in blocks:
        for (values, x), (weight, bias) in zip(pairs, found, strict=True):
            dense = _filled(block, values.reshape(-1), d_sae)
            weight.addmm_(dense.t(), x[block[0] : block[1]])
            bias += dense.sum(0)
    return found if all(_finite(weight) for weight, _ in found) else None


_RULES = {
    "sparse_decode": _decode,
    "sparse_decode_values_grad": _values_grad,
}
