"""How an op gets its derivatives: reverse and forward mode, eager, compiled and in torch.func.

`torch.library.register_autograd` covers reverse mode alone: with it `torch.func.grad` raises and a
forward-mode tangent is silently 0. Here the same kernel for the Autograd key wraps the op into a
Function that `torch.func` can step through, one level at a time, and that has a `jvp`.

Second derivatives are right because the gradients are made of three ops that are each other's
derivatives. For a fixed pattern P of entries (row r, latent f), and numbers v on it,

    T(v, W, g) = sum over P of v <W_f, g_r>

is linear in all three; `sparse_decode` is dT/dg, `sparse_decode_values_grad` dT/dv and
`sparse_weight_grad` dT/dW. What is active is decided by the forward pass: where a gradient takes
the place of v, its zeros remain entries of P (`decode_entries`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fastsae.ops import _dense, _tape

Rule = Callable[..., Any]

_implementations = torch.library.Library("fastsae", "IMPL")


def register(op: str, *, setup_context: Rule, backward: Rule, jvp: Rule) -> None:
    """Make `op` differentiable.

    Args:
        op: name of the op in `torch.ops.fastsae`.
        setup_context: `(ctx, inputs, output)`, which saves tensors with `ctx.save_for_backward`.
        backward: `(ctx, *grads)`, the gradient of every input; made of differentiable ops.
        jvp: `(ctx, *tangents)`, the tangent of every output from that of every input or None; made
            of differentiable ops. `ctx.saved_tensors` is what setup_context saved.
    """
    native = getattr(torch.ops.fastsae, op).default
    arguments = native._schema.arguments
    names = [argument.name for argument in arguments]
    W_enc, rounds = (names.index(n) if n in names else -1 for n in ("W_enc", "bf16_product"))

    def below_autograd(keyset: Any, inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if (found := _dense.run(op, inputs)) is not None:
                return found
            if rounds >= 0 and inputs[rounds]:
                # below autograd, so that derivatives are those of the matrix itself
                inputs = (*inputs[:W_enc], _tape.rounded(inputs[W_enc]), *inputs[W_enc + 1 :])
            return native.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, keyset = arguments
        if torch._C._are_functorch_transforms_active():
            # Inside a Function nothing is differentiated; the levels below this one still are.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = below_autograd(keyset, tuple(inputs))
        else:
            output = below_autograd(keyset, tuple(inputs))
        setup_context(ctx, inputs, output)
        if _may_have_tangents():
            ctx.save_for_forward(*map(_primal, ctx.to_save))
        return output

    def all_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(ctx, *grads), None

    def tangent(ctx: Any, *tangents: Tensor | None) -> Any:
        # As in forward; nothing saved has a tangent. Reverse mode may go over this one.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *tangents[:-1])

    rules: dict[str, Rule] = {
        "forward": forward,
        "backward": all_gradients,
        "jvp": tangent,
        "_compiled_autograd_key": lambda ctx: (ctx._autograd_function_id,),
    }
    differentiable: Any = type(
        f"fastsae_{op}",
        (_SingleLevelFunction,),
        {name: staticmethod(rule) for name, rule in rules.items()},
    )

    def kernel(keyset: Any, *inputs: Any) -> Any:
        # torch leaves out what has its default
        inputs += tuple(argument.default_value for argument in arguments[len(inputs) :])
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return differentiable.apply(*inputs, keyset)
        if forward_ad._current_level >= 0 or (
            torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        ):
            return differentiable.apply(*inputs, keyset)
        return below_autograd(keyset, inputs)

    _implementations.impl(op, kernel, "Autograd", with_keyset=True)


def _may_have_tangents() -> bool:
    # A compiled graph enters forward mode without telling forward_ad.
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Return whether there may be tangents, by `torch.func` or dual numbers; not when compiling."""
    return not torch.compiler.is_compiling() and _may_have_tangents()


def _primal(t: Tensor | None) -> Tensor | None:
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return None if t is None else forward_ad.unpack_dual(t, level=0).primal


def decode_entries(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W: Tensor,
    bf16_W: Tensor | None = None,
) -> Tensor:
    """Return `sparse_decode` of the entries, the derivative of which includes values of 0.

    With every row as a list of its own, that is `sparse_weight_grad`. Where nobody differentiates,
    the decoder does it.
    """
    native = torch.ops.fastsae
    if not watched():
        out: Tensor = native.sparse_decode(values, indices, offsets, W, None, bf16_W)
        return out
    first_alone("sparse_decode", bf16_W)
    slots = torch.arange(values.numel(), dtype=torch.int32, device=values.device)
    if offsets is None:
        n, k = values.shape
        offsets = torch.arange(n + 1, dtype=torch.int32, device=values.device) * k
    out, _ = native.sparse_weight_grad(values, offsets, indices.flatten(), slots, W)
    return out


def weight_grad(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    d_sae: int,
    x: Tensor,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `sparse_weight_grad` of the entries of a code.

    Args:
        values: of the entries.
        indices: of the entries.
        offsets: [n + 1] or None.
        d_sae: number of latents.
        x: [n, d].
        active: an entry counts where it is not 0; None: where `values` are not.
    """
    if reverse_mode_alone() and not torch.is_grad_enabled():
        found = _dense.weight_grads(indices, offsets, d_sae, [(values, x)])
        if found is not None:
            return found[0]
    native = torch.ops.fastsae
    lists = native.group_by_latent(values if active is None else active, indices, offsets, d_sae)
    weight, bias = native.sparse_weight_grad(values, *lists, x)
    return weight, bias


def reverse_mode_alone() -> bool:
    """Return whether neither torch.func, forward mode nor a compiler looks on."""
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
    )


def watched() -> bool:
    """Return whether somebody may differentiate what is computed now, in a backward too."""
    return torch.is_grad_enabled() or _may_have_tangents()


def first_alone(op: str, bf16_W: Tensor | None) -> None:
    """Raise RuntimeError if somebody may differentiate a derivative, and rows were read from a
    copy, whose derivative is that of another matrix."""
    if bf16_W is not None and watched():
        raise RuntimeError(
            f"{op}: expected a first derivative in reverse mode with bf16_W_dec, got create_graph, "
            "forward mode or torch.func"
        )


def total(*terms: Tensor | None) -> Tensor | None:
    """Return the sum of the terms that are there."""
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


def no_tangents(op: str, *tensors: Tensor) -> None:
    """Raise RuntimeError if one of the tensors has a forward-mode tangent, which would be lost."""
    if not _may_have_tangents():
        return
    plain = [t for t in tensors if not torch._C._functorch.is_batchedtensor(t)]
    if any(forward_ad.unpack_dual(t, level=0).tangent is not None for t in plain):
        raise RuntimeError(f"{op}: expected no forward-mode tangent, got one; it has no derivative")
