"""One call of an op from its seed, compared with the oracle.

A call is named `stream:index`; with the seed of the run that gives its random numbers, so that any
call can be made again alone. The stream `topk` is about rows, `ops` about all other ops; the calls
of `NAMED` come first in it.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastsae import _library, ops
from fastsae.types import LatentGradients, LatentLists, SparseActs, StepTensors
from tests.fuzz import inputs, oracle
from tests.fuzz.inputs import Rng, bits_of, integers, laid_out, tensor
from tests.fuzz.oracle import BF16, F16, F32, F64, Array, Format, numbers
from tests.ops.calls import NAMES, has_kernel


class Wrong(AssertionError):
    """A result that is not what the oracle says."""


STREAMS = ("topk", "ops")


def generator(seed: int, stream: str, index: int) -> Rng:
    """Return the random numbers of one call."""
    return np.random.Generator(np.random.SFC64([seed, STREAMS.index(stream), index]))


def call(seed: int, stream: str, index: int) -> tuple[str, int]:
    """Make one call; return what it was and its rows. Raises `Wrong`, or what the op raised."""
    rng = generator(seed, stream, index)
    if stream == "topk":
        return topk(rng)
    named = tuple(NAMED.values())
    return named[index]() if index < len(named) else OPS[rng.integers(0, len(OPS))](rng)


emulated = False
"""Whether the emulated CUDA kernels are in the place of those of the CPU."""
_held: list[torch.library.Library] = []  # one that nobody holds takes its kernels with it


def emulate() -> None:
    """Put the emulated CUDA kernels in the place of those of the CPU, for good."""
    global emulated
    # FASTSAE_EMULATED names another build of them, such as one for a sanitizer.
    path = os.environ.get("FASTSAE_EMULATED") or _library.find("libfastsae_emulated.so")
    if path is None:
        raise SystemExit("fuzz: expected the emulated kernels (make build), found none")
    torch.ops.load_library(str(path))
    _held.append(torch.library.Library("fastsae", "IMPL"))
    with warnings.catch_warnings():  # torch says once that it does what it was asked for
        warnings.simplefilter("ignore")
        for op in NAMES:
            if has_kernel(op, "fastsae_emulated"):
                kernel = getattr(torch.ops.fastsae_emulated, op)
                _held[-1].impl(op, kernel, "CPU", allow_override=True)
    emulated = True


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise Wrong(what)


def _same_integers(name: str, got: Array, want: Array) -> None:
    if np.array_equal(got, want):
        return
    if got.shape != want.shape:
        raise Wrong(f"{name}: expected the shape {want.shape}, got {got.shape}")
    wrong = np.argwhere(got != want)
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise Wrong(
            f"{name}: {len(wrong)} of {want.size} are wrong, the first at {list(at)}: "
            f"expected {want[at]}, got {got[at]}"
        )


def _same_bits(name: str, got: Array, want: Array, f: Format) -> None:
    """Raise unless the bits are the same; of 16, a NaN may become another one: it is widened."""
    if f.bits == 16 and got.shape == want.shape:
        got = np.where(oracle.is_nan(got, f) & oracle.is_nan(want, f), want, got)
    _same_integers(f"bits of {name}", got, want)


def _same_numbers(name: str, got_bits: Array, want_bits: Array, f: Format) -> None:
    """Raise unless the bits are of equal numbers: NaN equal to NaN, -0 equal to +0."""
    got, want = numbers(got_bits, f), numbers(want_bits, f)
    _require(got.shape == want.shape, f"{name}: expected {want.shape}, got {got.shape}")
    wrong = np.argwhere(~((got == want) | (np.isnan(got) & np.isnan(want))))
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise Wrong(
            f"{name}: {len(wrong)} of {want.size} are wrong, the first at {list(at)}: "
            f"expected {want[at]}, got {got[at]}"
        )


def _close(name: str, got: Tensor, want: oracle.Sums, f: Format) -> None:
    """Raise unless the sums are as close as sums in the wide format, rounded once, have to be."""
    _require(got.dtype == inputs.TORCH[f], f"{name}: expected {f.name}, got {got.dtype}")
    total = want.total.reshape(tuple(got.shape))
    allowed = (want.terms + 3) * 2 * f.wide.epsilon * want.magnitude.reshape(total.shape)
    allowed = allowed + 1.01 * f.epsilon * np.abs(total) + f.tiny * 2 * f.epsilon
    # The float64 of the oracle is no better than that of the op.
    allowed = allowed * (2 if f is F64 else 1)
    error = np.abs(numbers(bits_of(got, f), f) - total)
    wrong = np.argwhere(~(error <= allowed))
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise Wrong(
            f"{name}: {len(wrong)} of {total.size} are wrong, the first at {list(at)}: expected "
            f"{total[at]!r}, got {got[at].item()!r}, which is {error[at]:.3g} away, "
            f"not {allowed[at]:.3g}"
        )


def _selection(
    acts: SparseActs,
    want: oracle.Selection,
    x: Array,
    f: Format,
    places: int,
    same: Callable[[str, Array, Array, Format], None] = _same_bits,
) -> None:
    """Raise unless the code is the selection of the matrix of bits, with as many places."""
    assert acts.offsets is not None
    _same_integers("offsets", integers(acts.offsets), want.offsets)
    total = len(want.rows)
    indices, values = integers(acts.indices), bits_of(acts.values, f)
    _require(len(indices) == len(values) == places, f"places: expected {places}, got {len(values)}")
    _same_integers("indices", indices[:total], want.columns)
    same("values", values[:total], x[want.rows, want.columns], f)
    _require(not indices[total:].any() and not values[total:].any(), "padding: expected zeros")


def topk(rng: Rng) -> tuple[str, int]:
    """Call topk with a hostile matrix; return what it was and its rows."""
    f = inputs.a_format(rng)
    _, width_of, most = inputs.WIDTHS[np.searchsorted(_WIDTHS_UP_TO, rng.random())]
    width = width_of(rng)
    n = int(rng.integers(0, 4)) if rng.random() < 0.05 else int(rng.integers(1, 2 * most))
    bits, kinds = inputs.matrix(rng, n, width, f)
    k, sorted = inputs.a_k(rng, width), bool(rng.integers(0, 2))
    what = f"topk of {n} x {width} {f.name}, k {k}, sorted {sorted}, {kinds}"
    x = laid_out(rng, tensor(bits, f))
    if n % 2 == 0 and rng.random() < 0.1:
        x = x.unflatten(0, (2, n // 2))
    elif n == 1 and rng.random() < 0.5:
        x = x[0]
    try:
        values, indices = ops.topk(x, k, sorted=sorted)
        _require(values.shape == indices.shape == (*x.shape[:-1], k), "shape")
        columns = oracle.topk(bits, f, k, sorted)
        _same_integers("indices", integers(indices).reshape(n, k), columns)
        want = np.take_along_axis(bits, columns, axis=1)
        _same_bits("values", bits_of(values, f).reshape(n, k), want, f)
    except Exception as e:
        raise Wrong(f"{what}: {e}") from e
    return what, n


_WIDTHS_UP_TO = np.cumsum([chance for chance, _, _ in inputs.WIDTHS])[:-1]


def _a_matrix(rng: Rng) -> tuple[Array, Format, Tensor, str]:
    """Return a matrix; a few have the 262,144 entries from which on a sample is taken."""
    f = inputs.a_format(rng)
    if rng.random() < 0.02:
        n, width = int(rng.integers(60, 110)), int(rng.choice([2732, 4099, 4600]))
    elif rng.random() < 0.1:  # enough rows for the lists of feature_topk
        n, width = int(rng.integers(256, 700)), int(rng.integers(1, 73))
    else:
        n, width = inputs.a_count(rng), inputs.a_width(rng)
    bits, kinds = inputs.matrix(rng, n, width, f)
    return bits, f, laid_out(rng, tensor(bits, f)), f"{n} x {width} {f.name}, {kinds}"


def _k_of(budget: int, n: int) -> float:
    """Return a mean k per row whose budget, `int(k * n)`, is `budget`."""
    return (budget + 0.5) / n if n else float(budget)


def _a_guess(rng: Rng, f: Format, threshold: float) -> Tensor | None:
    """Return a guess of the threshold: none, near it, or far away."""
    which = rng.integers(0, 6)
    if which == 0:
        return None
    far = float(rng.choice([1, 1e-3, -1, 1e30, math.nan, math.inf, -math.inf]))
    near = threshold * float(rng.choice([1, 0.9, 0.95, 1.04, 1.06, 1.2]))
    return torch.tensor(far if which == 1 else near, dtype=inputs.TORCH[f.wide])


def batch_topk(rng: Rng) -> tuple[str, int]:
    """Call batch_topk."""
    bits, f, x, what = _a_matrix(rng)
    n, budget = len(bits), inputs.a_budget(rng, bits.size)
    want, threshold = oracle.batch_topk(bits, f, min(budget, bits.size))
    guess = _a_guess(rng, f, threshold)
    what = f"batch_topk of {what}, budget {budget}, guess {guess}"
    try:
        got = ops.batch_topk(x, _k_of(budget, n), threshold_guess=guess)
        _selection(got.acts, want, bits, f, min(budget, bits.size))
        _threshold(got.threshold, threshold, f)
    except Exception as e:
        raise Wrong(f"{what}: {e}") from e
    return what, n


def _threshold(got: Tensor, want: float, f: Format) -> None:
    _require(got.dtype == inputs.TORCH[f.wide], f"threshold: expected {f.wide.name}")
    _require(got.item() == want, f"threshold: expected {want}, got {got.item()}")


def threshold_select(rng: Rng) -> tuple[str, int]:
    """Call threshold_select with one threshold, or one per latent."""
    bits, f, x, what = _a_matrix(rng)
    n, width = bits.shape
    capacity = inputs.a_budget(rng, bits.size)
    special = np.array([0, -0.0, 0.5, 1, -1, math.inf, -math.inf, math.nan, 1e-40, 3e38])
    each = rng.random() < 0.5
    drawn = rng.choice(special, width if each else ())
    if each and rng.random() < 0.7:
        drawn = np.where(rng.random(width) < 0.5, rng.standard_normal(width), drawn)
    theta = drawn.astype(np.float64 if f is F64 else np.float32)
    what = f"threshold_select of {what}, capacity {capacity}, " + (
        "one each" if each else f"threshold {theta}"
    )
    try:
        got = ops.threshold_select(x, torch.from_numpy(np.asarray(theta)), capacity)
        want = oracle.threshold_select(bits, f, theta.astype(np.float64), capacity)
        _selection(got, want, bits, f, min(capacity, bits.size))
    except Exception as e:
        raise Wrong(f"{what}: {e}") from e
    return what, n


def _lengths(rng: Rng, n: int, width: int) -> Array:
    most = int(rng.choice([0, 1, 3, n // 12, n // 4, n, n + 2]))
    lengths = rng.integers(0, most + 1, width)
    if rng.random() < 0.3:
        lengths[:] = most
    return lengths


def feature_topk(rng: Rng) -> tuple[str, int]:
    """Call feature_topk."""
    bits, f, x, what = _a_matrix(rng)
    n, width = bits.shape
    lengths = _lengths(rng, n, width)
    places = int(np.minimum(lengths, n).sum())
    extra = int(rng.integers(0, 4)) if rng.random() < 0.5 else None
    what = f"feature_topk of {what}, lengths up to {lengths.max(initial=0)}, extra {extra}"
    m = torch.from_numpy(lengths).to([torch.int32, torch.int64][rng.integers(0, 2)])
    try:
        got = ops.feature_topk(x, m, capacity=None if extra is None else places + extra)
        want = oracle.feature_topk(bits, f, lengths)
        _selection(got, want, bits, f, min(places + (extra or 0), bits.size))
    except Exception as e:
        raise Wrong(f"{what}: {e}") from e
    return what, n


class _Encoder:
    """The inputs of an encoder, the options all of them have, and its pre-activations."""

    def __init__(self, rng: Rng, f: Format | None = None, n: int | None = None) -> None:
        f = self.f = f or (F32, F64, BF16, F16)[rng.choice(4, p=[0.5, 0.1, 0.2, 0.2])]
        which = rng.random()
        if n is not None:
            self.n, self.d_sae = n, max(2, inputs.a_width(rng))
        elif which < 0.03:  # more latents than seeds, or enough entries for a sample
            self.n, self.d_sae = int(rng.integers(30, 150)), int(rng.integers(2500, 5500))
        elif which < 0.06:  # more than one block of rows
            self.n, self.d_sae = int(rng.integers(480, 1100)), int(rng.integers(1, 300))
        else:
            self.n = inputs.a_count(rng)
            self.d_sae = max(1, inputs.a_width(rng))
        w = inputs.Weights(rng, self.n, self.d_sae, f, special=rng.random() < 0.15)
        self.arguments, self.b_dec = w.tensors[:3], w.tensors[3]
        self.mask = inputs.a_mask(rng, self.d_sae)
        self.options: dict[str, torch.dtype] = {}
        if f is F32 and rng.random() < 0.3:
            self.options["compute_dtype"] = torch.bfloat16
        elif f in (BF16, F16) and rng.random() < 0.3:
            self.options["select_dtype"] = torch.float32
        self.pre = oracle.pre_activations(w.x, w.W, w.b_enc, w.b_dec)
        self.bits = oracle.rounded(self.pre, f.wide)
        self.what = (
            f"{self.n} x {w.d_in} x {self.d_sae} {f.name}, b_enc {w.b_enc is not None}, b_dec "
            f"{w.b_dec is not None}, mask of "
            f"{'all' if self.mask is None else int(self.mask.sum())}, {self.options}"
        )

    def torch_mask(self) -> Tensor | None:
        """Return the mask as a tensor."""
        return None if self.mask is None else torch.from_numpy(self.mask)

    def eligible(self) -> Array:
        """Return the bits of the pre-activations, -inf outside of the mask."""
        if self.mask is None:
            return self.bits
        wide = self.f.wide
        return np.where(self.mask, self.bits, wide.uint(wide.inf | wide.sign))

    def compare(self, acts: SparseActs, want: oracle.Selection, places: int) -> None:
        """Raise unless the code is the selection, its values rounded to the format.

        The sign of a sum that is 0 is not promised.
        """
        _selection(acts, want, oracle.rounded(self.pre, self.f), self.f, places, _same_numbers)


def encode_topk(rng: Rng) -> tuple[str, int]:
    """Call encode_topk; equal values may differ in the sign of a zero."""
    e = _Encoder(rng)
    k, relu = inputs.a_k(rng, e.d_sae), bool(rng.integers(0, 2))
    absolute = rng.random() < 0.3
    what = f"encode_topk of {e.what}, k {k}, relu {relu}, absolute {absolute}"
    try:
        values, indices = ops.encode_topk(
            *e.arguments,
            k,
            b_dec=e.b_dec,
            mask=e.torch_mask(),
            relu=relu,
            absolute=absolute,
            **e.options,
        )
        columns, want = oracle.masked_topk(e.pre, k, e.mask, absolute)
        want = np.where(want < 0, 0, want) if relu and not absolute else want
        want = oracle.rounded(want, e.f)
        got, got_values = integers(indices), bits_of(values, e.f)
        if emulated and e.mask is not None:
            # A GPU takes a latent outside of the mask for -inf, which ties with a real -inf.
            fair = ~np.isneginf(e.pre).any(1)
            got, got_values, columns, want = got[fair], got_values[fair], columns[fair], want[fair]
        _same_integers("indices", got, columns)
        _same_numbers("values", got_values, want, e.f)
    except Exception as error:
        raise Wrong(f"{what}: {error}") from error
    return what, e.n


def encode_group_max(rng: Rng) -> tuple[str, int]:
    """Call encode_group_max; equal values may differ in the sign of a zero."""
    e = _Encoder(rng)
    k = int(rng.choice([k for k in range(1, e.d_sae + 1) if e.d_sae % k == 0]))
    e.options.pop("select_dtype", None)
    what = f"encode_group_max of {e.what}, k {k}"
    try:
        values, indices = ops.encode_group_max(*e.arguments, k, b_dec=e.b_dec, **e.options)
        columns, want = oracle.group_max(e.pre, k)
        want = oracle.rounded(np.where(want < 0, 0, want), e.f)
        _same_integers("indices", integers(indices), columns)
        _same_numbers("values", bits_of(values, e.f), want, e.f)
    except Exception as error:
        raise Wrong(f"{what}: {error}") from error
    return what, e.n


def encode_batch_topk(rng: Rng) -> tuple[str, int]:
    """Call encode_batch_topk."""
    e = _Encoder(rng)
    return _encode_batch_topk(rng, e, inputs.a_budget(rng, e.n * e.d_sae))


def _encode_batch_topk(rng: Rng, e: _Encoder, budget: int) -> tuple[str, int]:
    places = min(budget, e.n * e.d_sae)
    want, smallest = oracle.batch_topk(e.eligible(), e.f.wide, places)
    guess = _a_guess(rng, e.f, smallest)
    what = f"encode_batch_topk of {e.what}, budget {budget}, guess {guess}"
    try:
        acts, threshold = ops.encode_batch_topk(
            *e.arguments,
            _k_of(budget, e.n),
            b_dec=e.b_dec,
            mask=e.torch_mask(),
            threshold_guess=guess,
            **e.options,
        )
        e.compare(acts, want, places)
        _threshold(threshold, smallest, e.f)
    except Exception as error:
        raise Wrong(f"{what}: {error}") from error
    return what, e.n


def encode_threshold(rng: Rng) -> tuple[str, int]:
    """Call encode_threshold with one threshold, or one per latent."""
    e = _Encoder(rng)
    capacity = inputs.a_budget(rng, e.n * e.d_sae)
    each = rng.random() < 0.5
    theta = rng.integers(-8, 20, e.d_sae if each else ()) / 2
    what = f"encode_threshold of {e.what}, capacity {capacity}, each {each}"
    # In the dtype of sums, whatever it comes in.
    given = torch.from_numpy(np.asarray(theta)).to(inputs.TORCH[e.f.wide])
    try:
        acts = ops.encode_threshold(*e.arguments, given, capacity, b_dec=e.b_dec, **e.options)
        want = oracle.threshold_select(e.bits, e.f.wide, theta, capacity)
        e.compare(acts, want, min(capacity, e.n * e.d_sae))
    except Exception as error:
        raise Wrong(f"{what}: {error}") from error
    return what, e.n


def encode_feature_topk(rng: Rng) -> tuple[str, int]:
    """Call encode_feature_topk."""
    e = _Encoder(rng)
    lengths = _lengths(rng, e.n, e.d_sae)
    capacity = int(np.minimum(lengths, e.n).sum() + rng.integers(0, 3))
    what = f"encode_feature_topk of {e.what}, lengths up to {lengths.max(initial=0)}"
    try:
        acts = ops.encode_feature_topk(
            *e.arguments, torch.from_numpy(lengths), capacity, b_dec=e.b_dec
        )
        want = oracle.feature_topk(e.bits, e.f.wide, lengths)
        e.compare(acts, want, min(capacity, e.n * e.d_sae))
    except Exception as error:
        raise Wrong(f"{what}: {error}") from error
    return what, e.n


class _Code:
    """A sparse code in one of the layouts, some of its entries inactive, and its numbers.

    Indices are as they come: unsorted, and sometimes the same latent twice in a row.
    """

    def __init__(self, rng: Rng, dtypes: tuple[Format, ...]) -> None:
        f = self.f = dtypes[rng.integers(0, len(dtypes))]
        self.n, self.d_sae = inputs.a_count(rng, 70), max(1, inputs.a_width(rng, 300))
        self.d = max(1, inputs.a_width(rng, 200))
        self.value_format = f.wide if rng.random() < 0.2 else f
        most = int(rng.choice([1, 3, 20]))
        if rng.random() < 0.5:
            self.layout, k = "fixed", int(rng.integers(0, most + 1))
            counts, shape = np.full(self.n, k), (self.n, k)
        else:
            self.layout, counts = "variable", rng.integers(0, most + 1, self.n)
            counts[rng.random(self.n) < 0.2] = 0
            shape = (int(counts.sum() + rng.integers(0, 5)),)
        size = math.prod(shape)
        rows = np.repeat(np.arange(self.n), counts)
        self.rows = np.concatenate([rows, np.full(size - len(rows), self.n)])
        popular = 1 if rng.random() < 0.2 else self.d_sae
        latents = rng.integers(0, popular, size)
        latents[self.rows == self.n] = 0
        values, _ = inputs.exact(rng, (size,), self.value_format)
        values[rng.random(size) < rng.choice([0, 0.3, 1], p=[0.4, 0.5, 0.1])] = 0.0
        values[(values == 0) & (rng.random(size) < 0.5)] = -0.0
        values[self.rows == self.n] = 0.0
        self.entries = oracle.Entries(values, latents, self.rows, self.n)
        self.shape = shape
        self.values = tensor(oracle.rounded(values, self.value_format), self.value_format)
        self.values = self.values.view(shape)
        self.indices = torch.from_numpy(latents.astype(np.int32)).view(shape)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.offsets = None if self.layout == "fixed" else torch.from_numpy(offsets)
        self.what = (
            f"{list(shape)} entries, {self.layout}, of {self.n} x {self.d_sae}, width {self.d}, "
            f"{f.name}, values {self.value_format.name}"
        )

    @property
    def acts(self) -> SparseActs:
        """The code as the ops take it."""
        return SparseActs(self.values, self.indices, self.offsets, self.d_sae)

    def dictionary(self, rng: Rng) -> tuple[Array, Tensor]:
        """Return a matrix [d_sae, d], NaN where no active entry reads it."""
        W, _ = inputs.exact(rng, (self.d_sae, self.d), self.f)
        unread = np.ones(self.d_sae, bool)
        unread[self.entries.indices[self.entries.active]] = False
        W[unread] = math.nan
        return W, laid_out(rng, tensor(oracle.rounded(W, self.f), self.f))


_ALL = (F32, F64, BF16, F16)


def sparse_decode(rng: Rng) -> tuple[str, int]:
    """Call sparse_decode."""
    c = _Code(rng, _ALL)
    W, W_dec = c.dictionary(rng)
    b, b_dec = inputs.exact(rng, (c.d,), c.f) if rng.random() < 0.5 else (None, None)
    what = f"sparse_decode of {c.what}, b_dec {b is not None}"
    try:
        got = ops.sparse_decode(c.acts, W_dec, b_dec)
        _require(got.shape == (c.n, c.d), f"shape {list(got.shape)}")
        _close("result", got, oracle.sparse_decode(c.entries, W, b), c.f)
    except Exception as e:
        raise Wrong(f"{what}: {e}") from e
    return what, c.n


def sparse_decode_error(rng: Rng) -> tuple[str, int]:
    """Call sparse_decode_error: each result is checked by those before it."""
    c = _Code(rng, _ALL)
    W, W_dec = c.dictionary(rng)
    b, b_dec = inputs.exact(rng, (c.d,), c.f) if rng.random() < 0.5 else (None, None)
    t, target = inputs.exact(rng, (c.n, c.d), c.f)
    wide, what = c.f.wide, f"sparse_decode_error of {c.what}, b_dec {b is not None}"
    try:
        got = ops.sparse_decode_error(c.acts, W_dec, b_dec, laid_out(rng, target))
        _require(got.reconstruction.shape == got.error.shape == (c.n, c.d), "shapes")
        _require(got.products.shape == c.values.shape, f"shape {list(got.products.shape)}")
        _close("reconstruction", got.reconstruction, oracle.sparse_decode(c.entries, W, b), c.f)
        less = numbers(bits_of(got.reconstruction, c.f), c.f) - t
        error = numbers(bits_of(got.error, wide), wide)
        _require(np.array_equal(error, numbers(oracle.rounded(less, wide), wide)), "error")
        _close("squared", got.squared, oracle.squares(error), wide)
        error = numbers(oracle.rounded(error, c.f), c.f)
        products = oracle.sparse_decode_values_grad(error, c.entries, W)
        _close("products", got.products, products, wide)
    except Exception as e:
        raise Wrong(f"{what}: {e}") from e
    return what, c.n


def sparse_decode_values_grad(rng: Rng) -> tuple[str, int]:
    """Call sparse_decode_values_grad."""
    c = _Code(rng, _ALL)
    W, W_dec = c.dictionary(rng)
    g, grad = inputs.exact(rng, (c.n, c.d), c.f)
    what = f"sparse_decode_values_grad of {c.what}"
    try:
        got = ops.sparse_decode_values_grad(laid_out(rng, grad), c.acts, W_dec)
        _require(got.shape == c.values.shape, f"shape {list(got.shape)}")
        _close("result", got, oracle.sparse_decode_values_grad(g, c.entries, W), c.value_format)
    except Exception as e:
        raise Wrong(f"{what}: {e}") from e
    return what, c.n


def group_by_latent(rng: Rng) -> tuple[str, int]:
    """Call group_by_latent."""
    c = _Code(rng, _ALL)
    what = f"group_by_latent of {c.what}"
    try:
        got = ops.group_by_latent(c.acts)
        offsets, rows, slots = oracle.group_by_latent(c.entries, c.d_sae)
        total = len(rows)
        _same_integers("offsets", integers(got.offsets), offsets)
        _require(got.rows.shape == got.slots.shape == (c.values.numel(),), "places")
        _same_integers("rows", integers(got.rows)[:total], rows)
        _same_integers("slots", integers(got.slots)[:total], slots)
        if not emulated:  # a GPU leaves what is behind the lists as it was
            _require(not (got.rows[total:].any() or got.slots[total:].any()), "padding")
    except Exception as e:
        raise Wrong(f"{what}: {e}") from e
    return what, c.n


def sparse_weight_grad(rng: Rng) -> tuple[str, int]:
    """Call sparse_weight_grad with the lists of the oracle."""
    c = _Code(rng, _ALL)
    g, x = inputs.exact(rng, (c.n, c.d), c.f)
    lists = oracle.group_by_latent(c.entries, c.d_sae)
    behind = len(c.entries.values) - len(lists[1])
    padded = (lists[0], *(np.pad(t, (0, behind)) for t in lists[1:]))
    given = LatentLists(*(torch.from_numpy(t.astype(np.int32)) for t in padded))
    what = f"sparse_weight_grad of {c.what}"
    try:
        weight, bias = ops.sparse_weight_grad(c.values, given, laid_out(rng, x))
        for name, got, want in zip(
            ("weight", "bias"),
            (weight, bias),
            oracle.sparse_weight_grad(c.entries.values, lists, g),
            strict=True,
        ):
            _require(got.shape == want.total.shape, f"shape {list(got.shape)}")
            _close(name, got, want, c.f)
    except Exception as e:
        raise Wrong(f"{what}: {e}") from e
    return what, c.n


def sparse_adam_step(rng: Rng) -> tuple[str, int]:
    """Call sparse_adam_step_."""
    c = _Code(rng, (F32, F64))
    if c.value_format is not c.f:
        return sparse_adam_step(rng)
    shapes = ((c.d_sae, c.d), (c.d_sae, c.d), (c.d_sae,), (c.d,))
    state = [inputs.exact(rng, s, c.f)[0] for s in shapes]
    if rng.random() < 0.3:
        state[1][0] = 0.0  # a row that stays 0 without a gradient
    state += [0.1 * inputs.exact(rng, s, c.f)[0] for s in shapes]
    squares = [s[:1] for s in shapes] if rng.random() < 0.4 else shapes
    state += [0.001 + 0.01 * np.abs(inputs.exact(rng, s, c.f)[0]) for s in squares]
    tensors = [tensor(oracle.rounded(t, c.f), c.f) for t in state]
    state = [numbers(bits_of(t, c.f), c.f) for t in tensors]
    gv, grad_values = inputs.exact(rng, (len(c.entries.values),), c.f)
    x, x_t = inputs.exact(rng, (c.n, c.d), c.f)
    g, grad_output = inputs.exact(rng, (c.n, c.d), c.f)
    extra, extra_t = None, None
    if rng.random() < 0.4:
        latents = rng.permutation(c.d_sae)[: int(rng.integers(0, c.d_sae + 1))]
        rows = [inputs.exact(rng, (len(latents), *s[1:]), c.f) for s in shapes[:3]]
        extra = (latents, *(r[0] for r in rows))
        extra_t = LatentGradients(torch.from_numpy(latents.astype(np.int32)), *(r[1] for r in rows))
    clip = (None, 0.5, 1e9)[rng.integers(0, 3)]
    o = oracle.Adam(
        1e-2, 0.9, 0.999, 1e-8, int(rng.integers(1, 50)), clip or math.inf, rng.random() < 0.7
    )
    what = f"sparse_adam_step_ of {c.what}, {o}, extra {None if extra is None else len(extra[0])}"
    try:
        ops.sparse_adam_step_(
            *(StepTensors(*tensors[i : i + 4]) for i in (0, 4, 8)),
            c.acts,
            grad_values.view(c.shape),
            x_t,
            grad_output,
            lr=o.lr,
            step=o.step,
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            clip_grad_norm=clip,
            unit_norm=o.unit_norm,
            extra_grads=extra_t,
        )
        after = oracle.sparse_adam_step(state, c.entries, gv, x, g, extra, o)
        tolerance = 1e-10 if c.f is F64 else 3e-5
        for i, (got, want) in enumerate(zip(tensors, after, strict=True)):
            name = ("", "exp_avg.", "exp_avg_sq.")[i // 4] + StepTensors._fields[i % 4]
            error = np.abs(numbers(bits_of(got, c.f), c.f) - want)
            scale = 1 + np.abs(want).max(initial=0)
            _require(
                bool((error <= tolerance * scale).all()),
                f"{name}: {error.max(initial=0):.3g} away, not {tolerance * scale:.3g}",
            )
    except Exception as e:
        raise Wrong(f"{what}: {e}") from e
    return what, c.n


def _batch(n: int, f: Format, k: int, some: bool) -> Callable[[], tuple[str, int]]:
    """Return a call of encode_batch_topk, with no latent in the mask or with half of them."""

    def run() -> tuple[str, int]:
        rng = generator(0, "ops", 0)
        e = _Encoder(rng, f, n)
        e.mask = np.arange(e.d_sae) % 2 == 0 if some else np.zeros(e.d_sae, bool)
        e.what = f"{e.what}, then of {int(e.mask.sum())}"
        return _encode_batch_topk(rng, e, k * n)

    return run


# What went wrong once. With no latent in the mask, the process ended: the rank in a sample of
# nothing was the integer of NaN, and rows were divided by a width of 0. With nothing to keep, the
# scratch of the CUDA kernels had a size that was not initialized.
NAMED = {
    "no_latent_in_the_mask_float32": _batch(32, F32, 3, False),
    "no_latent_in_the_mask_bfloat16": _batch(1, BF16, 3, False),
    "no_latent_in_the_mask_float16": _batch(1, F16, 3, False),
    "no_budget": _batch(5, F32, 0, True),
    "no_rows": _batch(0, F32, 3, True),
}
OPS = (
    *(batch_topk, threshold_select, feature_topk) * 3,
    *(encode_topk, encode_batch_topk) * 3,
    *(encode_threshold, encode_feature_topk, encode_group_max) * 2,
    *(sparse_decode, sparse_decode_error, sparse_decode_values_grad, group_by_latent) * 2,
    *(sparse_weight_grad, sparse_adam_step) * 2,
)
"""As often as they are called."""
