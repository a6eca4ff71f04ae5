"""Pre-activations that stand for a matrix and are rarely computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae import ops


class Top(NamedTuple):
    """The k largest pre-activations of each token, as `torch.topk` gives them."""

    values: Tensor
    indices: Tensor


class PreActs:
    """relu(x W^T + b), `[n, num_latents]`, which stands for the tensor and is rarely computed.

    `topk`, also after `torch.where(mask, pre_acts, -inf)` with a mask of latents, runs without the
    matrix. Anything else computes it first. It has no graph: sparsify's encoder gives
    pre-activations no gradient.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, latents: Tensor | None) -> None:
        self._x, self._weight, self._bias, self._latents = x, weight, bias, latents

    def dense(self) -> Tensor:
        """Return the tensor."""
        with torch.no_grad():
            pre = torch.nn.functional.linear(self._x, self._weight, self._bias).relu()
            if self._latents is None:
                return pre
            masked = torch.full_like(pre, -torch.inf)
            return masked.index_copy(1, self._latents, pre.index_select(1, self._latents))

    def topk(self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        """Return the k largest of each row; see `torch.topk`."""
        count = len(self._weight if self._latents is None else self._latents)
        if dim not in (-1, 1) or not largest or sorted or not 1 <= k <= count:
            return self.dense().topk(k, dim, largest, sorted)
        weight, bias = self._weight, self._bias
        if self._latents is not None:
            weight, bias = (t.index_select(0, self._latents) for t in (weight, bias))
        with torch.no_grad():
            values, indices = ops.encode_topk(self._x, weight, bias, k)
        indices = indices.long()
        return Top(values, indices if self._latents is None else self._latents[indices])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, key: Any) -> Tensor:
        return self.dense()[key]

    def __len__(self) -> int:
        return len(self._x)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        masked = None if kwargs or func is not torch.where else _masked(*args)
        if masked is not None:
            return masked
        given = {k: _plain(v) for k, v in (kwargs or {}).items()}
        return func(*map(_plain, args), **given)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.dense() if isinstance(value, PreActs) else value


def _masked(mask: Any, pre: Any, other: Any) -> PreActs | None:
    """Return pre-activations of the latents of `mask [1, num_latents]` alone, if it is that."""
    if not (isinstance(pre, PreActs) and isinstance(mask, Tensor) and other == -torch.inf):
        return None
    if pre._latents is not None or mask.dtype != torch.bool or mask.ndim > 2:
        return None
    if mask.numel() != len(pre._weight) or mask.shape[-1] != len(pre._weight):
        return None
    return PreActs(pre._x, pre._weight, pre._bias, mask.flatten().nonzero()[:, 0])
