"""How one step moves the parameters: an interface, and the rule that chooses an implementation.

fused      gradients of the code, the reconstruction and dead rows; everything else inside
           `ops.sparse_adam_step_`, which forms no gradient of a matrix
autograd   backward, remove the parallel decoder gradient, clip, optimizer, unit decoder rows;
           any module, any loss, any optimizer, any device

The two are equal where both apply.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastsae import _library
from fastsae._log import logger
from fastsae.nn import SAE, HierarchicalTopKSAE, SAEOutput, StepContext
from fastsae.train.autograd_update import AutogradUpdate
from fastsae.train.config import TrainConfig
from fastsae.train.fused_update import PARAMETERS, FusedUpdate
from fastsae.train.precision import converts_weights

OTHERS = {"log_threshold", "r_mag", "b_mag", "W_skip"}
"""Parameters of classes of fastsae besides those of every SAE."""

HARMLESS = {"__doc__", "__module__", "__qualname__", "__init__", "__annotations__", "config"}
HARMLESS |= {"extra_repr", "__static_attributes__", "__firstlineno__", "__abstractmethods__"}
HARMLESS |= {"__parameters__", "_abc_impl", "rescale_code_", "estimate_threshold_"}
HARMLESS |= {"calibrate_", "initialize_from_data_", "initialize_b_dec_", "initialize_rows_"}
HARMLESS |= {"fit_encoder_scale_"}
"""What a subclass may define without a say in an update: both call it alike, or neither does."""


class Update(Protocol):
    """Moves the parameters of an SAE by one step, and owns the state of its optimizer."""

    def step(self, batch: Tensor, context: StepContext, lr: float) -> SAEOutput:
        """Do one step with `batch: [n, columns]` at learning rate `lr`; return its loss."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors and JSON values, by name."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a state into this one, bit for bit."""


def make_update(sae: SAE, config: TrainConfig) -> Update:
    """Return the update that `config.update` asks for, or for `auto` the fastest that applies.

    Raises:
        ValueError: the fused update is asked for and does not apply.
    """
    _check_tensors(sae)
    _check_float32_options(sae, config)
    if not sae.parallel.is_alone:
        return _sharded(sae, config)
    refusal = None if config.update == "autograd" else why_not_fused(sae, config)
    if config.update == "autograd" or (refusal is not None and config.update == "auto"):
        if refusal is not None and base_of(sae) is not None and type(sae) is not base_of(sae):
            logger.warning("Trainer: training with update='autograd', because %s", refusal)
        elif refusal is not None:
            logger.info("Trainer: training with update='autograd', because %s", refusal)
        return AutogradUpdate(sae, config)
    if refusal is not None:
        raise ValueError(f"Trainer: expected update='fused' to apply, but {refusal}")
    return FusedUpdate(sae, config)


def _check_float32_options(sae: SAE, config: TrainConfig) -> None:
    """Raise ValueError where averages in bfloat16 would not be rounded stochastically, or a
    bfloat16 copy of a matrix would not be written or read."""
    wanted = {
        "weight_copies=False": config.weight_copies,
        "decode_dtype='float32'": config.decode_dtype == "bfloat16",
        "adam_dtype='float32'": config.adam_dtype == "bfloat16",
    }
    if not any(wanted.values()):
        return
    W = sae.W_enc_rows
    why = why_not_fused(sae, config)
    if why is None and W.dtype != torch.float32:
        why = f"the parameters are {W.dtype}, not float32"
    if why is not None:
        other = next(setting for setting, chosen in wanted.items() if chosen)
        raise ValueError(f"Trainer: expected {other}, because {why}")
    if config.decode_dtype == "bfloat16" and (why := _decodes_otherwise(sae)) is not None:
        raise ValueError(f"Trainer: expected decode_dtype='float32', because {why}")
    if config.weight_copies and not converts_weights(W.device):
        raise ValueError(
            "Trainer: expected weight_copies=False, because the encoder of "
            f"{W.device.type} rounds weights as it reads them"
        )


def _decodes_otherwise(sae: SAE) -> str | None:
    """Return what reads W_dec in a loss, other than a decoder that reads its rows."""
    name = type(sae).__name__
    if isinstance(sae, HierarchicalTopKSAE):
        return f"the errors of the prefixes of a {name} are no sums that ops.sparse_decode makes"
    if hasattr(sae, "W_decs"):
        return f"the auxiliary loss of a {name} reads its W_decs too"
    return None


def kind_of(update: Update) -> str:
    """Return the name of an update for a checkpoint; it does not tell how many processes do it."""
    return "FusedUpdate" if isinstance(update, FusedUpdate) else type(update).__name__


def _sharded(sae: SAE, config: TrainConfig) -> Update:
    from fastsae.train.sharded_update import ShardedUpdate

    if (why := why_not_fused(sae, config)) is not None:
        raise ValueError(f"Trainer: expected the fused update to apply with a mesh, but {why}")
    return ShardedUpdate(sae, config)


def base_of(sae: SAE) -> type[SAE] | None:
    """Return the first class of fastsae that `sae` is one of."""
    for cls in type(sae).__mro__:
        if cls.__module__.startswith("fastsae.nn."):
            return cls
    return None


def why_not_fused(sae: SAE, config: TrainConfig) -> str | None:
    """Return why the fused update would not train `sae` as autograd does; None: it would.

    It calls the loss of the module, and leaves out its backward what the kernel does. So it applies
    to the classes of `fastsae.nn` and to subclasses that override nothing of them, without a
    parameter or trained buffer of their own, without hooks and parametrizations, in float32 or
    float64 on a device that has the kernel, and to Adam.
    """
    base, cls = base_of(sae), type(sae)
    if config.optimizer not in ("adam", "adam_mini"):
        return f"optimizer is {config.optimizer}"
    if base is None:
        return f"{cls.__name__} is no class of fastsae"
    if (why := _several_dictionaries(sae, config)) is not None:
        return why
    return _overridden(sae, base) or _foreign_tensors(sae) or _hooks(sae) or _unsuited_tensors(sae)


def _several_dictionaries(sae: SAE, config: TrainConfig) -> str | None:
    if getattr(sae, "decoders", None) == "low_rank":
        return "rows of low_rank decoders have the norm of what they write"
    if hasattr(sae, "W_decs") and config.clip_grad_norm is not None:
        return "clip_grad_norm needs the norm of all layers first"
    return None


def _overridden(sae: SAE, base: type[SAE]) -> str | None:
    """Return which method or attribute of `base` is replaced on the way to `sae`."""
    for cls in type(sae).__mro__:
        if cls is base:
            break
        for name in vars(cls):
            if name not in HARMLESS and (hasattr(base, name) or name in PARAMETERS):
                return f"{cls.__name__} overrides {name}"
    for name in vars(sae):
        if callable(getattr(base, name, None)):
            return f"{name} is replaced on this {type(sae).__name__}"
    for cls in base.__mro__:
        if cls.__module__.startswith("fastsae."):
            for name, value in vars(cls).items():
                function = getattr(value, "fget", getattr(value, "__func__", value))
                home = getattr(function, "__module__", None)
                if callable(function) and isinstance(home, str) and not home.startswith(LIBRARY):
                    return f"{name} of {cls.__name__} is replaced by one of {home}"
    return None


LIBRARY = ("fastsae.", "torch.", "typing", "abc", "builtins", "functools")


def _foreign_tensors(sae: SAE) -> str | None:
    """Return which parameter, trained buffer or submodule the fused update does not know."""
    names = [name for name, _ in sae.named_parameters()]  # a shared one comes once
    decoders = getattr(sae, "W_decs", None)
    layered = isinstance(decoders, nn.ParameterList)
    for name in names:
        known = name in PARAMETERS or name in OTHERS or (layered and name.startswith("W_decs."))
        if not known:
            return f"{name} is a parameter that the fused update does not know"
    for name in PARAMETERS:
        if name not in names and not (layered and name == "W_dec"):
            return f"{name} is shared with another parameter"
    found = sum(name.startswith("W_decs.") for name in names)
    if isinstance(decoders, nn.ParameterList) and found != len(decoders):
        return "two of W_decs are one parameter"
    for name, buffer in sae.named_buffers():
        if buffer.requires_grad:
            return f"{name} is a buffer that requires a gradient"
    for name, _ in sae.named_children():
        if layered and name == "W_decs":
            continue
        return f"{name} is a submodule that the fused update does not know"
    return None


def _hooks(sae: SAE) -> str | None:
    """Return which hook the fused update would bypass."""
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if getattr(sae, kind):
            return f"{type(sae).__name__} has hooks (training_loss is no call of the module)"
    for name, p in sae.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return f"{name} has a hook"
    return None


def _unsuited_tensors(sae: SAE) -> str | None:
    """Return which parameter does not lie as the kernel needs it."""
    device, dtype = sae.W_enc_rows.device, sae.W_enc_rows.dtype
    if not _library.has_kernel("sparse_adam_step_", device.type):
        return f"there is no kernel for {device.type}"
    if dtype not in (torch.float32, torch.float64):
        return f"the parameters are {dtype}, not float32 or float64"
    for name, p in sae.named_parameters():
        if type(p) is not nn.Parameter:
            return f"{name} is a {type(p).__name__}"
        if not p.requires_grad:
            return f"{name} is frozen"
        if name in OTHERS:
            continue
        if p.device != device or p.dtype != dtype or not p.is_contiguous():
            return f"{name} is not contiguous, in {dtype} and on {device} like W_enc_rows"
    return None


def _check_tensors(sae: SAE) -> None:
    """Raise TypeError where a parameter was replaced by a plain tensor, which would not train."""
    for name in PARAMETERS:
        if name in vars(sae):
            raise TypeError(
                f"Trainer: expected {name} to be a parameter, or parametrized by "
                "torch.nn.utils.parametrizations, got a plain tensor; hooks such as those of "
                "torch.nn.utils.weight_norm are not run in training"
            )
