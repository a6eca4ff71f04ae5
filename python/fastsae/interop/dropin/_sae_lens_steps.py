"""One training step of SAELens' classes on sparse codes; see `dropin.sae_lens`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.interop.dropin import _entries as entries
from fastsae.interop.dropin._peers import Peer
from fastsae.types import SparseActs

PEER = Peer("sae-lens", "6.54.12")
_base = PEER.module("sae_lens.saes.sae", "TrainStepOutput")
_jump = PEER.module("sae_lens.saes.jumprelu_sae", "JumpReLU", "Step", "calculate_pre_act_loss")


class StepOutput(_base.TrainStepOutput):  # type: ignore[misc,name-defined]
    """SAELens' output of a training step, with pre-activations that are computed on demand.

    Raises:
        RuntimeError: `hidden_pre` is read for the first time after the weights have changed.
    """

    _pre: Any

    @property
    def hidden_pre(self) -> Any:
        """[n, d_sae], with its graph."""
        if not isinstance(self._pre, Tensor):
            self._pre = self._pre()
        return self._pre

    @hidden_pre.setter
    def hidden_pre(self, value: Any) -> None:
        self._pre = value


class _Step:
    """What the fast steps share: the encoder's inputs, and the output."""

    losses: dict[str, Tensor]

    def __init__(self, sae: Any, step_input: Any) -> None:
        self.sae, self.input = sae, step_input
        self.x = sae.process_sae_in(step_input.sae_in)
        self.W_enc = entries.rows_of(sae.W_enc)

    def mse(self, reconstruction: Tensor) -> Tensor:
        loss: Tensor = self.sae.mse_loss_fn(reconstruction, self.input.sae_in).sum(dim=-1).mean()
        return loss

    def dead(self) -> Tensor:
        """Return the latents [e] that are dead, int64."""
        mask = self.input.dead_neuron_mask
        none = self.x.new_empty(0, dtype=torch.long)
        latents: Tensor = none if mask is None else mask.nonzero()[:, 0]
        return latents

    def reconstructed(self, before_hook: Tensor) -> Tensor:
        """Return a reconstruction as `decode` of SAELens does after its matmul."""
        sae = self.sae
        out = sae.run_time_activation_norm_fn_out(sae.hook_sae_recons(before_hook))
        result: Tensor = sae.reshape_fn_out(out, sae.d_head)
        return result

    def step_output(self, sae_out: Tensor, feature_acts: Tensor, scale: Tensor | None) -> Any:
        total = sum(list(self.losses.values())[1:], self.losses["mse_loss"])
        sae, x, versions = self.sae, self.x, self._versions()

        def hidden_pre() -> Any:
            if versions != self._versions():
                raise RuntimeError(
                    f"{type(sae).__name__}: expected hidden_pre to be read before the weights "
                    "change, got an output of an earlier step; read it inside the step"
                )
            pre = x @ sae.W_enc + sae.b_enc
            return pre if scale is None else pre * scale

        return StepOutput(
            sae_in=self.input.sae_in,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=total,
            losses=self.losses,
        )

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.sae.parameters()]


class SelectedStep(_Step):
    """A training step of TopK or BatchTopK.

    With `rescale_acts_by_decoder_norm` SAELens multiplies z by |W_dec| before it selects and
    divides the code by it before it decodes. So |W_dec| only says what is selected: what decodes is
    z, and the two gradients of |W_dec| cancel.
    """

    def __init__(self, sae: Any, step_input: Any, rule: entries.Select) -> None:
        super().__init__(sae, step_input)
        self.norm = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
        fixed = None if self.norm is None else self.norm.detach()
        self.acts = entries.select(self.x, self.W_enc, sae.b_enc, rule, fixed)

    def output(self) -> Any:
        values = self.acts.values
        sae_out = self.reconstructed(self.decode())
        self.losses = {
            "mse_loss": self.mse(sae_out),
            "auxiliary_reconstruction_loss": self.auxiliary(sae_out),
            **self.inner(),
        }
        if self.norm is not None:
            values = values * entries.at(self.norm, self.acts.indices)
        return self.step_output(sae_out, entries.coo(self.acts, values), self.norm)

    def decode(self) -> Tensor:
        b_dec: Tensor = self.sae.b_dec
        return ops.sparse_decode(self.acts, self.sae.W_dec) + b_dec

    def inner(self) -> dict[str, Tensor]:
        """Return more losses, by name."""
        return {}

    def auxiliary(self, sae_out: Tensor) -> Tensor:
        """Return the loss of dead latents that reconstruct the residual."""
        dead = self.dead()
        if not len(dead):
            return sae_out.new_tensor(0.0)
        loss = self.dead_loss(dead, sae_out)
        result: Tensor = self.sae.cfg.aux_loss_coefficient * loss
        return result

    def dead_loss(self, dead: Tensor, reconstruction: Tensor) -> Tensor:
        sae, most = self.sae, self.input.sae_in.shape[-1] // 2
        norm = None if self.norm is None else self.norm.detach()
        predicted = entries.from_dead(
            self.x, self.W_enc, sae.b_enc, sae.W_dec, dead, min(most, len(dead)), norm=norm
        )
        residual: Tensor = (self.input.sae_in - reconstruction).detach()
        loss: Tensor = (predicted - residual).pow(2).sum(dim=-1).mean()
        scale: float = min(len(dead) / most, 1.0)
        return scale * loss


class NestedStep(SelectedStep):
    """A training step of Matryoshka BatchTopK: every prefix of the dictionary reconstructs."""

    def decode(self) -> Tensor:
        sae = self.sae
        self.prefixes = entries.prefixes(self.acts, sae.W_dec, sae.b_dec, sae.cfg.matryoshka_widths)
        return self.prefixes[-1]

    def inner(self) -> dict[str, Tensor]:
        widths = self.sae.cfg.matryoshka_widths[:-1]
        return {f"inner_mse_loss_{w}": self.mse(self.prefixes[i]) for i, w in enumerate(widths)}

    def auxiliary(self, sae_out: Tensor) -> Tensor:
        if not self.sae.cfg.use_matryoshka_aux_loss:
            return super().auxiliary(sae_out)
        dead, start, total = self.dead(), 0, sae_out.new_tensor(0.0)
        for end, reconstruction in zip(self.sae.cfg.matryoshka_widths, self.prefixes, strict=True):
            own = dead[(dead >= start) & (dead < end)]
            start = end
            if len(own):
                total = total + self.dead_loss(own, reconstruction)
        result: Tensor = self.sae.cfg.aux_loss_coefficient * total
        return result


class JumpStep(_Step):
    """A training step of JumpReLU from the entries that are active or have a gradient.

    SAELens' two functions with a straight-through gradient get these entries as a batch of one row,
    over as many latents as there are entries.
    """

    def __init__(self, sae: Any, step_input: Any, room: int) -> None:
        super().__init__(sae, step_input)
        reach = sae._reach(self.x.dtype)
        acts = ops.encode_threshold(self.x, self.W_enc, sae.b_enc, reach, room)
        self.pre = entries.exact(acts)
        self.open = len(self.pre.values)

    def output(self) -> Any:
        sae, pre = self.sae, self.pre
        self.threshold = sae.threshold.to(self.x.dtype)
        self.of_entry = entries.at(self.threshold, pre.indices)
        values = self._through(_jump.JumpReLU)
        acts = SparseActs(values, pre.indices, pre.offsets, pre.d_sae)
        decoded = ops.sparse_decode(acts, sae.W_dec, inactive_grad=True) + sae.b_dec
        sae_out = self.reconstructed(decoded)
        self.losses = {"mse_loss": self.mse(sae_out), "l0_loss": self._sparsity(values)}
        if sae.cfg.pre_act_loss_coefficient is not None:
            self.losses["pre_act_loss"] = self._pre_act_loss()
        return self.step_output(sae_out, entries.coo(acts, values), None)

    def _through(self, function: Any) -> Tensor:
        sae, z = self.sae, self.pre.values.unsqueeze(0)
        ste = sae.cfg.jumprelu_ste_to_input
        out: Tensor = function.apply(z, self.of_entry, sae.bandwidth, ste).squeeze(0)
        return out

    def _sparsity(self, values: Tensor) -> Tensor:
        cfg = self.sae.cfg
        if cfg.jumprelu_sparsity_loss_mode == "tanh":
            norm = entries.at(self.sae.W_dec.norm(dim=1), self.pre.indices)
            per_token = self._per_token(torch.tanh(cfg.jumprelu_tanh_scale * values * norm))
        else:
            per_token = self._per_token(self._through(_jump.Step))
            if cfg.jumprelu_sparsity_loss_mode == "quadratic":
                per_token = 2 / cfg.target_l0 * (per_token - cfg.target_l0) ** 2
        loss: Tensor = (self.input.coefficients["l0"] * per_token).mean()
        return loss

    def _per_token(self, of_entries: Tensor) -> Tensor:
        zeros = of_entries.new_zeros(self.pre.n)
        return zeros.index_add(0, self.pre.rows(), of_entries)

    def _pre_act_loss(self) -> Tensor:
        dead, sae = self.dead(), self.sae
        if not len(dead):
            none: Tensor = self.x.new_tensor(0.0)
            return none
        W, b, D, threshold = (
            t.index_select(0, dead) for t in (self.W_enc, sae.b_enc, sae.W_dec, self.threshold)
        )
        pre, every = torch.addmm(b, self.x, W.t()), torch.ones_like(dead, dtype=torch.bool)
        loss: Tensor = _jump.calculate_pre_act_loss(
            sae.cfg.pre_act_loss_coefficient, threshold, pre, every, D.norm(dim=1)
        )
        return loss
