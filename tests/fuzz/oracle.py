"""What every op must return, in numpy alone, without code of fastsae or of its reference.

Numbers come as the bits of their format, so that signs of zeros and NaNs of every payload are what
they are. Selections sort integers that order like the numbers; sums are in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Format:
    """A floating-point format: how its bits are laid out."""

    name: str
    uint: type[np.unsignedinteger[Any]]
    bits: int
    mantissa: int

    @property
    def sign(self) -> int:
        """The bit of the sign."""
        return 1 << (self.bits - 1)

    @property
    def inf(self) -> int:
        """The bits of +inf; a larger magnitude is a NaN."""
        return self.sign - (1 << self.mantissa)

    @property
    def epsilon(self) -> float:
        """Half the distance of 1 to the next number: the largest relative error of rounding."""
        return 2.0 ** (-self.mantissa - 1)

    @property
    def tiny(self) -> float:
        """The smallest normal number; below it, errors are absolute."""
        return {5: 2.0**-14, 8: 2.0**-126, 11: 2.0**-1022}[self.bits - 1 - self.mantissa]

    @property
    def wide(self) -> Format:
        """The format of sums and thresholds."""
        return F64 if self.bits == 64 else F32


F32 = Format("float32", np.uint32, 32, 23)
F64 = Format("float64", np.uint64, 64, 52)
BF16 = Format("bfloat16", np.uint16, 16, 7)
F16 = Format("float16", np.uint16, 16, 10)


def numbers(bits: Array, f: Format) -> Array:
    """Return the numbers that the bits stand for, in float64."""
    if f is BF16:
        return numbers(bits.astype(np.uint32) << 16, F32)
    with np.errstate(invalid="ignore"):  # a signaling NaN
        return bits.view({F32: np.float32, F64: np.float64, F16: np.float16}[f]).astype(np.float64)


def rounded(x: Array, f: Format) -> Array:
    """Return the bits of numbers that are exact in float32 or in the format, or close to them.

    A bfloat16 is rounded from float32, to the nearest, ties to even.
    """
    x = np.ascontiguousarray(x)
    if f is BF16:
        wide = x.astype(np.float32).view(np.uint32)
        to_even = wide + np.uint32(0x7FFF) + ((wide >> 16) & np.uint32(1))
        return np.where(np.isnan(x), 0x7FC0, to_even >> 16).astype(np.uint16)
    return x.astype({F32: np.float32, F64: np.float64, F16: np.float16}[f]).view(f.uint)


def is_nan(bits: Array, f: Format) -> Array:
    """Return where the bits are a NaN."""
    return (bits & f.uint(f.sign - 1)) > f.uint(f.inf)


def keys(bits: Array, f: Format) -> Array:
    """Return int64 numbers in the order of selections: NaN largest, -0 equal to +0."""
    magnitude = (bits & f.uint(f.sign - 1)).astype(np.int64)
    key = np.where(bits >= f.uint(f.sign), -magnitude, magnitude)
    key[magnitude > f.inf] = np.iinfo(np.int64).max
    return key


def topk(bits: Array, f: Format, k: int, sorted: bool) -> Array:
    """Return the columns of the k largest of every row, lowest column first among equals."""
    width = bits.shape[1]
    if f.bits == 64 or width > 1 << 15:
        order = np.argsort(-keys(bits, f), axis=1, kind="stable")[:, :k]
    else:
        # One integer that holds the number, largest first, and its column: no two are equal, so
        # any sort is stable, and one without indices is the fastest there is.
        word = np.uint32 if f.bits == 16 else np.uint64
        magnitude = (bits & f.uint(f.sign - 1)).astype(word)
        zero = word(f.inf + 1)  # of a NaN is 0, of +inf 1, of -inf 2 inf + 1
        rank = np.where(bits >= f.uint(f.sign), zero + magnitude, zero - magnitude)
        rank[magnitude > word(f.inf)] = 0
        rank <<= word(15)
        rank |= np.arange(width, dtype=word)
        rank.sort(axis=1)
        order = (rank[:, :k] & word((1 << 15) - 1)).astype(np.int64)
    return order if sorted else np.sort(order, axis=1)


class Selection(NamedTuple):
    """Entries in the order of (row, column): where they are in the matrix, and in each row."""

    rows: Array
    columns: Array
    offsets: Array


def keep_largest(key: Array, eligible: Array, budget: int) -> Selection:
    """Return the `budget` largest eligible entries, the lowest (row, column) among equals."""
    n, width = key.shape
    places = np.flatnonzero(eligible)
    order = np.argsort(-key.ravel()[places], kind="stable")[:budget]
    places = np.sort(places[order])
    rows, columns = (places // width, places % width) if width else (places, places)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))])
    return Selection(rows, columns, offsets.astype(np.int64))


def positive(bits: Array, f: Format) -> Array:
    """Return where the numbers are above 0, infinity too, a NaN not."""
    return (bits > 0) & (bits <= f.uint(f.inf))


def batch_topk(bits: Array, f: Format, budget: int) -> tuple[Selection, float]:
    """Return the `budget` largest positive entries of the matrix, and the smallest of them."""
    kept = keep_largest(keys(bits, f), positive(bits, f), budget)
    values = numbers(bits[kept.rows, kept.columns], f)
    return kept, float(values.min()) if len(values) else math.inf


def threshold_select(bits: Array, f: Format, threshold: Array, capacity: int) -> Selection:
    """Return the entries above `threshold` (float64, [] or [width]), at most `capacity`."""
    return keep_largest(keys(bits, f), numbers(bits, f) > threshold, capacity)


def feature_topk(bits: Array, f: Format, lengths: Array) -> Selection:
    """Return the `lengths[j]` largest positive entries of every column j."""
    key = keys(bits, f)
    key[~positive(bits, f)] = -1
    place = np.argsort(np.argsort(-key, axis=0, kind="stable"), axis=0)
    eligible = (place < lengths) & positive(bits, f)
    return keep_largest(key, eligible, bits.size)


def pre_activations(x: Array, W: Array, b_enc: Array | None, b_dec: Array | None) -> Array:
    """Return `(x - b_dec) W^T + b_enc`: exact for small integers, whatever the order of sums."""
    with np.errstate(invalid="ignore"):
        centered = x if b_dec is None else x - b_dec
        # Not by a matmul: a library may pass over zeros, which matters for 0 * inf.
        finite = np.isfinite(centered).all(1)
        pre = np.where(finite[:, None], centered, 0.0) @ W.T
        for row in np.flatnonzero(~finite):
            pre[row] = (centered[row] * W).sum(1)
        return pre if b_enc is None else pre + b_enc


def masked_topk(
    pre: Array, k: int, mask: Array | None, absolute: bool = False
) -> tuple[Array, Array]:
    """Return the columns [n, k] that encode_topk selects, and their values before relu.

    With fewer than k latents in the mask: all of those, and the lowest others with value 0.
    """
    n = len(pre)
    allowed = np.arange(pre.shape[1]) if mask is None else np.flatnonzero(mask)
    if len(allowed) >= k:
        key = np.abs(pre[:, allowed]) if absolute else pre[:, allowed]
        columns = allowed[topk(rounded(key, F64), F64, k, sorted=False)]
        return columns, np.take_along_axis(pre, columns, axis=1)
    assert mask is not None
    others = np.flatnonzero(~mask)[: k - len(allowed)]
    columns = np.sort(np.concatenate([allowed, others]))
    values = np.where(mask[columns], pre[:, columns], 0.0)
    return np.broadcast_to(columns, (n, k)), values


def group_max(pre: Array, k: int) -> tuple[Array, Array]:
    """Return the columns [n, k] of the largest of each of k equal groups, and their values."""
    n, width = pre.shape
    groups = pre.reshape(n * k, width // k)
    place = topk(rounded(groups, F64), F64, 1, sorted=False).reshape(n, k)
    columns = place + np.arange(0, width, width // k)
    return columns, np.take_along_axis(pre, columns, axis=1)


class Entries(NamedTuple):
    """A sparse code in either layout, its values in float64."""

    values: Array
    """[entries], padding too"""
    indices: Array
    rows: Array
    """The row of every entry; n for padding."""
    n: int

    @property
    def active(self) -> Array:
        """Where an entry counts."""
        return (self.values != 0) & (self.rows < self.n)


class Sums(NamedTuple):
    """Sums in float64, the sums of the magnitudes of what was added, and how many there were."""

    total: Array
    magnitude: Array
    terms: int


def _add(shape: tuple[int, ...], at: Array, what: Array) -> Sums:
    total, magnitude = np.zeros(shape), np.zeros(shape)
    np.add.at(total, at, what)
    np.add.at(magnitude, at, np.abs(what))
    most = int(np.bincount(at).max()) if len(at) else 0
    return Sums(total, magnitude, most)


def sparse_decode(acts: Entries, W: Array, bias: Array | None) -> Sums:
    """Return `sum_j values_j W[indices_j] + bias` of every row; inactive entries add nothing."""
    on = acts.active
    terms = acts.values[on, None] * W[acts.indices[on]]
    sums = _add((acts.n, W.shape[1]), acts.rows[on], terms)
    if bias is None:
        return sums
    return Sums(sums.total + bias, sums.magnitude + np.abs(bias), sums.terms + 1)


def squares(error: Array) -> Sums:
    """Return the sum of squares of every row."""
    total = (error**2).sum(1)
    return Sums(total, total, error.shape[1])


def sparse_decode_values_grad(grad: Array, acts: Entries, W: Array) -> Sums:
    """Return `<grad[row], W[index]>` of every active entry, 0 of the others."""
    on = acts.active
    total, magnitude = np.zeros(len(acts.values)), np.zeros(len(acts.values))
    terms = grad[acts.rows[on]] * W[acts.indices[on]]
    total[on], magnitude[on] = terms.sum(1), np.abs(terms).sum(1)
    return Sums(total, magnitude, W.shape[1])


def group_by_latent(acts: Entries, d_sae: int) -> tuple[Array, Array, Array]:
    """Return offsets [d_sae + 1], and the rows and slots of the active entries by latent."""
    slots = np.flatnonzero(acts.active)
    slots = slots[np.argsort(acts.indices[slots], kind="stable")]
    counts = np.bincount(acts.indices[slots], minlength=d_sae)
    return np.concatenate([[0], np.cumsum(counts)]), acts.rows[slots], slots


def sparse_weight_grad(
    values: Array, lists: tuple[Array, Array, Array], x: Array
) -> tuple[Sums, Sums]:
    """Return the sums of `values[slot] x[row]` and of `values[slot]` over each latent's list."""
    offsets, rows, slots = lists
    d_sae = len(offsets) - 1
    latent = np.repeat(np.arange(d_sae), np.diff(offsets))
    v = values[slots]
    return _add((d_sae, x.shape[1]), latent, v[:, None] * x[rows]), _add((d_sae,), latent, v)


class Adam(NamedTuple):
    """The numbers of a step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    max_norm: float
    unit_norm: bool


def sparse_adam_step(
    state: list[Array],
    acts: Entries,
    grad_values: Array,
    x: Array,
    grad_output: Array,
    extra: tuple[Array, Array, Array, Array] | None,
    o: Adam,
) -> list[Array]:
    """Return parameters, first and second averages after a step: W_enc, W_dec, b_enc, b_dec each.

    The gradient of W_dec loses its part along its row, all four are clipped together, and rows of
    W_dec that are not 0 end with norm 1.
    """
    W_enc, W_dec, b_enc, b_dec = state[:4]
    on = acts.active
    f, r = acts.indices[on], acts.rows[on]
    g_enc, g_dec, g_b = np.zeros_like(W_enc), np.zeros_like(W_dec), np.zeros_like(b_enc)
    np.add.at(g_dec, f, acts.values[on, None] * grad_output[r])
    np.add.at(g_enc, f, grad_values[on, None] * (x - b_dec)[r])
    np.add.at(g_b, f, grad_values[on])
    if extra is not None:
        latents, *more = extra
        for g, rows in zip((g_enc, g_dec, g_b), more, strict=True):
            g[latents] += rows
    g_b_dec = grad_output.sum(0) - g_b @ W_enc
    squared = (W_dec * W_dec).sum(1)
    along = (g_dec * W_dec).sum(1) / np.where(squared > 0, squared, 1)
    g_dec -= along[:, None] * W_dec
    gradients = [g_enc, g_dec, g_b, g_b_dec]
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    scale = min(1.0, o.max_norm / (norm + 1e-6))
    after = []
    for p, m, v, g in zip(state[:4], state[4:8], state[8:], gradients, strict=True):
        g = g * scale
        m = m * o.beta1 + g * (1 - o.beta1)
        by_rows = v.ndim < g.ndim
        squares = (g * g).sum(1) / max(g.shape[1], 1) if by_rows else g * g
        v = v * o.beta2 + squares * (1 - o.beta2)
        root = np.sqrt(v / (1 - o.beta2**o.step)) + o.eps
        root = root[:, None] if by_rows else root
        after.append((p - o.lr * (m / (1 - o.beta1**o.step)) / root, m, v))
    p, m, v = (list(t) for t in zip(*after, strict=True))
    if o.unit_norm:
        length = np.sqrt((p[1] * p[1]).sum(1, keepdims=True))
        p[1] = p[1] / np.where(length > 0, length, 1)
    return [*p, *m, *v]
