"""Mistakes in the use of Hopper's asynchronous units, planted one at a time as in bugs.py.

The files are those of csrc, and the program of the cases, which the mistake is planted in as well.
"""

from __future__ import annotations

from tests.cuda_emulation.bugs import Bug

_BARRIER, _COPY = "cuda/hopper_barrier.cuh", "cuda/hopper_copy.cuh"
_MMA, _PRODUCT = "cuda/hopper_mma.cuh", "cuda/hopper_product_kernel.cuh"
_FILTER, _OVERFLOW = "cuda/hopper_filter_kernel.cuh", "cuda/hopper_overflow_kernel.cuh"
_TOPK, _CASES = "cuda/hopper_topk.cu", "hopper_cases.cpp"
_HITS, _APPEND = "cuda/hopper_hits.cuh", "cuda/hopper_append_kernel.cuh"
_SELECT = "cuda/hopper_select.cu"


def _bugs(file: str, *given: tuple[str, str, str, str]) -> tuple[Bug, ...]:
    """Return one bug for each name, text, replacement, and who notices."""
    return tuple(Bug(name, "", file, old, new, by) for name, old, new, by in given)


_PRIMITIVES = _bugs(
    _CASES,
    (
        "a value is read before its phase ends",
        "wait_phase(full + 8 * at, parity);",
        "",
        "tsan",
    ),
    (
        "a value is written over before it is read",
        "wait_phase(empty + 8 * at, parity ^ 1u);",
        "",
        "tsan",
    ),
    (
        "the parity of a phase is the other one",
        "wait_phase(full + 8 * at, parity);",
        "wait_phase(full + 8 * at, parity ^ 1u);",
        "emulator",
    ),
    ("a tile is read before it is there", "wait_phase(barrier, 0);", "", "emulator"),
    (
        "half of the bytes are expected",
        "arrive_expecting(barrier, 2 * kBoxBytes);",
        "arrive_expecting(barrier, kBoxBytes);",
        "emulator",
    ),
    (
        "too many bytes are expected",
        "arrive_expecting(barrier, 2 * kBoxBytes);",
        "arrive_expecting(barrier, 2 * kBoxBytes + 2);",
        "emulator",
    ),
    (
        "the copy engine is not shown its barrier",
        "init_barrier(barrier, 1);\n    show_to_async_units();",
        "init_barrier(barrier, 1);",
        "emulator",
    ),
    (
        "a tile starts within a row of 128 bytes",
        "load_tile(tiles, map, 0, row, barrier);",
        "load_tile(tiles + 64, map, 0, row, barrier);",
        "emulator",
    ),
    (
        "tensor cores are not shown what was written",
        "  show_to_async_units();\n  __syncthreads();  // written",
        "  __syncthreads();  // written",
        "result",
    ),
    (
        "products start before all is written",
        "  __syncthreads();  // written, and shown, before anyone multiplies\n",
        "",
        "result",
    ),
    ("registers are not fenced", "fence_products();", "", "emulator"),
    ("sums are read without a wait", "  wait_products<0>(s);\n", "", "emulator"),
    (
        "sums are read while a group is under way",
        "wait_products<0>(s);",
        "wait_products<1>(s);",
        "emulator",
    ),
    (
        "the last products are in no group",
        "commit_products();\n  wait_products<1>(s);",
        "wait_products<1>(s);",
        "emulator",
    ),
    (
        "the first product is added to what was there",
        "operand(at_b), false);",
        "operand(at_b), threadIdx.x > 31);",
        "emulator",
    ),
)
_FORMATS = (
    *_bugs(
        _MMA,
        ("the descriptor knows no exchange", "kExchanged128 = 1;", "kExchanged128 = 0;", "result"),
        (
            "the descriptor has half the stride",
            "kNextPattern = 1024,",
            "kNextPattern = 512,",
            "result",
        ),
        ("the descriptor lost a bit of the address", "at & 0x3ffffu", "at & 0x1ffffu", "result"),
        ("a lane has another row", "thread % 32 / 4;", "thread % 32 / 4 ^ 1;", "result"),
        ("a warp has the rows of another", "thread / 32 * 16", "thread / 32 * 8", "asan"),
        (
            "a lane has another column",
            "2 * (static_cast<int>(threadIdx.x) % 4)",
            "static_cast<int>(threadIdx.x) % 4",
            "ubsan",
        ),
    ),
    *_bugs(
        _COPY,
        (
            "pieces are not exchanged",
            "kTileDepth,\n          true};",
            "kTileDepth,\n          false};",
            "result",
        ),
    ),
)
_RING = _bugs(
    _PRODUCT,
    (
        "the consumers do not wait for a stage",
        "wait_phase(ring.full(at.stage), at.parity);",
        "",
        "emulator",
    ),
    (
        "the consumers wait for another parity",
        "wait_phase(ring.full(at.stage), at.parity);",
        "wait_phase(ring.full(at.stage), at.parity ^ 1u);",
        "emulator",
    ),
    (
        "the producer does not wait for a stage",
        "wait_phase(ring.empty(at.stage), at.parity ^ 1u);",
        "",
        "emulator",
    ),
    ("the producer waits for another parity", "at.parity ^ 1u", "at.parity", "emulator"),
    ("the parity never changes", "parity ^= 1u;", "", "emulator"),
    (
        "bytes of W are not expected",
        "ring.full(at.stage), kStageBytes)",
        "ring.full(at.stage), kXBytes)",
        "emulator",
    ),
    ("a stage is given back a step early", "wait_products<1>(s);", "", "result"),
    (
        "a stage is given back with its products under way",
        "if (step > 0 && first_lane) arrive(ring.empty(at.stage_before()));\n    }",
        "if (first_lane) arrive(ring.empty(at.stage));\n    }",
        "emulator",
    ),
    (
        "the last stage of a tile is not given back",
        "    if (first_lane) arrive(ring.empty(at.stage_before()));\n    const",
        "    const",
        "emulator",
    ),
    (
        "one warp speaks for its warpgroup",
        "first_lane = threadIdx.x % 32 == 0;",
        "first_lane = threadIdx.x % 128 == 0;",
        "emulator",
    ),
    ("the sums are read before the last products end", "wait_products<0>(s);", "", "emulator"),
    ("the sums of two tiles are added", "step + k > 0", "i + step + k > 0", "result"),
    ("the registers of the sums are not fenced", "fence_products();", "", "emulator"),
    (
        "steps go half as far along a row",
        "static_cast<uint32_t>(2 * k)",
        "static_cast<uint32_t>(k)",
        "result",
    ),
    (
        "stages start anywhere",
        "(shared_address(raw) + kPatternBytes - 1) / kPatternBytes * kPatternBytes",
        "shared_address(raw)",
        "emulator",
    ),
    (
        "there is no room to align the stages",
        "kPatternBytes + kProductStages *",
        "kProductStages *",
        "emulator",
    ),
    (
        "the barriers are not there",
        "  __syncthreads();  // the barriers are there before anyone arrives or waits\n",
        "",
        "emulator",
    ),
    ("both warpgroups take the same rows", "tile.row + part * kProductRows", "tile.row", "asan"),
    ("more registers than there are", "take_registers<232>()", "take_registers<248>()", "emulator"),
    ("the last band is as high as the others", "min(kBand, rows - first)", "kBand", "result"),
    (
        "a row past the last one is written",
        "if (row >= rows) return;",
        "if (row > rows) return;",
        "asan",
    ),
    (
        "a column past the last one is written",
        "if (column + c < columns) *",
        "if (column + c < columns + 2) *",
        "asan",
    ),
    ("rows 8 further on are forgotten", "i = 4 * j + 2 * half", "i = 4 * j", "result"),
)

_CHOICE = (
    *_bugs(
        _HITS,
        ("sums have no bias", "if (bias) sum += more;", "", "result"),
        (
            "masked sums are candidates",
            "c < columns && !(mask && !mask[c])",
            "c < columns",
            "result",
        ),
        (
            "columns behind the last one are candidates",
            "counts = c < columns &&",
            "counts =",
            "asan",
        ),
    ),
    *_bugs(
        _FILTER,
        (
            "NaN is below the bound",
            "!(score(sum) < bound[half])",
            "score(sum) >= bound[half]",
            "result",
        ),
        (
            "the sign of magnitudes is lost",
            "negative = (Float32::narrow(value) & Float32::kSign) != 0;",
            "negative = false;",
            "result",
        ),
        (
            "a list takes more than it holds",
            "if (at >= static_cast<unsigned>(kept.capacity)) return;",
            "",
            "asan",
        ),
        ("lanes take the same places", "static_cast<unsigned>(upto - count);", "0;", "result"),
        (
            "columns start anew",
            "first_column + column + 8 * j + e);",
            "column + 8 * j + e);",
            "result",
        ),
        (
            "places are not taken at once",
            "base = atomicAdd(&kept.count[r], static_cast<unsigned>(all));",
            "base = kept.count[r], kept.count[r] = base + static_cast<unsigned>(all);",
            "tsan",
        ),
    ),
    *_bugs(
        _OVERFLOW,
        (
            "a full list is believed",
            "kept.count[r] <= static_cast",
            "kept.count[r] + 1 > static_cast",
            "asan",
        ),
        (
            "the rows of one time are those of the first",
            "a.from.rows[a.before + i]",
            "a.from.rows[i]",
            "result",
        ),
        ("rows are not gathered", "from.rows[i]} * pieces;", "i} * pieces;", "result"),
        (
            "overflows take the same place",
            "to.rows[atomicAdd(to.found, 1u)] =",
            "to.rows[(*to.found)++] =",
            "tsan",
        ),
        ("relu is forgotten", "(a.relu && value <= 0)", "false", "result"),
    ),
    *_bugs(
        _TOPK,
        (
            "nothing is multiplied again",
            "before < p.n; before += plan.again",
            "before < 0; before += plan.again",
            "result",
        ),
        (
            "there is no room to multiply again",
            "std::max(p.n * plan.pitch, plan.again * plan.wide)",
            "p.n * plan.pitch",
            "asan",
        ),
    ),
)

_MATRIX = (
    *_bugs(
        _APPEND,
        (
            "a sum that equals the bound is dropped",
            "number_below<Float32>(bound)",
            "Float32::widen(Float32::from_key(bound))",
            "result",
        ),
        (
            "columns have no threshold of their own",
            "sum > above && (!thresholds || sum > __ldg(thresholds + c))",
            "sum > above",
            "result",
        ),
        ("every product has the first bias", "p ? p + first_column : nullptr", "p", "result"),
        (
            "rows behind the last one have candidates",
            "if (row + 8 * half >= rows) hits.forget(half);",
            "",
            "asan",
        ),
        ("rows take the same places", "base, 31) + upto - count;", "base, 31);", "result"),
        ("a row takes the places of its pair", "to += count[half];", "", "result"),
        ("lanes of a row take the same places", "2 * lane + e ? upto", "0 ? upto", "result"),
        (
            "hits are not in ascending column",
            "words[i / 2][i % 2]",
            "words[i % 4][i / 4]",
            "result",
        ),
        (
            "places of the list are not taken at once",
            "base = atomicAdd(&a.scratch.header->candidates, Count{upto});",
            "base = a.scratch.header->candidates, a.scratch.header->candidates = base + upto;",
            "tsan",
        ),
        (
            "the tiles of every product are the first",
            "first_column + column, to",
            "column, to",
            "result",
        ),
    ),
    *_bugs(
        _SELECT,
        (
            "a product brings more than there is room for",
            "return std::min(wanted,",
            "return std::max(wanted,",
            "asan",
        ),
        ("the list is never tightened", "if (done > 0) {", "if (done > 1000) {", "asan"),
    ),
)

HOPPER_BUGS = (*_PRIMITIVES, *_FORMATS, *_RING, *_CHOICE, *_MATRIX)
