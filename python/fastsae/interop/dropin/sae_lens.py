"""SAELens' own trainer with fastsae's kernels.

    from fastsae.interop.dropin import sae_lens as fast
    fast.register()

From then on SAELens builds the classes below for the architectures "topk", "batchtopk",
"matryoshka_batchtopk" and "jumprelu" of an unchanged config, and its trainer updates with
`FusedAdam`. Losses, gradients, statistics and files are those of its own classes; `why_not_fast`
says where a step is left to them. See docs/dropin.md.

Inside a fast step `feature_acts` is a sparse COO tensor, as with `use_sparse_activations`, and
`hidden_pre` is computed when it is looked at. `W_enc` keeps its shape `[d_in, d_sae]` and is stored
with one contiguous row per latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.interop.dropin import _entries as entries
from fastsae.interop.dropin import _sae_lens_steps as steps
from fastsae.interop.dropin._adam import FusedAdam
from fastsae.interop.dropin._sae_lens_steps import PEER, StepOutput
from fastsae.types import SparseActs

__all__ = [
    "BatchTopKTrainingSAE",
    "FusedAdam",
    "JumpReLUTrainingSAE",
    "MatryoshkaBatchTopKTrainingSAE",
    "StepOutput",
    "TopKTrainingSAE",
    "register",
    "unregister",
    "why_not_fast",
]

_registry = PEER.module("sae_lens.registry", "SAE_TRAINING_CLASS_REGISTRY")
_base = PEER.module("sae_lens.saes.sae", "TrainingSAE", "TrainStepInput", "TrainStepOutput")
_topk = PEER.module("sae_lens.saes.topk_sae", "TopKTrainingSAE", "TopKTrainingSAEConfig")
_batch = PEER.module("sae_lens.saes.batchtopk_sae", "BatchTopKTrainingSAE")
_nested = PEER.module("sae_lens.saes.matryoshka_batchtopk_sae", "MatryoshkaBatchTopKTrainingSAE")
_jump = PEER.module(
    "sae_lens.saes.jumprelu_sae",
    "JumpReLUTrainingSAE",
    "JumpReLU",
    "Step",
    "calculate_pre_act_loss",
)
_trainer = PEER.module("sae_lens.training.sae_trainer", "SAETrainer", "Adam")

_COMMON = {"d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"}
_COMMON |= {"reshape_activations", "metadata", "decoder_init_norm"}
_TOPK = _COMMON | {"k", "use_sparse_activations", "aux_loss_coefficient"}
_TOPK |= {"rescale_acts_by_decoder_norm"}
_BATCH = _TOPK | {"topk_threshold_lr"}
_NESTED = _BATCH | {"matryoshka_widths", "use_matryoshka_aux_loss"}
_JUMP = _COMMON | {"jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode"}
_JUMP |= {"l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_tanh_scale"}
_JUMP |= {"jumprelu_ste_to_input", "target_l0"}

MOST_OPEN = 1 / 32
"""Share of entries within reach of a JumpReLU threshold up to which the sparse step is faster."""


class _RowsFirst(torch.nn.Module):
    """A training SAE that stores W_enc with one contiguous row per latent; files do not show it."""

    cfg: Any
    W_enc: Any
    threshold: Any
    topk_threshold: Any
    bandwidth: Any
    update_topk_threshold: Any

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        entries.rows_first_(self.W_enc)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        entries.rows_first_(self.W_enc)
        return result

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)  # type: ignore[misc]
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()


class TopKTrainingSAE(_RowsFirst, _topk.TopKTrainingSAE):  # type: ignore[misc,name-defined]
    """SAELens' class of this name with a sparse training step."""

    def training_forward_pass(self, step_input: Any) -> Any:
        """Return what SAELens' class does; see the module for `feature_acts` and `hidden_pre`."""
        if why_not_fast(self, step_input):
            return super().training_forward_pass(step_input)
        return self._fast(step_input)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _fast(self, step_input: Any) -> Any:
        return steps.SelectedStep(self, step_input, self._rule).output()

    def _rule(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseActs:
        return SparseActs(*ops.encode_topk(x, W_enc, b_enc, self.cfg.k), None, len(W_enc))


class BatchTopKTrainingSAE(_RowsFirst, _batch.BatchTopKTrainingSAE):  # type: ignore[misc,name-defined]
    """SAELens' class of this name with a sparse training step."""

    _last_threshold: Tensor | None = None

    def training_forward_pass(self, step_input: Any) -> Any:
        """See `TopKTrainingSAE`; updates the threshold too."""
        if why_not_fast(self, step_input):
            return super().training_forward_pass(step_input)
        return self._fast(step_input)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _fast(self, step_input: Any) -> Any:
        return self._finish(steps.SelectedStep(self, step_input, self._rule))

    def _finish(self, step: steps.SelectedStep) -> Any:
        output = step.output()
        self.update_topk_threshold(output.feature_acts.detach().values())
        output.metrics["topk_threshold"] = self.topk_threshold
        return output

    def _rule(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseActs:
        guess = self._last_threshold
        kept = ops.encode_batch_topk(x, W_enc, b_enc, self.cfg.k, threshold_guess=guess)
        self._last_threshold = kept.threshold.detach()
        return entries.exact(kept.acts)


class MatryoshkaBatchTopKTrainingSAE(_RowsFirst, _nested.MatryoshkaBatchTopKTrainingSAE):  # type: ignore[misc,name-defined]
    """SAELens' class of this name with a sparse training step."""

    _last_threshold: Tensor | None = None
    _rule = BatchTopKTrainingSAE._rule
    _finish = BatchTopKTrainingSAE._finish

    def training_forward_pass(self, step_input: Any) -> Any:
        """See `BatchTopKTrainingSAE`."""
        if why_not_fast(self, step_input):
            return super().training_forward_pass(step_input)
        return self._fast(step_input)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _fast(self, step_input: Any) -> Any:
        return self._finish(steps.NestedStep(self, step_input, self._rule))


class JumpReLUTrainingSAE(_RowsFirst, _jump.JumpReLUTrainingSAE):  # type: ignore[misc,name-defined]
    """SAELens' class of this name with a sparse training step, once few latents are active.

    The first step, and any in which more than `MOST_OPEN` of the pre-activations are above their
    threshold or within half a bandwidth of it, is SAELens' own.
    """

    _open: int | None = None
    """How many pre-activations were in reach of a threshold in the last step."""

    def training_forward_pass(self, step_input: Any) -> Any:
        """Return what SAELens' class does, thresholds clamped at 0 first as there."""
        with torch.no_grad():
            self.threshold.data.clamp_(min=0.0)
        if not why_not_fast(self, step_input) and (room := self._room(step_input.sae_in)):
            output = self._fast(step_input, room)
            if output is not None:
                return output
        output = super().training_forward_pass(step_input)
        self._open = int((output.hidden_pre.detach() > self._reach(output.hidden_pre.dtype)).sum())
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _fast(self, step_input: Any, room: int) -> Any:
        """Return None where there are more entries than `room`."""
        step = steps.JumpStep(self, step_input, room)
        self._open = step.open
        return step.output() if step.open < room else None

    def _room(self, x: Tensor) -> int:
        """Return places for the entries of a fast step; 0 where it would be slow or might fail."""
        most = MOST_OPEN * len(x) * self.cfg.d_sae
        if self._open is None or self._open > most:
            return 0
        return int(1.5 * self._open) + 4 * len(x)

    def _reach(self, dtype: torch.dtype) -> Tensor:
        """Return the pre-activations [d_sae] above which an entry is active or has a gradient."""
        reach: Tensor = self.threshold.detach().to(dtype) - 0.5001 * self.bandwidth
        return reach


def why_not_fast(sae: Any, step_input: Any) -> str:
    """Return why SAELens' own code does this training step, or an empty string."""
    x, device = step_input.sae_in, sae.W_enc.device.type
    if sae.dtype not in (torch.float32, torch.float64):
        return f"dtype {sae.dtype}: rounding decides there which latents are kept"
    if torch.is_autocast_enabled(device):
        return "autocast: rounding decides there which latents are kept"
    if x.ndim != 2 or not len(x):
        return f"activations of shape {list(x.shape)}"
    if sae.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
        return f"normalize_activations={sae.cfg.normalize_activations}"
    for name in ("hook_sae_acts_pre", "hook_sae_acts_post"):
        hook = getattr(sae, name)
        if hook._forward_hooks or hook._backward_hooks or hook._forward_pre_hooks:
            return f"a hook at {name}, which gets all pre-activations"
    return ""


_OURS: dict[str, tuple[Any, Any, set[str]]] = {
    "topk": (TopKTrainingSAE, _topk.TopKTrainingSAE, _TOPK),
    "batchtopk": (BatchTopKTrainingSAE, _batch.BatchTopKTrainingSAE, _BATCH),
    "matryoshka_batchtopk": (
        MatryoshkaBatchTopKTrainingSAE,
        _nested.MatryoshkaBatchTopKTrainingSAE,
        _NESTED,
    ),
    "jumprelu": (JumpReLUTrainingSAE, _jump.JumpReLUTrainingSAE, _JUMP),
}
_replaced: dict[str, tuple[Any, Any]] = {}


def register(*, fused_adam: bool = True) -> None:
    """Let SAELens build the classes of this module for its configs. Twice is as once.

    Args:
        fused_adam: also let its trainer build `FusedAdam`, the same update in one pass over memory.

    Raises:
        ImportError: SAELens is not as this module expects it; nothing has been replaced then.
    """
    _check()
    registry = _registry.SAE_TRAINING_CLASS_REGISTRY
    for architecture, (ours, _, _) in _OURS.items():
        _replaced.setdefault(architecture, registry[architecture])
        registry[architecture] = (ours, registry[architecture][1])
    _trainer.Adam = FusedAdam if fused_adam else torch.optim.Adam


def unregister() -> None:
    """Let SAELens build its own classes again; SAEs and trainers that exist stay as they are."""
    for architecture, entry in _replaced.items():
        _registry.SAE_TRAINING_CLASS_REGISTRY[architecture] = entry
    _replaced.clear()
    _trainer.Adam = torch.optim.Adam


def _check() -> None:
    """Raise ImportError unless every class, option and signature is one that is known here."""
    registry = _registry.SAE_TRAINING_CLASS_REGISTRY
    for architecture, (ours, theirs, options) in _OURS.items():
        found = registry.get(architecture)
        if found is None or found[0] not in (ours, theirs):
            PEER.refuse(f"{theirs.__name__} registered as {architecture!r}", f"{found}")
        PEER.fields(registry[architecture][1], options)
        PEER.parameters(theirs.training_forward_pass, ("self", "step_input"))
    inputs = {"sae_in", "coefficients", "dead_neuron_mask", "n_training_steps", "is_logging_step"}
    PEER.fields(_base.TrainStepInput, inputs)
    outputs = {"sae_in", "sae_out", "feature_acts", "hidden_pre", "loss", "losses", "metrics"}
    PEER.fields(_base.TrainStepOutput, outputs)
    if _trainer.Adam not in (torch.optim.Adam, FusedAdam):
        PEER.refuse("its trainer to use torch.optim.Adam", f"{_trainer.Adam}")
