"""Mistakes that the emulation and the sanitizers have to notice, planted one at a time.

Each is one piece of text of a file below csrc that is replaced; the launchers that include it are
compiled again and the table of calls runs. To add one, add a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# What the one who notices prints.
SIGNS = {
    "tsan": r"WARNING: ThreadSanitizer: data race",
    "asan": r"ERROR: AddressSanitizer",
    "ubsan": r"runtime error:",
    "emulator": r"emulator: ",
    "result": r"wrong: ",
}
# Built and run with; the emulator and a wrong result need no sanitizer.
KINDS = {"tsan": "tsan", "asan": "asan", "ubsan": "asan"}


@dataclass(frozen=True)
class Bug:
    """One mistake: what it is called, where, the text and its replacement, who notices."""

    name: str
    op: str
    file: str
    old: str
    new: str
    noticed_by: str
    launcher: str = ""
    """The .cu that is compiled again, where it is not named like the operator."""

    @property
    def kind(self) -> str:
        """How the launcher is compiled."""
        return KINDS.get(self.noticed_by, "plain")


def plant(bug: Bug, csrc: Path) -> None:
    """Replace the text in a copy of csrc."""
    file = csrc / bug.file
    text = file.read_text()
    count = text.count(bug.old)
    assert count == 1, f"{bug.file}: expected the text of {bug.name!r} once, got {count} times"
    file.write_text(text.replace(bug.old, bug.new))


def _barrier(
    name: str,
    op: str,
    file: str,
    comment: str,
    before: str = "",
    after: str = "",
    launcher: str = "",
    kind: str = "threads",
) -> Bug:
    """Return the bug of a barrier left out; context where a comment is not unique."""
    line = f"__sync{kind}();  // {comment}"
    return Bug(name, op, file, before + line + after, before + after, "tsan", launcher)


_SELECT, _BLOCK = "cuda/row_select.cuh", "cuda/block.cuh"
_TOPK, _TAKE = "cuda/topk_kernel.cuh", "cuda/take_largest.cuh"
_RADIX, _LAUNCH = "cuda/topk_radix_kernel.cuh", "cuda/topk.cu"
_MATRIX = "cuda/matrix_select_args.cuh"
_FILTER, _CHOOSE = "cuda/matrix_select_filter_kernel.cuh", "cuda/matrix_select_choose_kernel.cuh"
_FEATURE, _COLUMNS = "cuda/feature_topk_lists_kernel.cuh", "cuda/feature_topk_columns_kernel.cuh"
_ERROR = "cuda/sparse_decode_error_kernel.cuh"
_GROUP_BY_LATENT, _LISTS = "cuda/group_by_latent_kernel.cuh", "cuda/lists.cuh"
_ADAM, _ADAM_BLOCK = "cuda/sparse_adam_step_kernel.cuh", "cuda/adam_block.cuh"
_BY_SIDE = "cuda/sparse_adam_step_by_side_kernel.cuh"
_BY_SIDE_BLOCK = "cuda/adam_by_side.cuh"
_STAGED = "cuda/sparse_adam_step_staged_kernel.cuh"

_ROWS, _LIST = "cuda/row_candidates_kernel.cuh", "cuda/row_candidates.cuh"
_BLOCKS = "cuda/block_select_kernel.cuh"

BUGS = (
    _barrier("candidates are counted too early", "topk", _TOPK, "all candidates are there"),
    _barrier("survivors are ranked too early", "topk", _TAKE, "all that remain are there"),
    _barrier("winners are placed too early", "topk", _TAKE, "all that are placed are there"),
    _barrier("sorted before all are taken", "topk", _TAKE, "all that are taken are there"),
    _barrier("sort without steps", "topk", _BLOCK, "one exchange step done by all before the next"),
    _barrier("digit before its counts", "topk", _SELECT, "counted before the digit is looked for"),
    _barrier(
        "digit is read early", "topk", _SELECT, "found, and the histogram zero, before it is used"
    ),
    _barrier(
        "next row starts too early",
        "topk",
        _TOPK,
        "done with shared memory before the next row",
        before="a.partial[task * a.k + j] = 0;\n    ",
    ),
    Bug(
        "histogram is not atomic",
        "topk",
        _SELECT,
        "atomicAdd(&s.histogram[key >> shift & 255u], 1u);",
        "s.histogram[key >> shift & 255u] += 1u;",
        "tsan",
    ),
    Bug(
        "shared memory is one short",
        "topk",
        _LAUNCH,
        "static_cast<size_t>(a.capacity + a.winner_capacity)",
        "static_cast<size_t>(a.capacity + a.winner_capacity - 1)",
        "asan",
    ),
    Bug(
        "one read past the row",
        "topk",
        _SELECT,
        "i < count; i += kThreads",
        "i <= count; i += kThreads",
        "asan",
    ),
    Bug(
        "scratch is half",
        "topk",
        _LAUNCH,
        "entries = 2 * int64_t{plan.sort_blocks}",
        "entries = 1 * int64_t{plan.sort_blocks}",
        "asan",
    ),
    Bug(
        "vectors start anywhere",
        "topk",
        _TOPK,
        "const int head = min((E - misaligned) % E, size)",
        "const int head = min((E - E * misaligned) % E, size)",
        "ubsan",
    ),
    Bug(
        "a barrier for some",
        "topk",
        _SELECT,
        "__syncthreads();  // all warps have counted",
        "if (warp < 2) __syncthreads();",
        "emulator",
    ),
    Bug(
        "a warp operation for some",
        "topk",
        _SELECT,
        "if (threadIdx.x < 32) find_digit",
        "if (threadIdx.x < 31) find_digit",
        "emulator",
    ),
    Bug(
        "ties go to the highest index",
        "topk",
        _RADIX,
        "places[j] < places[p]",
        "places[j] > places[p]",
        "result",
    ),
    Bug(
        "-0 is below +0",
        "topk",
        "cuda/number.cuh",
        "if (magnitude == 0) return kSign;",
        "",
        "result",
    ),
    Bug(
        "mask is forgotten",
        "encode_topk",
        _SELECT,
        "      if (mask) {",
        "      if (false) {",
        "result",
        "topk",
    ),
    _barrier(
        "hits before the zeros",
        "batch_topk",
        _FILTER,
        "zeroed before the first hit",
        launcher="matrix_select",
    ),
    _barrier(
        "tiles do not know what is before",
        "batch_topk",
        _CHOOSE,
        "every tile knows what comes before it",
        launcher="matrix_select",
    ),
    Bug(
        "tiles take the same place",
        "batch_topk",
        _FILTER,
        "base = atomicAdd(&a.scratch.header->candidates, static_cast<Count>(count));",
        "base = a.scratch.header->candidates, a.scratch.header->candidates = base + count;",
        "tsan",
        "matrix_select",
    ),
    Bug(
        "one tie less is kept",
        "batch_topk",
        _CHOOSE,
        "if (is_above || (is_equal && rank < known.need)) {",
        "if (is_above || (is_equal && rank + 1 < known.need)) {",
        "result",
        "matrix_select",
    ),
    Bug(
        "a bound from a sample is believed",
        "batch_topk",
        _MATRIX,
        "return found > candidates.capacity || (scratch.header->sampled && found < out.capacity);",
        "return found > candidates.capacity;",
        "result",
        "matrix_select",
    ),
    _barrier(
        "column digit is read early", "feature_topk", _COLUMNS, "found before everyone reads it"
    ),
    Bug(
        "last tie is one row late",
        "feature_topk",
        _COLUMNS,
        "tie_row = static_cast<int32_t>(r - 1);",
        "tie_row = static_cast<int32_t>(r);",
        "result",
    ),
    _barrier("listed before all are found", "feature_topk", _FEATURE, "all are found"),
    _barrier(
        "found is overwritten", "feature_topk", _FEATURE, "listed before they are overwritten"
    ),
    Bug(
        "entries equal to the bound are not listed",
        "feature_topk",
        _FEATURE,
        "any |= P::at(piece, e) >= bound[e];",
        "any |= P::at(piece, e) > bound[e];",
        "result",
    ),
    Bug(
        "a list's last ties are kept",
        "feature_topk",
        _FEATURE,
        "return end - static_cast<uint32_t>(rows[i]);",
        "return static_cast<uint32_t>(rows[i]) + 1;",
        "result",
    ),
    Bug(
        "a full list is believed",
        "feature_topk",
        "cuda/feature_topk_args.cuh",
        "list_count[c] > static_cast<unsigned>(list_capacity);",
        "false;",
        "result",
    ),
    _barrier(
        "peers read what one has written",
        "group_by_latent",
        _GROUP_BY_LATENT,
        "read by all peers before one of them writes",
        kind="warp",
    ),
    _barrier("places are used early", "group_by_latent", _GROUP_BY_LATENT, "all places are known"),
    Bug(
        "effects of the next row are summed early",
        "encode_gradient_topk",
        "cuda/latent_rows_kernel.cuh",
        "if constexpr (kEffect) __syncthreads();  // sums",
        "// sums",
        "tsan",
        "latent_rows",
    ),
    Bug(
        "the last of equals wins",
        "encode_group_max",
        "cuda/latent_rows_kernel.cuh",
        "other == best && there < at",
        "other == best && there > at",
        "result",
        "latent_rows",
    ),
    Bug(
        "one entry past the row",
        "sparse_decode",
        "cuda/gather.cuh",
        "return lane < end - base ? get",
        "return lane <= end - base ? get",
        "asan",
    ),
    _barrier(
        "a sum is overwritten",
        "sparse_decode_error",
        _ERROR,
        "done with the sum before the next token",
    ),
    Bug(
        "products begin before the error is there",
        "sparse_decode_error",
        _ERROR,
        "block_sum<kDecodeErrorThreads>(part, space)",
        "warp_sum(part)",
        "tsan",
    ),
    Bug(
        "the target of the next token",
        "sparse_decode_error",
        _ERROR,
        "{target + token * d, out",
        "{target + (token + 1) * d, out",
        "asan",
    ),
    Bug(
        "the target is added",
        "sparse_decode_error",
        _ERROR,
        "- wanted[i][e];",
        "+ wanted[i][e];",
        "result",
    ),
    Bug(
        "the last strip is left out",
        "sparse_decode_error",
        "cuda/sparse_decode_error.cu",
        "return {packs, per_lane, (packs + 32 * per_lane - 1) / (32 * per_lane)};",
        "return {packs, per_lane, packs / (32 * per_lane)};",
        "result",
    ),
    Bug(
        "the last product of a batch is left out",
        "sparse_decode_error",
        _ERROR,
        "lane < kDotRows && j < end",
        "lane < kDotRows - 1 && j < end",
        "result",
    ),
    Bug(
        "products with the error of the first token",
        "sparse_decode_error",
        _ERROR,
        "load_rounded<F, S, kWide>(row.error, p)",
        "load_rounded<F, S, kWide>(error, p)",
        "result",
    ),
    Bug(
        "products of padding stay as they are",
        "sparse_decode_error",
        _ERROR,
        "j < entries.p.capacity; j += threads) products[j]",
        "j < 0; j += threads) products[j]",
        "result",
    ),
    Bug(
        "rows of bfloat16 are read as float16",
        "sparse_decode",
        "cuda/number.cuh",
        "return f(BFloat16{}, Float32{});",
        "return f(Float16{}, Float32{});",
        "result",
    ),
    Bug(
        "rows of 16 bits start anywhere",
        "sparse_decode_values_grad",
        "cuda/sparse_decode_values_grad.cu",
        "rows_aligned<F>(params.W, params.d) && ",
        "",
        "ubsan",
    ),
    Bug(
        "half of a pack of floats comes twice",
        "sparse_decode_values_grad",
        "cuda/gather.cuh",
        "raw[i] = In::load(row + i * In::kSize);",
        "raw[i] = In::load(row);",
        "result",
    ),
    Bug(
        "half of a pack of errors comes twice",
        "sparse_decode_error",
        _ERROR,
        "In::load_own(from + p * Pack<F, kWide>::kSize + to)",
        "In::load_own(from + p * Pack<F, kWide>::kSize)",
        "result",
    ),
    Bug(
        "half of a pack of the bias comes twice",
        "sparse_decode",
        "cuda/gather.cuh",
        "In::load(row + column(i) + to)",
        "In::load(row + column(i))",
        "result",
    ),
    Bug(
        "segments have no room",
        "sparse_weight_grad",
        "cuda/sparse_weight_grad.cu",
        "const int64_t count = p.lists.later_segments();",
        "const int64_t count = 1;",
        "asan",
    ),
    _barrier(
        "gradients are used early",
        "sparse_adam_step_",
        _ADAM,
        "the gradients are there",
        launcher="sparse_adam_step",
    ),
    Bug(
        "a row past the last one is added",
        "sparse_decode",
        "cuda/gather.cuh",
        "if (r >= count) continue;",
        "if (r > count) continue;",
        "result",
    ),
    Bug(
        "order among equals is reversed",
        "group_by_latent",
        _GROUP_BY_LATENT,
        "__popc(peers & lower));\n      __syncwarp();",
        "__popc(peers & ~lower) - 1);\n      __syncwarp();",
        "result",
    ),
    Bug(
        "the last segment is left out",
        "sparse_weight_grad",
        _LISTS,
        "i < (end - begin + kSegment - 1) / kSegment",
        "i < (end - begin) / kSegment",
        "result",
    ),
    Bug(
        "lists share a place",
        "sparse_weight_grad",
        _LISTS,
        "const int segment = place + 1 - begin / kSegment;",
        "const int segment = place + 1 - (begin + kSegment - 1) / kSegment;",
        "result",
    ),
    _barrier(
        "the next latent starts too early",
        "sparse_adam_step_",
        _ADAM,
        "the gradients are read before those of the next latent overwrite them",
        launcher="sparse_adam_step",
    ),
    Bug(
        "squares are those of the gradient before its projection",
        "sparse_adam_step_",
        _ADAM_BLOCK,
        "const A g = at(dec, e) - along * at(w, e);",
        "const A g = at(dec, e);",
        "result",
        launcher="sparse_adam_step",
    ),
    Bug(
        "the share of the encoder has the wrong sign",
        "sparse_adam_step_",
        _ADAM_BLOCK,
        "at(old, e) - g_b * at(own.w_enc, e)",
        "at(old, e) + g_b * at(own.w_enc, e)",
        "result",
        launcher="sparse_adam_step",
    ),
    Bug(
        "the copy of a row of W_dec is of before it got norm 1",
        "sparse_adam_step_",
        _ADAM_BLOCK,
        "      store_copy<F, kWide>(a.bf16_W_dec, from + i * E, p);",
        "      if (factor == A(1)) store_copy<F, kWide>(a.bf16_W_dec, from + i * E, p);",
        "result",
        launcher="sparse_adam_step",
    ),
    *(
        _barrier(
            name,
            "sparse_adam_step_",
            _BY_SIDE,
            comment,
            launcher="sparse_adam_step_by_side",
        )
        for name, comment in (
            ("lists are bounded early", "the bounds of all lists are there"),
            ("two gradients are used early", "both gradients are there"),
            (
                "the next two gradients start too early",
                "both gradients are read before those of the next latent overwrite them",
            ),
        )
    ),
    *(
        Bug(
            name,
            "sparse_adam_step_",
            _BY_SIDE_BLOCK,
            old,
            new,
            noticed_by,
            launcher="sparse_adam_step_by_side",
        )
        for name, old, new, noticed_by in (
            (
                "the encoder has the decoder's lists",
                "dec ? group.dec : group.enc",
                "dec ? group.dec : group.dec",
                "result",
            ),
            (
                "rows of the encoder are as wide as the decoder's",
                "d = dec ? a.dec.d : a.enc.d;",
                "d = a.dec.d;",
                "result",
            ),
            (
                "a whole gradient is left out",
                "if (more) strip.template add<F>(sum, more + int64_t{f} * d);",
                "(void)more;",
                "result",
            ),
            (
                "both rows have the width of W_enc for Adam-mini",
                "const int d = i == 0 ? a.enc.d : a.dec.d;",
                "const int d = a.enc.d;",
                "result",
            ),
            (
                "the share is subtracted twice",
                "at(old, e) - g_b * at(own.w, e)",
                "at(old, e) - 2 * g_b * at(own.w, e)",
                "result",
            ),
        )
    ),
    *(
        _barrier(
            name,
            "sparse_adam_step_",
            _STAGED,
            comment,
            launcher="sparse_adam_step_staged",
        )
        for name, comment in (
            ("staged lists are bounded early", "the bounds of all lists are there"),
            ("a list begins early", "the first entries of the first lists are there"),
            (
                "the next list begins in this one",
                "both sums are there, and the first entries are free",
            ),
            (
                "staged sums start too early",
                "both sums are read before those of the next latent overwrite them",
            ),
        )
    ),
    *(
        Bug(name, "sparse_adam_step_", file, old, new, noticed_by, "sparse_adam_step_staged")
        for name, file, old, new, noticed_by in (
            (
                "a row of W_dec is moved before it has come",
                _STAGED,
                "wait_for_copies<1>();\n      const float along",
                "const float along",
                "result",
            ),
            (
                "a row of W_enc is moved before it has come",
                _STAGED,
                "wait_for_copies<1>();\n      const auto load_enc",
                "const auto load_enc",
                "result",
            ),
            (
                "the row of the latent before is moved again",
                _STAGED,
                "dec.start(a.dec, f + 1, tid);",
                "dec.start(a.dec, f, tid);",
                "result",
            ),
            (
                "the entries of the latent before are added again",
                _STAGED,
                "next = read_entry(member + 1);",
                "next = read_entry(member);",
                "result",
            ),
            (
                "the encoder begins with the decoder's entries",
                _STAGED,
                "first[of_dec ? 0 : 1],",
                "first[0],",
                "result",
            ),
            (
                "the second average is the first one",
                _STAGED,
                "Av::place(side.W.v, c)",
                "Av::place(side.W.m, c)",
                "result",
            ),
            (
                "copies of the next row are waited for by nobody",
                _STAGED,
                "enc.start(a.enc, f + 1, tid);",
                "enc.start(a.enc, f + 1, tid);\n      else enc.start(a.enc, f, tid);",
                "emulator",
            ),
            (
                "rows start where a pack does not",
                _STAGED,
                "reinterpret_cast<uint4*>(rows + a.row_numbers())",
                "reinterpret_cast<uint4*>(rows + a.row_numbers() - 1)",
                "emulator",
            ),
        )
    ),
    Bug(
        "averages do not fit beside their rows",
        "sparse_adam_step_",
        "cuda/adam_staged.cuh",
        "(bf16_averages ? 4 : 8)",
        "4",
        "emulator",
        launcher="sparse_adam_step",
    ),
    Bug(
        "the second average in bfloat16 is the first one",
        "sparse_adam_step_",
        _ADAM_BLOCK,
        "H::store(reinterpret_cast<uint16_t*>(W.v) + c, high);",
        "H::store(reinterpret_cast<uint16_t*>(W.v) + c, low);",
        "result",
        launcher="sparse_adam_step",
    ),
    Bug(
        "averages in bfloat16 lie where float32 ones would",
        "sparse_adam_step_",
        _ADAM_BLOCK,
        "return H::load_own(reinterpret_cast<const uint16_t*>(of) + c);",
        "return H::load_own(reinterpret_cast<const uint16_t*>(of) + 2 * c);",
        "asan",
        launcher="sparse_adam_step",
    ),
    Bug(
        "W_dec has the copy of W_enc",
        "sparse_adam_step_",
        "cuda/sparse_adam_step.cu",
        "plan.dec, p.bf16_W_dec),",
        # Where it has the size of its own: no write past an end, which may end the process first.
        "plan.dec, p.d_in == p.d_out ? p.bf16_W_enc : p.bf16_W_dec),",
        "result",
        launcher="sparse_adam_step",
    ),
    Bug(
        "a latent that only decodes gets no gradient",
        "sparse_adam_step_",
        _BY_SIDE,
        "any_dec = any(lists.dec, a.dec.more);",
        "any_dec = any_enc;",
        "result",
        launcher="sparse_adam_step_by_side",
    ),
    Bug(
        "there is no room for a share",
        "sparse_adam_step_",
        "cuda/sparse_adam_step.cu",
        "const int64_t numbers = p.d_out + 2 * int64_t{p.d_in};",
        "const int64_t numbers = p.d_out + int64_t{p.d_in};",
        "asan",
        launcher="sparse_adam_step",
    ),
    Bug(
        "the step number of the host is taken for that of the device",
        "sparse_adam_step_",
        _ADAM,
        "step_at ? *step_at : step, seed)",
        "step_at ? step : step, seed)",
        "result",
        launcher="sparse_adam_step",
    ),
    Bug(
        "b_dec moves though there is no step",
        "sparse_adam_step_",
        _ADAM,
        "if (rate.inverse_correction2 == A(0)) return;",
        "",
        "result",
        launcher="sparse_adam_step",
    ),
    *(
        Bug(
            f"rows move though there is no step{where}",
            "sparse_adam_step_",
            file,
            "if (a.rate->inverse_correction2 == A(0)) return;",
            "",
            "result",
            launcher=launcher,
        )
        for where, file, launcher in (
            ("", _ADAM, "sparse_adam_step"),
            (" by side", _BY_SIDE, "sparse_adam_step_by_side"),
        )
    ),
    _barrier(
        "the rate is read early",
        "sparse_adam_step_",
        _ADAM,
        "the rate is there",
        launcher="sparse_adam_step",
    ),
    Bug(
        "both codes are sorted as the decoder's",
        "sparse_adam_step_",
        "cuda/sparse_adam_step.cu",
        "group(p.enc_entries, plan.enc_lists)",
        "group(e, plan.enc_lists)",
        "result",
        launcher="sparse_adam_step",
    ),
    *(
        _barrier(name, "encode_topk", file, comment, launcher="row_candidates")
        for name, file, comment in (
            ("a list is counted too early", _ROWS, "all candidates of the block are there"),
            (
                "a row of lists starts too early",
                _ROWS,
                "zero, and the list's count read, before anyone adds to it",
            ),
            ("a bound before all are taken", _LIST, "all are taken before the smallest is read"),
            (
                "a list is tightened too early",
                _LIST,
                "entries, list and counters are as they are read below",
            ),
            (
                "a choice before the entries",
                _LIST,
                "the entries are there, and the counter is zero",
            ),
        )
    ),
    *(
        Bug(name, "encode_topk", file, old, new, noticed_by, launcher="row_candidates")
        for name, file, old, new, noticed_by in (
            (
                "a list of the block before is forgotten",
                _ROWS,
                "fresh[count + i] = list[i];",
                "fresh[count + i] = 0;",
                "result",
            ),
            (
                "more than there is room for is believed",
                _ROWS,
                "if (count > shape.room) {",
                "count = min(count, shape.room);\n    if (count > shape.room) {",
                "result",
            ),
            (
                "a tie goes to the later column",
                _LIST,
                "~static_cast<uint32_t>(column) << 1",
                "static_cast<uint32_t>(column) << 1",
                "result",
            ),
            (
                "the sign of a magnitude is lost",
                _LIST,
                "static_cast<uint32_t>(entry) << 31",
                "0u",
                "result",
            ),
            (
                "columns count from the block's first",
                _ROWS,
                "p.first_column + j, row",
                "j, row",
                "result",
            ),
            (
                "lists have no room for the winners",
                "cuda/row_candidates.cu",
                "static_cast<size_t>(entries + shape.winner_capacity)",
                "static_cast<size_t>(entries)",
                "asan",
            ),
        )
    ),
    _barrier(
        "hits of a block before the zeros",
        "encode_batch_topk",
        _BLOCKS,
        "zeroed before the first hit",
        launcher="block_select",
    ),
    *(
        Bug(name, "encode_batch_topk", file, old, new, "result", launcher)
        for name, file, old, new, launcher in (
            (
                "an entry equal to the bound is dropped",
                _BLOCKS,
                "number_below<F>(bound) : threshold",
                "F::widen(F::from_key(bound)) : threshold",
                "block_select",
            ),
            (
                "tiles are in the order of blocks",
                _BLOCKS,
                "(block.first + r) * block.tiles_per_row + block.tile_of_row",
                "block.first * block.tiles_per_row + block.tile_of_row * block.rows + r",
                "block_select",
            ),
            (
                "a full list is not tightened",
                _BLOCKS,
                "header->candidates = known.kept_count;",
                "",
                "block_select",
            ),
            (
                "every product on Hopper has the first columns",
                "cuda/hopper_select.cu",
                "+ 2 * first * p.d",
                "+ 0 * p.d",
                "hopper_select",
            ),
            (
                "a buffer is written while it is read",
                "cuda/side_stream.cu",
                "if (lane_) cudaStreamWaitEvent(static_cast<cudaStream_t>(main_), "
                "lane_->marks[name], 0);",
                "(void)name;",
                "side_stream",
            ),
            (
                "the second stream is not joined",
                "cuda/side_stream.cu",
                "wait(static_cast<cudaStream_t>(main_), lane->joined, lane->stream);",
                "",
                "side_stream",
            ),
        )
    ),
)
