"""torch's Adam with its fused kernel, made safe for parameters that are stored transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Adam):
    """`torch.optim.Adam` with `fused=True`, whose state any Adam can load and vice versa.

    On the CPU the fused kernel walks through memory and takes no note of strides: a gradient or an
    average with other strides than its parameter gives wrong numbers without an error. So here it
    gets views in memory order, loaded averages take the strides of their parameters, and a saved
    state does not say that it was fused.

    Args: those of `torch.optim.Adam`.

    Numerics:
        As `torch.optim.Adam`, up to rounding.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "fused": True})

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """Fill the lists of what to update, params and grads first, state_steps last."""
        result = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for i, parameter in enumerate([*lists[0]]):
            for tensors in lists[:-1]:
                if i < len(tensors):  # the fifth list is empty without amsgrad
                    tensors[i] = _in_memory_order(_laid_out_as(parameter, tensors[i]))
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return what `torch.optim.Adam` would: not fused, and averages in row-major order."""
        saved = super().state_dict()
        groups = [{**group, "fused": None} for group in saved["param_groups"]]
        state = {key: _each(value, Tensor.contiguous) for key, value in saved["state"].items()}
        return {**saved, "param_groups": groups, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of any Adam."""
        groups = [{**group, "fused": True} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for parameter, state in self.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = _laid_out_as(parameter, value)


def _each(state: dict[str, Any], change: Any) -> dict[str, Any]:
    return {k: change(v) if isinstance(v, Tensor) else v for k, v in state.items()}


def _laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    if tensor.shape != parameter.shape or tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return a contiguous view of a transposed matrix; anything else as it is."""
    if tensor.ndim == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous():
        return tensor.t()
    return tensor
