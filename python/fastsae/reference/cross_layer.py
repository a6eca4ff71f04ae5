"""A cross-layer transcoder in plain torch: every matrix dense, and padded with zeros to all layers.

z[t, l, i] = x[t, l] . W_enc[l, i] + b_enc[l, i],   f = select(z)
y_hat[t, m] = sum_(l <= m) sum_i f[t, l, i] W_dec[l, i, m] + b_dec[m]
fvu = sum |y - y_hat|^2 / sum |y - mean y|^2, sums over tokens, layers and columns
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae.reference.select import batch_topk, topk


def cross_layer_decoder(
    W_decs: Sequence[Tensor],
    decoders: str = "full",
    W_maps: Sequence[Tensor] | None = None,
    output_scale: Tensor | None = None,
) -> Tensor:
    """Return W_dec `[L, f, L, d]`: what each latent writes to each layer, 0 before its own.

    Args:
        W_decs: for each layer [f, width], as `nn.layer_decoders` has them.
        decoders: `full`, `own`, `tied` or `low_rank`.
        W_maps: for each layer [rank, (L - l) d], of `low_rank`.
        output_scale: [L], of `tied`.
    """
    n_layers = len(W_decs)
    f = W_decs[0].shape[0]
    rows = []
    for layer, W in enumerate(W_decs):
        later = n_layers - layer
        if decoders == "low_rank":
            assert W_maps is not None
            written = (W @ W_maps[layer]).reshape(f, later, -1)
        elif decoders == "full":
            written = W.reshape(f, later, -1)
        elif decoders == "tied":
            assert output_scale is not None
            written = torch.stack([W * output_scale[m] for m in range(layer, n_layers)], 1)
        else:
            assert decoders == "own"
            written = torch.stack([W] + [torch.zeros_like(W)] * (later - 1), 1)
        before = written.new_zeros(f, layer, written.shape[2])
        rows.append(torch.cat([before, written], 1))
    return torch.stack(rows)


def cross_layer_pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """Return z `[n, L, f]` of `x: [n, L, d]`, `W_enc: [L, f, d]` and `b_enc: [L, f]`."""
    return torch.einsum("nld,lfd->nlf", x, W_enc) + b_enc


def cross_layer_topk(z: Tensor, k: int, select: str = "token") -> Tensor:
    """Return f `[n, L, f]`: the relu of the k largest of `z: [n, L, f]`, of a token or a layer."""
    pre = z.flatten(1) if select == "token" else z
    kept = topk(pre.detach(), k).indices.long()
    mask = torch.zeros_like(pre).scatter(-1, kept, 1.0)
    return (pre.relu() * mask).reshape(z.shape)


def cross_layer_batch_topk(z: Tensor, k: float, select: str = "token") -> tuple[Tensor, Tensor]:
    """Return f `[n, L, f]`, the `int(k n)` largest positive entries of `z: [n, L, f]`, of all or of
    each layer, and the smallest kept value, `[]` or `[L]`."""
    if select == "token":
        acts, smallest = batch_topk(z.flatten(1), k)
        return acts.to_dense().reshape(z.shape), smallest
    found = [batch_topk(z[:, layer], k) for layer in range(z.shape[1])]
    dense = torch.stack([each.acts.to_dense() for each in found], 1)
    return dense, torch.stack([each.threshold for each in found])


def cross_layer_jumprelu(z: Tensor, threshold: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return f = z H(z - threshold) and H(z - threshold), both `[n, L, f]`, with the gradients of
    JumpReLU in `z` and in `threshold: [L, f]`: none of the step in z, and for the thresholds those
    of a window of width `eps`."""
    open_ = (z > threshold).to(z.dtype).detach()
    near = ((z - threshold).abs() < eps / 2).to(z.dtype).detach()
    moved = threshold - threshold.detach()  # 0, with the gradient of the threshold
    active = open_ - near / eps * moved
    return z * open_ - (near * threshold / eps).detach() * moved, active


def cross_layer_outputs(f: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Return y_hat `[n, L, d]` of the code `f: [n, L, f]`, `W_dec: [L, f, L, d]` and b_dec."""
    y_hat = torch.einsum("nlf,lfmd->nmd", f, W_dec)
    return y_hat if b_dec is None else y_hat + b_dec


def cross_layer_fvu(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return the fraction `[]` of the variance of `y: [n, L, d]` that `y_hat` leaves."""
    return (y_hat - y).square().sum() / (y - y.mean(0)).square().sum()
