"""Small calls of every operator, for any namespace and device: what sanitizers and graphs run.

Sizes are the smallest that reach every path: odd widths, several blocks, ties, both layouts of the
activations. Products are of small integers, so that every order of summation gives the same number
and a selection has one right answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from fastsae import _library
from tests.ops.inputs import acts, matrix

NAMES = (
    "topk",
    "batch_topk",
    "feature_topk",
    "threshold_select",
    "encode_topk",
    "encode_batch_topk",
    "encode_threshold",
    "encode_group_max",
    "encode_gradient_topk",
    "latent_scores",
    "sparse_decode",
    "sparse_decode_error",
    "sparse_decode_values_grad",
    "group_by_latent",
    "sparse_weight_grad",
    "sparse_adam_step_",
)
KEYS = {"cpu": "CPU", "cuda": "CUDA"}
MUTATED = {"sparse_adam_step_": (*range(12), 40, 41)}  # arguments that an operator writes to


@dataclass(frozen=True)
class Call:
    """One call: the operator, what is special about it, its arguments."""

    op: str
    case: str
    arguments: tuple[Any, ...]
    tolerance: float = 0.0
    """Of floating outputs, relative and absolute; integers are always exact."""
    way: str = ""
    """How CUDA's encoders meet their pre-activations, or its update the rows that it moves: see
    `_library.set_cuda_encode` and `set_cuda_adam`."""

    def __str__(self) -> str:
        return f"{self.op}-{self.case}" + (f"-{self.way}" if self.way else "")

    def to(self, device: str) -> Call:
        """Return the same call with its tensors there."""
        moved = (a.to(device) if isinstance(a, Tensor) else a for a in self.arguments)
        return replace(self, arguments=tuple(moved))

    def __call__(self, namespace: str = "fastsae") -> tuple[Tensor, ...]:
        """Return what the operator returns or, on copies, what it writes to."""
        library = self._cuda_library(namespace) if self.way else None
        if library is None:
            return self._run(namespace)
        updates = self.op == "sparse_adam_step_"
        switch = _library.set_cuda_adam if updates else _library.set_cuda_encode
        before = switch(self.way, library)
        try:
            return self._run(namespace)
        finally:
            switch(before, library)

    def _cuda_library(self, namespace: str) -> Path | None:
        """Return the library with the CUDA kernels that the call runs, emulated or not."""
        if namespace == "fastsae":
            on_gpu = any(isinstance(a, Tensor) and a.is_cuda for a in self.arguments)
            return _library.cuda_library if on_gpu else None
        known = {str(_library.cpu_library), str(_library.cuda_library)}
        return Path(next(path for path in torch.ops.loaded_libraries if path not in known))

    def _run(self, namespace: str) -> tuple[Tensor, ...]:
        function = getattr(getattr(torch.ops, namespace), self.op)
        arguments, places = [*self.arguments], MUTATED.get(self.op, ())
        written = [i for i in places if i < len(arguments) and arguments[i] is not None]
        for i in written:
            arguments[i] = arguments[i].clone()
        out = function(*arguments)
        if written:
            return tuple(arguments[i] for i in written)
        return out if isinstance(out, tuple) else (out,)


def has_kernel(op: str, namespace: str = "fastsae", device: str = "cpu") -> bool:
    """Return whether the operator has a kernel of its own there, not a stand-in."""
    name = f"{namespace}::{op}"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, KEYS[device]))


def check(call: Call, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Raise where two results of the same call differ in what the operator promises."""
    if call.op == "group_by_latent":  # behind the lists there is nothing
        size = int(want[0][-1])
        got, want = ((t[0], t[1][:size], t[2][:size]) for t in (got, want))  # type: ignore[assignment]
    assert len(got) == len(want), f"{call}: expected {len(want)} results, got {len(got)}"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        tolerance = call.tolerance if b.is_floating_point() else 0.0
        if tolerance and b.dtype == torch.bfloat16:
            tolerance = max(tolerance, 2**-7)  # an ulp: what it was rounded from may differ

        def message(text: str, i: int = i) -> str:
            return f"{call}, result {i}: {text}"

        assert_close(a.cpu(), b.cpu(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=message)


def _integers(*shape: int, dtype: torch.dtype, most: int = 2) -> Tensor:
    return torch.randint(-most, most + 1, shape).to(dtype)


def _select() -> list[Call]:
    found = []
    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    # Rows held by a block, streamed, cut into parts, selected from as a whole; k at both ends.
    for n, m, k, dtype, kind in (
        (6, 2048, 24, f32, "normal"),
        (5, 999, 100, f32, "ties"),
        (3, 100, 10, bf16, "special"),
        (5, 257, 9, f16, "ties"),
        (2, 301, 40, f64, "normal"),
        (3, 4099, 3, bf16, "normal"),
        (3, 33_001, 20, f32, "normal"),
        (1, 9000, 40, f32, "ascending"),
        (4, 130, 60, f32, "zeros"),
        (9, 17_001, 100, f32, "normal"),  # more candidates than are ranked at once
        (2, 1203, 200, f32, "normal"),  # sorted, not ranked
    ):
        for sorted in (False, True):
            x = matrix(kind, n, m, dtype)
            found.append(Call("topk", f"{n}x{m}-{kind}-sorted{sorted}-{dtype}", (x, k, sorted)))
    for n, m, dtype, kind in (
        (7, 301, f32, "normal"),
        (9, 1030, bf16, "ties"),
        (40, 130, f32, "ties"),
        (3, 40, f32, "negative"),
        (6, 5003, f32, "ties"),  # several tiles
        (40, 7001, f32, "normal"),  # enough for a sample
        (40, 129, f16, "equal"),
        (5, 77, f64, "normal"),
    ):
        x = matrix(kind, n, m, dtype)
        wide = f64 if dtype == f64 else f32
        budget = 5 * n + 3
        case = f"{n}x{m}-{kind}-{dtype}"
        guess = torch.tensor(1.0, dtype=wide)
        lengths = torch.arange(m, dtype=torch.int32) % 5
        theta = torch.linspace(0.2, 1.5, m).to(wide)
        found += [
            Call("batch_topk", case, (x, budget, None)),
            Call("batch_topk", f"{case}-threshold_guess", (x, budget, guess)),
            Call("feature_topk", case, (x, lengths, int(lengths.clamp(max=n).sum()) + 2)),
            Call("threshold_select", case, (x, guess, n * m)),
            Call("threshold_select", f"{case}-few", (x, theta, 2 * n + 1)),
        ]
    # What the emulation's sample looks at, every 16th vector, is larger than the rest, or smaller.
    for name, sampled in (("high", True), ("low", False)):
        x = matrix("normal", 64, 1024, f32).abs() + 0.1
        x.view(-1, 4)[(torch.arange(64 * 256) % 16 == 0) == sampled] += 10
        found.append(Call("batch_topk", f"misleading-{name}", (x, 8192, None)))
    # So much of the matrix that it is read instead of candidates.
    x = matrix("ties", 40, 7001, f32)
    found += [
        Call("batch_topk", "dense", (x, 90_000, None)),
        Call("threshold_select", "dense", (x, torch.tensor(-0.5), 200_000)),
    ]
    # Enough rows for lists: of aligned and other columns, a bound from every second row, more tasks
    # than threads, ties at the bound and many of them, and columns that are settled as a whole.
    for n, m, dtype, kind in (
        (600, 40, f32, "ties"),
        (680, 515, f32, "normal"),
        (300, 41, f32, "equal"),
        (320, 72, bf16, "ties"),
        (300, 37, f16, "special"),
        (260, 34, f64, "normal"),
    ):
        x = matrix(kind, n, m, dtype)
        one = torch.arange(m, dtype=torch.int32) % 2
        few, many = one + 1, one + 1
        few[1], many[m // 2 : m // 2 + 5] = n // 4, n // 12
        for name, lengths in (("one", one), ("few-large", few), ("many-large", many)):
            case = f"{n}x{m}-{kind}-{dtype}-{name}"
            found.append(Call("feature_topk", case, (x, lengths, int(lengths.sum()))))
    return found


def _encode() -> list[Call]:
    found = []
    for n, d, m, dtype, bf16_product in (
        (5, 33, 130, torch.float32, False),
        (40, 64, 515, torch.float32, True),
        (70, 40, 300, torch.bfloat16, False),
        (3, 24, 70, torch.float16, False),
        (33, 17, 65, torch.float64, False),
        (3, 2, 9005, torch.float32, False),  # more than a tile; rows at any address
    ):
        x, W = _integers(n, d, dtype=dtype), _integers(m, d, dtype=dtype)
        b_enc, b_dec = _integers(m, dtype=dtype, most=4), _integers(d, dtype=dtype)
        mask = torch.rand(m) < 0.5
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        theta, thetas = torch.tensor(3.0, dtype=wide), torch.arange(m).remainder(9).to(wide)
        case = f"{n}x{d}x{m}-{dtype}" + ("-bf16" if bf16_product else "")
        budget, product = 4 * n + 1, bf16_product
        absolute = (x, W, b_enc, b_dec, 8, mask, False, True, product)
        found += [
            Call("encode_topk", case, (x, W, b_enc, b_dec, 7, None, True, False, product)),
            Call("encode_topk", f"{case}-mask", (x, W, None, None, 9, mask, False, False, product)),
            Call("encode_topk", f"{case}-absolute", absolute),
            Call("encode_batch_topk", case, (x, W, b_enc, b_dec, budget, None, product, None)),
            Call(
                "encode_batch_topk",
                f"{case}-mask-threshold_guess",
                (x, W, None, b_dec, budget, mask, product, theta),
            ),
            Call("encode_threshold", case, (x, W, b_enc, b_dec, theta, n * m, product)),
            Call("encode_threshold", f"{case}-few", (x, W, b_enc, None, thetas, budget, product)),
        ]
        grad, W_dec = _integers(n, d + 3, dtype=dtype), _integers(m, d + 3, dtype=dtype)
        scored, groups = (x, W, b_enc, b_dec, grad, W_dec), 65 if m == 65 else 5
        entropy = (x, W, b_enc, b_dec, True, budget, product)
        found += [
            Call("encode_group_max", case, (x, W, b_enc, b_dec, groups, product)),
            Call("encode_gradient_topk", case, (*scored, 6, 1.5, True, product)),
            Call("encode_gradient_topk", f"{case}-literal", (*scored, 6, 0.5, False, product)),
            Call("latent_scores", case, (x, W, None, b_dec, False, budget, product), 1e-5),
            Call("latent_scores", f"{case}-entropy", entropy, 1e-5),
        ]
    return found + _encode_in_blocks(found) + _encode_on_hopper()


IN_BLOCKS = ("encode_topk", "encode_batch_topk", "encode_threshold")


def _encode_in_blocks(found: list[Call]) -> list[Call]:
    """The same a block at a time, and what blocks find hard: lists that overflow, large k."""
    ways = ("blocks", "overlap", "blocks:1x64", "overlap:5x192")
    here = [call for call in found if call.op in IN_BLOCKS]
    more = [replace(call, way=ways[i % len(ways)]) for i, call in enumerate(here)]
    n, m = 21, 1003
    x, W = _integers(n, 1, dtype=torch.float32), _integers(m, 1, dtype=torch.float32)
    for kind, b_enc in (
        ("ascending", torch.arange(m).float()),
        ("equal", torch.ones(m)),
        ("normal", torch.randn(m)),
    ):
        for k in (3, 100):
            arguments = (x, W, b_enc, None, k, None, False, False, False)
            more.append(Call("encode_topk", f"{kind}-{k}", arguments, way="blocks"))
        batch = (x, W, b_enc, None, 11 * n, None, False, None)
        more.append(Call("encode_batch_topk", kind, batch, way="overlap"))
    return more


def _encode_on_hopper() -> list[Call]:
    """Selection within the product: several tiles, lists that overflow, what is not served."""
    found = []
    for n, d, m, k, dtype, ascends in (
        (5, 8, 130, 3, torch.bfloat16, False),
        (70, 40, 1290, 9, torch.bfloat16, False),
        (40, 72, 1027, 70, torch.float32, False),
        (21, 24, 1290, 20, torch.float32, True),
        (5, 12, 300, 4, torch.bfloat16, False),  # rows of 24 bytes: by rows
    ):
        x, W = _integers(n, d, dtype=dtype), _integers(m, d, dtype=dtype)
        b_enc = (torch.arange(m) if ascends else torch.randint(-4, 5, (m,))).to(dtype)
        mask, case = torch.rand(m) < 0.5, f"{n}x{d}x{m}-{k}-{dtype}"
        for name, some, relu, absolute in (("", None, True, False), ("-mask", mask, False, True)):
            arguments = (x, W, b_enc, None, k, some, relu, absolute, True)
            found.append(Call("encode_topk", case + name, arguments, way="hopper"))
            batch = (x, W, b_enc, None, 4 * n + 1, some, True, None)
            found.append(Call("encode_batch_topk", case + name, batch, way="hopper"))
        theta, thetas = torch.tensor(-0.5), torch.arange(m).remainder(9).float()
        for name, threshold, capacity in (("", theta, n * m), ("-few", thetas, 4 * n + 1)):
            arguments = (x, W, b_enc, None, threshold, capacity, True)
            found.append(Call("encode_threshold", case + name, arguments, way="hopper"))
    return found


def _sparse() -> list[Call]:
    found = []
    tolerances = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
    for n, d, m, k, dtype, layout in (
        (11, 131, 300, 20, torch.float32, "fixed"),
        (9, 64, 70, 5, torch.float32, "variable"),
        (70, 33, 130, 7, torch.bfloat16, "fixed"),
        (6, 256, 41, 9, torch.bfloat16, "variable"),
        (5, 40, 33, 3, torch.float16, "fixed"),
        (4, 17, 33, 6, torch.float64, "variable"),
    ):
        a = acts(n, m, k, dtype, layout)
        W, b = torch.randn(m, d).to(dtype), torch.randn(d).to(dtype)
        x, grad = torch.randn(n, d).to(dtype), torch.randn(n, d).to(dtype)
        lists = torch.ops.fastsae.group_by_latent(a.values, a.indices, a.offsets, m)
        case, tolerance = f"{n}x{d}x{m}-{layout}-{dtype}", tolerances.get(dtype, 1e-12)
        entries = (a.values, a.indices, a.offsets)
        found += [
            Call("sparse_decode", case, (*entries, W, b), tolerance),
            Call("sparse_decode", f"{case}-no-bias", (*entries, W, None), tolerance),
            Call("sparse_decode_error", case, (*entries, W, b, x), tolerance * d**0.5),
            Call("sparse_decode_error", f"{case}-none", (*entries, W, None, x), tolerance * d**0.5),
            Call("sparse_decode_values_grad", case, (grad, *entries, W), tolerance * d**0.5),
            Call("group_by_latent", case, (*entries, m)),
            Call("sparse_weight_grad", case, (a.values, *lists, x), tolerance * n**0.5),
        ]
    found += _decode_bf16_rows()
    # One latent in every row: the longest list there can be, over several blocks.
    values, indices = torch.rand(300, 2) + 0.1, torch.tensor([[0, 5]]).expand(300, 2).int()
    lists = torch.ops.fastsae.group_by_latent(values, indices.contiguous(), None, 9)
    found += [
        Call("group_by_latent", "one-latent", (values, indices.contiguous(), None, 9)),
        Call("sparse_weight_grad", "one-latent", (values, *lists, torch.randn(300, 24)), 1e-4),
    ]
    return found


def _decode_bf16_rows() -> list[Call]:
    """A float32 W_dec and a bfloat16 one, which is another matrix: it says what was read."""
    found = []
    for n, d, m, k, layout in (
        (11, 132, 300, 20, "fixed"),  # floats start at multiples of 16 bytes, rows do not
        (9, 64, 70, 5, "variable"),
        (5, 33, 40, 7, "variable"),
        (3, 1040, 31, 9, "fixed"),
    ):
        a = acts(n, m, k, torch.float32, layout)
        W, b, x, grad = (torch.randn(s) for s in ((m, d), (d,), (n, d), (n, d)))
        rows, entries = torch.randn(m, d).bfloat16(), (a.values, a.indices, a.offsets, W)
        case, tolerance = f"{n}x{d}x{m}-{layout}-bf16-rows", 1e-5 * d**0.5
        found += [
            Call("sparse_decode", case, (*entries, b, rows), 1e-5),
            Call("sparse_decode", f"{case}-no-bias", (*entries, None, rows), 1e-5),
            Call("sparse_decode_error", case, (*entries, b, x, rows), tolerance),
            Call("sparse_decode_values_grad", case, (grad, *entries, rows), tolerance),
        ]
    return found


def _adam() -> list[Call]:
    found = []
    for n, d, m, k, dtype, layout, max_norm, extra in (
        (20, 16, 64, 4, torch.float32, "fixed", float("inf"), False),
        (33, 37, 200, 7, torch.float32, "variable", 0.5, True),
        (9, 70, 31, 5, torch.float64, "fixed", 1e9, True),
        (40, 33, 131, 12, torch.float64, "variable", 0.5, False),
    ):
        a = acts(n, m, k, dtype, layout)
        shapes = ((m, d), (m, d), (m,), (d,))
        parameters = [torch.randn(s).to(dtype) for s in shapes]
        averages = [0.1 * torch.randn_like(p) for p in parameters]
        squares = [0.01 * torch.rand_like(p) for p in parameters]
        latents = torch.randperm(m)[: m // 3].int()
        rows: tuple[Tensor | None, ...] = (None,) * 4
        if extra:
            rows = (latents, *(torch.randn(len(latents), *s[1:]).to(dtype) for s in shapes[:3]))
        grad_values, x = torch.randn(a.values.shape).to(dtype), torch.randn(n, d).to(dtype)
        error = torch.randn(n, d).to(dtype)
        state = (*parameters, *averages, *squares)
        entries = (a.values, a.indices, a.offsets, error, grad_values, None, None, x)
        more: tuple[Tensor | None, ...] = (None,) * 5
        if extra:
            clip = torch.tensor([2.5, 1.0], dtype=torch.float64)
            more = (None, None, torch.randn(m).to(dtype), torch.randn(d).to(dtype), clip)
        options = (1e-2, 0.9, 0.999, 1e-8, 3, max_norm, True, True)
        case = f"{n}x{d}x{m}-{layout}-{dtype}-clip{max_norm}" + ("-rows" if extra else "")
        tolerance = 2e-5 if dtype == torch.float32 else 1e-11
        call = (*state, *entries, *rows, *more, *options)
        found.append(Call("sparse_adam_step_", case, (*call, False), tolerance))
        if dtype == torch.float32:
            found.append(Call("sparse_adam_step_", f"{case}-bf16-rows", (*call, True), 2e-2))
            found += _with_copies(case, call, tolerance)
            found.append(_with_bf16_averages(case, call, tolerance))
        mini = (*call[:8], squares[2], squares[2].clone(), *call[10:], False)
        found.append(Call("sparse_adam_step_", f"{case}-mini", mini, tolerance))
        alone = (*call[:-1], False, False)  # b_dec is not subtracted
        found.append(Call("sparse_adam_step_", f"{case}-uncentered", alone, tolerance))
        # The rate and the step number as tensors, of a step that is done and of none.
        for step in (3, 0):
            numbers = (torch.tensor(1e-2, dtype=torch.float64), torch.tensor(step))
            name = f"{case}-tensors-step{step}"
            found.append(
                Call("sparse_adam_step_", name, (*_no_numbers(call), False, *numbers), tolerance)
            )
    return found + _adam_by_side()


def _no_numbers(call: tuple) -> tuple:
    """Return a call with the rate and the step number that no step has."""
    return (*call[:29], 1e9, *call[30:33], 0, *call[34:])


def _adam_by_side() -> list[Call]:
    """Encoder and decoder with entries and widths of their own, gradients of whole matrices."""
    found = []
    for n, d_in, d_out, m, k, dtype, layout, max_norm, extra in (
        (20, 16, 24, 64, 4, torch.float32, "fixed", float("inf"), False),
        (9, 24, 24, 37, 4, torch.float32, "variable", 0.5, True),
        (300, 7, 12, 20, 3, torch.float32, "fixed", 0.5, True),
        (33, 37, 20, 200, 7, torch.float64, "variable", 0.5, True),
    ):
        dec, enc = acts(n, m, k, dtype, layout), acts(2 * n, m, 2, dtype, layout)
        shapes = ((m, d_in), (m, d_out), (m,), (d_out,))
        parameters, more = ([torch.randn(s).to(dtype) for s in shapes] for _ in range(2))
        averages = [0.1 * torch.randn_like(p) for p in parameters]
        squares = [0.01 * torch.rand_like(p) for p in parameters]
        latents = torch.randperm(m)[: m // 3].int()
        rows = (latents, *(torch.randn(len(latents), *s[1:]).to(dtype) for s in shapes[:3]))
        error, x = torch.randn(n, d_out).to(dtype), torch.randn(2 * n, d_in).to(dtype)
        entries = (dec.values, dec.indices, dec.offsets, error)
        entries += (enc.values, enc.indices, enc.offsets, x)
        given: tuple[Tensor | None, ...] = (*[None] * 4, *[None] * 4, None)
        if extra:
            given = (*rows, *more, torch.tensor([2.5, 1.0], dtype=torch.float64))
        options = (1e-2, 0.9, 0.999, 1e-8, 3, max_norm, True, d_in == d_out)
        case = f"{n}x{d_in}x{d_out}x{m}-{layout}-{dtype}-clip{max_norm}-by-side"
        tolerance = 2e-5 if dtype == torch.float32 else 1e-11
        call = (*parameters, *averages, *squares, *entries, *given, *options)
        found.append(Call("sparse_adam_step_", case, (*call, False), tolerance))
        if dtype == torch.float32:
            found.append(Call("sparse_adam_step_", f"{case}-bf16-rows", (*call, True), 2e-2))
            found += _with_copies(case, call, tolerance)
            found.append(_with_bf16_averages(case, call, tolerance))
        mini = (*call[:8], squares[2], squares[2].clone(), *call[10:], False)
        found.append(Call("sparse_adam_step_", f"{case}-mini", mini, tolerance))
        numbers = (torch.tensor(1e-2, dtype=torch.float64), torch.tensor(0))
        none = (*_no_numbers(call), False, *numbers)
        found.append(Call("sparse_adam_step_", f"{case}-tensors-step0", none, tolerance))
    return found


def _with_bf16_averages(case: str, call: tuple[Any, ...], tolerance: float) -> Call:
    averages = [t.bfloat16() if t.ndim == 2 else t for t in call[4:12]]
    rest = (False, None, None, None, None, 5)
    call = (*call[:4], *averages, *call[12:], *rest)
    return Call("sparse_adam_step_", f"{case}-bf16-averages", call, tolerance)


def _with_copies(case: str, call: tuple[Any, ...], tolerance: float) -> list[Call]:
    """bfloat16 copies of both matrices, and of W_dec alone where its rows keep their norm."""
    copies = tuple(torch.zeros_like(W, dtype=torch.bfloat16) for W in call[:2])
    free = (*call[:35], False, *call[36:])  # unit_norm
    return [
        Call("sparse_adam_step_", f"{case}-copies", (*call, False, None, None, *copies), tolerance),
        Call(
            "sparse_adam_step_",
            f"{case}-one-copy",
            (*free, False, None, None, None, copies[1]),
            tolerance,
        ),
    ]


def _wide_and_staged() -> Call:
    """Return an update whose rows are shared by several warps, with entries for every latent."""
    n, d, m = 5, 520, 20
    a = acts(n, m, 16, torch.float32, "fixed")
    parameters = [torch.randn(s) for s in ((m, d), (m, d), (m,), (d,))]
    averages = [0.1 * torch.randn_like(p) for p in parameters]
    squares = [0.01 * torch.rand_like(p) for p in parameters]
    entries = (a.values, a.indices, a.offsets, torch.randn(n, d), torch.randn(a.values.shape))
    rest = (None, None, torch.randn(n, d), *[None] * 9)
    options = (1e-2, 0.9, 0.999, 1e-8, 3, float("inf"), True, True, False)
    call = (*parameters, *averages, *squares, *entries, *rest, *options)
    return Call("sparse_adam_step_", f"{n}x{d}x{m}-wide", call, 2e-5, "staged")


def _can_be_staged(call: Call) -> bool:
    """Return whether CUDA's update can copy the rows of a call ahead of time."""
    if call.op != "sparse_adam_step_":
        return False
    W_enc, W_dec, squares = (call.arguments[i] for i in (0, 1, 8))
    wide = W_enc.shape[1] % 4 == 0 and W_dec.shape[1] % 4 == 0
    return W_enc.dtype == torch.float32 and wide and squares.ndim == 2


def calls(device: str = "cpu", only: str = "", dtype: torch.dtype | None = None) -> list[Call]:
    """Return the table, the same numbers every time; `only`: of one operator, `dtype`: of one."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        makers: tuple[Callable[[], list[Call]], ...] = (_select, _encode, _sparse, _adam)
        table = [call for make in makers for call in make()]
        table += [replace(call, way="staged") for call in table if _can_be_staged(call)]
        table.append(_wide_and_staged())
    missing = set(NAMES) - {call.op for call in table}
    assert not missing, f"calls: expected a call of every operator, got none of {missing}"
    return [
        call.to(device)
        for call in table
        if only in ("", call.op) and dtype in (None, call.arguments[0].dtype)
    ]
