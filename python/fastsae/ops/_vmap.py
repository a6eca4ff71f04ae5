"""How an op runs under vmap: one call where rows are independent, otherwise one per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def register(op: str, *, rows: Sequence[str] = ()) -> None:
    """Give `op` a vmap rule.

    Args:
        op: name of the op in `torch.ops.fastsae`.
        rows: arguments the first dimension of which are tokens that do not depend on each other.
            Where only those are batched, the samples become more tokens of one call. The variable
            layout, with `offsets`, is always called sample by sample.
    """
    native = getattr(torch.ops.fastsae, op).default
    names = [a.name for a in native._schema.arguments]
    merged = [names.index(name) for name in rows]
    offsets = names.index("offsets") if "offsets" in names else None

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        size, batched = info.batch_size, [i for i, d in enumerate(in_dims) if d is not None]
        # Samples first, everywhere.
        inputs = [
            a if d is None else a.movedim(d, 0) for a, d in zip(arguments, in_dims, strict=True)
        ]
        fixed = offsets is None or inputs[offsets] is None
        if merged and fixed and all(i in merged for i in batched):
            for i in merged:
                if i not in batched:
                    inputs[i] = inputs[i].expand(size, *inputs[i].shape)
            n = inputs[merged[0]].shape[1]
            for i in merged:
                inputs[i] = inputs[i].flatten(0, 1)
            found = native(*inputs)
            several = isinstance(found, tuple)
            out = tuple(t.unflatten(0, (size, n)) for t in (found if several else (found,)))
        else:
            if size == 0:
                raise RuntimeError(f"{op}: expected vmap over at least one sample, got none")
            calls = []
            for sample in range(size):
                one = [a[sample] if i in batched else a for i, a in enumerate(inputs)]
                calls.append(native(*one))
            several = isinstance(calls[0], tuple)
            out = tuple(map(torch.stack, zip(*calls, strict=True) if several else (calls,)))
        return (out, (0,) * len(out)) if several else (out[0], 0)

    torch.library.register_vmap(f"fastsae::{op}", rule)


def refuse(op: str) -> None:
    """Make `op`, which writes into its arguments, an error under vmap."""

    def rule(info: Any, in_dims: Any, *arguments: Tensor) -> Any:
        raise RuntimeError(
            f"{op}: expected no vmap, which it cannot write through, got {info.batch_size} "
            "samples; call it in a loop over the models"
        )

    torch.library.register_vmap(f"fastsae::{op}", rule)
