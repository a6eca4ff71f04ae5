"""Hostile inputs, made of bits: rows that a selection gets wrong when it is wrong anywhere.

Every row of a matrix is of one of `KINDS`, a matrix of one to four of them. Widths and values of k
lie at and around the sizes where kernels change: vectors, groups of maxima, blocks of 4096, the
buffer of 8192 candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.oracle import BF16, F16, F32, F64, Array, Format, numbers, rounded

Rng = np.random.Generator
TORCH = {F32: torch.float32, F64: torch.float64, BF16: torch.bfloat16, F16: torch.float16}
_SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
_VIEWS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Rows of topk: the chance of a class of widths, the widths, and the mean rows of such a matrix. A
# row has 160 numbers on average, which the oracle sorts in the time that the op takes: 70 % of rows
# have up to 70, because tails are where widths matter, and half of all numbers are in rows of 500
# and more.
WIDTHS: tuple[tuple[float, Callable[[Rng], int], int], ...] = (
    (0.40, lambda rng: int(rng.integers(1, 71)), 512),
    (0.20, lambda rng: int(rng.choice([127, 128, 129, 255, 256, 257])), 256),
    (0.22, lambda rng: int(rng.integers(71, 1100)), 128),
    (0.08, lambda rng: int(rng.choice([511, 513, 1023, 1024, 1025])), 64),
    (0.06, lambda rng: int(rng.choice([4095, 4096, 4097, 4099])), 24),
    (0.03, lambda rng: int(rng.choice([8191, 8192, 8193, 12_289, 20_011])), 6),
    (0.01, lambda rng: int(rng.choice([32_768, 33_001, 70_001])), 2),
)


def tensor(bits: Array, f: Format) -> Tensor:
    """Return a tensor of the bits."""
    return torch.from_numpy(bits.view(_SIGNED[f.bits])).view(TORCH[f])


def bits_of(x: Tensor, f: Format) -> Array:
    """Return the bits of a tensor, which has to be of the format."""
    assert x.dtype == TORCH[f], f"expected {TORCH[f]}, got {x.dtype}"
    return x.detach().contiguous().view(_VIEWS[x.element_size()]).numpy().view(f.uint)


def integers(t: Tensor) -> Array:
    """Return an int32 tensor as int64 numbers."""
    assert t.dtype == torch.int32, f"expected torch.int32, got {t.dtype}"
    return t.numpy().astype(np.int64)


def a_format(rng: Rng) -> Format:
    """Return a format; float64, for which the oracle has no fast sort, less often."""
    return (F32, F64, BF16, F16, F32, BF16, F16, F32, BF16, F16)[rng.integers(0, 10)]


def _uniform(rng: Rng, n: int, width: int, f: Format) -> Array:
    """Return uniformly random bits: numbers of every exponent, NaNs of every payload."""
    return np.frombuffer(rng.bytes(n * width * f.bits // 8), f.uint).reshape(n, width).copy()


def _of(x: Array, f: Format) -> Array:
    with np.errstate(over="ignore"):
        return rounded(x, f)


def _signs(rng: Rng, n: int, width: int, f: Format) -> Array:
    return rng.integers(0, 2, (n, width), dtype=np.uint8).astype(f.uint) << f.uint(f.bits - 1)


def _normal(rng: Rng, n: int, width: int, f: Format) -> Array:
    return _of(rng.standard_normal((n, width), np.float64 if f is F64 else np.float32), f)


def _ties(rng: Rng, n: int, width: int, f: Format) -> Array:
    # Of both signs, -0 too.
    spread = float(rng.choice([0.5, 2, 20]))
    return _of(np.rint(rng.standard_normal((n, width), np.float32) * np.float32(spread)) / 2, f)


def _equal(rng: Rng, n: int, width: int, f: Format) -> Array:
    return np.repeat(_special(rng, n, 1, f), width, axis=1)


def _zeros(rng: Rng, n: int, width: int, f: Format) -> Array:
    return _signs(rng, n, width, f)


def _zeros_in_negative(rng: Rng, n: int, width: int, f: Format) -> Array:
    few = rng.random((n, width), np.float32) < rng.choice([0.02, 0.2, 0.7])
    return np.where(few, _zeros(rng, n, width, f), _normal(rng, n, width, f) | f.uint(f.sign))


def _negative(rng: Rng, n: int, width: int, f: Format) -> Array:
    return _normal(rng, n, width, f) | f.uint(f.sign)


def _palette(f: Format) -> Array:
    one, nan = f.inf >> 1, f.inf + (1 << (f.mantissa - 1))
    least_normal = 1 << f.mantissa
    of_both_signs = (0, 1, least_normal - 1, least_normal, one, f.inf - 1, f.inf, nan, f.inf + 1)
    return np.array([b | s for b in of_both_signs for s in (0, f.sign)], f.uint)


def _special(rng: Rng, n: int, width: int, f: Format) -> Array:
    return _palette(f)[rng.integers(0, 18, (n, width), dtype=np.uint8)]


def _two(rng: Rng, n: int, width: int, f: Format) -> Array:
    pair = _special(rng, n, 2, f)
    first = rng.random((n, width), np.float32) < rng.choice([0.02, 0.5])
    return np.where(first, pair[:, :1], pair[:, 1:])


def _sprinkled(rng: Rng, n: int, width: int, f: Format) -> Array:
    few = rng.random((n, width), np.float32) < rng.choice([0.01, 0.1, 0.5])
    return np.where(few, _special(rng, n, width, f), _normal(rng, n, width, f))


def _nans(rng: Rng, n: int, width: int, f: Format) -> Array:
    payload = _uniform(rng, n, width, f) | f.uint(f.inf | 1)
    few = rng.random((n, width), np.float32) < rng.choice([0.02, 0.2, 1])
    return np.where(few, payload, _normal(rng, n, width, f))


def _minus_inf(rng: Rng, n: int, width: int, f: Format) -> Array:
    few = rng.random((n, width), np.float32) < rng.choice([0, 0.02])
    return np.where(few, _normal(rng, n, width, f), f.uint(f.inf | f.sign))


def _denormal(rng: Rng, n: int, width: int, f: Format) -> Array:
    mask = f.uint(((1 << f.mantissa) - 1) | f.sign)
    return _uniform(rng, n, width, f) & mask


def _huge(rng: Rng, n: int, width: int, f: Format) -> Array:
    x = _normal(rng, n, width, f)
    x[np.arange(n), rng.integers(0, width, n)] = f.uint(f.inf - 1)
    return x


def _neighbors(rng: Rng, n: int, width: int, f: Format) -> Array:
    # Adjacent numbers: what is one below a bound and what is at it.
    start = _normal(rng, n, 1, f) | f.uint(1 << (f.mantissa + 2))
    return start + rng.integers(0, 4, (n, width), dtype=np.uint8).astype(f.uint)


def _steps(rng: Rng, n: int, width: int, f: Format) -> Array:
    step = float(rng.choice([0, 1 / 64, 1]))
    start = rng.integers(-200, 200, (n, 1)).astype(np.float64)
    return _of(start + step * np.arange(width), f)


def _descending(rng: Rng, n: int, width: int, f: Format) -> Array:
    return _steps(rng, n, width, f)[:, ::-1].copy()


def _sawtooth(rng: Rng, n: int, width: int, f: Format) -> Array:
    period = rng.integers(1, max(2, min(width, 200)) + 1, (n, 1))
    sign = rng.choice([-1, 1], (n, 1))
    return _of((sign * (np.arange(width) % period)).astype(np.float64), f)


def _late(rng: Rng, n: int, width: int, f: Format) -> Array:
    # Low where a first bound comes from, high behind; or the other way around.
    x = np.abs(rng.standard_normal((n, width), np.float32))
    x += np.where(np.arange(width) < rng.integers(0, width + 1, (n, 1)), 0, rng.choice([-9, 9]))
    return _of(x, f)


KINDS = {
    "normal": _normal,
    "ties": _ties,
    "equal": _equal,
    "zeros": _zeros,
    "zeros_in_negative": _zeros_in_negative,
    "negative": _negative,
    "special": _special,
    "two": _two,
    "sprinkled": _sprinkled,
    "nans": _nans,
    "minus_inf": _minus_inf,
    "denormal": _denormal,
    "huge": _huge,
    "neighbors": _neighbors,
    "ascending": _steps,
    "descending": _descending,
    "sawtooth": _sawtooth,
    "late": _late,
    "uniform": _uniform,
}
_NAMES = tuple(KINDS)


def matrix(rng: Rng, n: int, width: int, f: Format) -> tuple[Array, str]:
    """Return the bits of a hostile matrix, and the kinds of its rows."""
    if n == 0 or width == 0:
        return np.zeros((n, width), f.uint), "empty"
    names = [_NAMES[i] for i in rng.integers(0, len(_NAMES), min(n, int(rng.integers(1, 5))))]
    sizes = np.diff([i * n // len(names) for i in range(len(names) + 1)])
    parts = [KINDS[kind](rng, size, width, f) for kind, size in zip(names, sizes, strict=True)]
    x = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if rng.random() < 0.3:  # rows of different kinds beside each other
        x = x[rng.permutation(n)]
    return x, "+".join(names)


def a_k(rng: Rng, width: int) -> int:
    """Return a k: at both ends, small, where the number of groups changes, or any."""
    which = rng.integers(0, 6)
    k = (
        1,
        int(rng.integers(1, 17)),
        int(rng.choice([2, 16, 17, 32, 33, 48, 64, 65, 128, 256])),
        width - 1,
        width,
        int(rng.integers(1, width + 1)),
    )[which]
    return min(max(k, 1), width)


def laid_out(rng: Rng, x: Tensor) -> Tensor:
    """Return the same numbers: contiguous, at an odd address, transposed, or every second one."""
    which = rng.integers(0, 8)
    if which == 0:
        start = int(rng.integers(1, 9))
        flat = x.new_empty(x.numel() + start)[start:]
        return flat.copy_(x.reshape(-1)).view(x.shape)
    if which == 1 and x.ndim == 2:
        return x.t().contiguous().t()
    if which == 2:
        wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def a_count(rng: Rng, most: int = 130) -> int:
    """Return a number of rows: none, one, around a panel of 32, or any."""
    named = [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129]
    if rng.random() < 0.6:
        return min(int(rng.choice(named)), most)
    return int(rng.integers(0, most + 1))


def a_width(rng: Rng, most: int = 1100) -> int:
    """Return a width: none, short, around vectors, or any."""
    which = rng.integers(0, 10)
    if which == 0:
        return int(rng.integers(0, 3))
    if which < 5:
        return min(int(rng.integers(1, 71)), most)
    if which < 8:
        return min(int(rng.choice([127, 128, 129, 255, 256, 257, 511, 513, 1023, 1025])), most)
    return int(rng.integers(1, most + 1))


def a_mask(rng: Rng, width: int) -> Array | None:
    """Return which latents are eligible: none, one, all, all but one, some; or None."""
    which = rng.integers(0, 8)
    if which < 2:
        return None
    mask = np.zeros(width, bool)
    some = int(rng.integers(0, width + 1))
    count = (0, 1, width, max(0, width - 1), some, some)[which - 2]
    mask[rng.permutation(width)[:count]] = True
    return mask


def a_budget(rng: Rng, size: int) -> int:
    """Return a budget of a matrix of `size` entries: none, few, everything, more, or any."""
    which = rng.integers(0, 8)
    most = (0, 3, 40, size // 50, size // 7, size)[min(which, 5)]
    if which == 6:
        return size
    if which == 7:
        return size + 3
    return int(rng.integers(0, most + 1))


class Weights:
    """Inputs of an encoder: small integers, so that sums are exact in every order.

    |sums| <= 256, so that 16 bits hold them too. With `special`, some rows have NaN or an infinity.
    """

    def __init__(self, rng: Rng, n: int, d_sae: int, f: Format, special: bool) -> None:
        most = int(rng.integers(1, 4))
        self.d_in = int(rng.integers(1, (256 - most) // (2 * most * most) + 1))

        def draw(*shape: int) -> Array:
            return rng.integers(-most, most + 1, shape).astype(np.float64)

        self.x, self.W = draw(n, self.d_in), draw(d_sae, self.d_in)
        self.b_enc = draw(d_sae) if rng.random() < 0.6 else None
        self.b_dec = draw(self.d_in) if rng.random() < 0.4 else None
        if special and n:
            for row in rng.integers(0, n, 3):
                what = rng.choice([math.nan, math.inf, -math.inf])
                self.x[row, rng.integers(0, self.d_in)] = what
        self.tensors = tuple(
            None if t is None else laid_out(rng, tensor(rounded(t, f), f))
            for t in (self.x, self.W, self.b_enc, self.b_dec)
        )


def exact(rng: Rng, shape: tuple[int, ...], f: Format) -> tuple[Array, Tensor]:
    """Return random numbers of the format, as float64 and as a tensor."""
    bits = _of(rng.standard_normal(shape), f)
    return numbers(bits, f), tensor(bits, f)
