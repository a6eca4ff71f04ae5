"""dictionary-learning's TopK, BatchTopK and Matryoshka trainers with fastsae's kernels.

    from fastsae.interop.dropin.dictionary_learning import TopKTrainer
    trainer = TopKTrainer(steps=..., activation_dim=..., dict_size=..., k=..., ...)

in the place of the trainer of the same name. Arguments, `update`, `loss`, `config` and what is
logged are those of dictionary-learning, and so is the dictionary in `trainer.ae`: its file loads
with and without fastsae. See docs/dropin.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae import ops
from fastsae.interop.dropin import _entries as entries
from fastsae.interop.dropin import _updates as updates
from fastsae.interop.dropin._adam import FusedAdam
from fastsae.interop.dropin._peers import Peer
from fastsae.types import SparseActs

__all__ = ["BatchTopKTrainer", "FusedAdam", "MatryoshkaBatchTopKTrainer", "TopKTrainer"]

_PEER = Peer("dictionary-learning", "0.1.0")
_topk = _PEER.module(
    "dictionary_learning.trainers.top_k", "TopKTrainer", "AutoEncoderTopK", "geometric_median"
)
_batch = _PEER.module(
    "dictionary_learning.trainers.batch_top_k", "BatchTopKTrainer", "BatchTopKSAE"
)
_nested = _PEER.module(
    "dictionary_learning.trainers.matryoshka_batch_top_k",
    "MatryoshkaBatchTopKTrainer",
    "MatryoshkaBatchTopKSAE",
)
for _trainer in (_topk.TopKTrainer, _batch.BatchTopKTrainer, _nested.MatryoshkaBatchTopKTrainer):
    _PEER.parameters(_trainer.loss, ("self", "x", "step", "logging"))
    _PEER.parameters(_trainer.update, ("self", "step", "x"))
    _PEER.parameters(_trainer.get_auxiliary_loss, ("self", "residual_BD", "post_relu_acts_BF"))


class LossLog(NamedTuple):
    """What `loss(..., logging=True)` returns."""

    x: Tensor
    x_hat: Tensor
    f: Tensor
    losses: dict[str, float]


class _Weights(NamedTuple):
    """The parameters of a dictionary, both matrices `[dict_size, activation_dim]`."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


class _Fast:
    """What the trainers share: layout, optimizer, bookkeeping and the loss of dead features."""

    own: Any
    """The dictionary whose equations the fast step has; others get dictionary-learning's code."""
    ae: Any
    _last_threshold: Tensor | None = None

    def _prepare(self: Any) -> None:
        """Store one contiguous row per feature, and update in one pass over memory."""
        if type(self.ae) is not self.own:
            return
        nested = isinstance(self.ae, _nested.MatryoshkaBatchTopKSAE)
        entries.rows_first_(self.ae.W_enc if nested else self.ae.decoder.weight)
        if not nested:  # it starts as the copy of a transposed view
            self.ae.encoder.weight.data = self.ae.encoder.weight.data.contiguous()
        adam = self.optimizer
        self.optimizer = FusedAdam(self.ae.parameters(), lr=self.lr, betas=adam.defaults["betas"])
        schedule = self.scheduler.lr_lambdas[0]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_lambda=schedule)

    def why_not_fast(self, x: Tensor) -> str:
        """Return why dictionary-learning's own code computes this loss, or an empty string."""
        if type(self.ae) is not self.own:
            return f"a dictionary of class {type(self.ae).__name__}"
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != self.ae.b_dec.dtype:
            return f"activations of {x.dtype} for parameters of {self.ae.b_dec.dtype}"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast: rounding decides there which features are kept"
        if x.ndim != 2 or not len(x):
            return f"activations of shape {list(x.shape)}"
        if getattr(self.ae, "active_groups", 0) != len(getattr(self.ae, "group_sizes", ())):
            return "groups that are left out"
        return ""

    def update(self: Any, step: int, x: Tensor) -> float:
        """Train on `x: [n, activation_dim]`, and return the loss before that."""
        if type(self.ae) is not self.own:
            loss: float = super().update(step, x)  # type: ignore[misc]
            return loss
        if step == 0:
            self.ae.b_dec.data = self._median(x).to(self.ae.b_dec.dtype)
        found = self.loss(x.to(self.device), step=step)
        found.backward()
        W_dec = self._decoder()
        assert W_dec.grad is not None
        rows_first = W_dec.grad if W_dec.is_contiguous() else W_dec.grad.t()
        W = W_dec.detach() if W_dec.is_contiguous() else W_dec.detach().t()
        updates.project_(rows_first, W, eps=1e-6)
        torch.nn.utils.clip_grad_norm_(self.ae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        updates.normalize_(W)
        return float(found.detach())

    def _decoder(self) -> Tensor:
        """Return the decoder's parameter; its rows in memory are features."""
        weight: Tensor = self.ae.decoder.weight
        return weight

    def _median(self: Any, x: Tensor) -> Tensor:
        """Return where b_dec starts."""
        median: Tensor = self.geometric_median(x)
        return median

    def _weights(self) -> _Weights:
        ae = self.ae
        encoder, decoder = ae.encoder, ae.decoder
        return _Weights(encoder.weight, encoder.bias, entries.rows_of(decoder.weight), ae.b_dec)

    def _k_of_batch(self, x: Tensor, w: _Weights) -> SparseActs:
        """Return the k n largest entries of a batch."""
        kept = ops.encode_batch_topk(
            x - w.b_dec, w.W_enc, w.b_enc, int(self.ae.k), threshold_guess=self._last_threshold
        )
        self._last_threshold = kept.threshold.detach()
        return entries.exact(kept.acts)

    def _count(self: Any, n: int, fired: Tensor) -> None:
        self.num_tokens_since_fired += n
        self.num_tokens_since_fired[fired] = 0

    def _auxiliary(self: Any, x: Tensor, w: _Weights, residual: Tensor) -> Tensor:
        """Return the loss of dead features that reconstruct the residual."""
        dead = (self.num_tokens_since_fired >= self.dead_feature_threshold).nonzero()[:, 0]
        self.dead_features = len(dead)
        if not len(dead):
            self.pre_norm_auxk_loss = -1
            return torch.tensor(0, dtype=residual.dtype, device=residual.device)
        k = min(self.top_k_aux, len(dead))
        guess = entries.from_dead(x - w.b_dec, w.W_enc, w.b_enc, w.W_dec, dead, k, relu=True)
        target = residual.float()
        loss = (target - guess.float()).pow(2).sum(dim=-1).mean()
        self.pre_norm_auxk_loss = loss
        spread = (target - residual.mean(dim=0).float()).pow(2).sum(dim=-1).mean()
        normalized: Tensor = (loss / spread).nan_to_num(0.0)
        return normalized

    def _logged(
        self, x: Tensor, x_hat: Tensor, acts: SparseActs, losses: dict[str, Tensor]
    ) -> LossLog:
        return LossLog(x, x_hat, acts.to_dense(), {k: float(v.detach()) for k, v in losses.items()})


def _squared(error: Tensor) -> Tensor:
    return error.pow(2).sum(dim=-1).mean()


class TopKTrainer(_Fast, _topk.TopKTrainer):  # type: ignore[misc,name-defined]
    """dictionary-learning's trainer of this name with a sparse loss."""

    own = _topk.AutoEncoderTopK

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def _median(self, x: Tensor) -> Tensor:
        median: Tensor = _topk.geometric_median(x)
        return median

    def loss(self, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        """Return the loss of `x: [n, activation_dim]`, or with `logging` a `LossLog`."""
        if self.why_not_fast(x):
            return super().loss(x, step=step, logging=logging)
        w, k = self._weights(), int(self.ae.k)
        code = ops.encode_topk(x - w.b_dec, w.W_enc, w.b_enc, k)
        acts = SparseActs(*code, None, len(w.W_enc))
        if step > self.threshold_start_step:
            self.update_threshold(acts.values)
        x_hat = ops.sparse_decode(acts, w.W_dec) + w.b_dec
        self.effective_l0 = k
        self._count(len(x), acts.indices.flatten().long())
        error = x - x_hat
        l2, aux = _squared(error), error.new_tensor(0.0)
        if self.auxk_alpha > 0:
            aux = self._auxiliary(x, w, error.detach())
        loss = l2 + self.auxk_alpha * aux
        losses = {"l2_loss": l2, "auxk_loss": aux, "loss": loss}
        return self._logged(x, x_hat, acts, losses) if logging else loss


class BatchTopKTrainer(_Fast, _batch.BatchTopKTrainer):  # type: ignore[misc,name-defined]
    """dictionary-learning's trainer of this name with a sparse loss."""

    own = _batch.BatchTopKSAE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def loss(self, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        """Return the loss of `x: [n, activation_dim]`, or with `logging` a `LossLog`."""
        if self.why_not_fast(x):
            return super().loss(x, step=step, logging=logging)
        w = self._weights()
        acts = self._k_of_batch(x, w)
        if step > self.threshold_start_step:
            self.update_threshold(acts.values)
        x_hat = ops.sparse_decode(acts, w.W_dec) + w.b_dec
        self.effective_l0 = self.k
        self._count(len(x), acts.fired())
        error = x - x_hat
        l2, aux = _squared(error), self._auxiliary(x, w, error.detach())
        loss = l2 + self.auxk_alpha * aux
        losses = {"l2_loss": l2, "auxk_loss": aux, "loss": loss}
        return self._logged(x, x_hat, acts, losses) if logging else loss


class MatryoshkaBatchTopKTrainer(_Fast, _nested.MatryoshkaBatchTopKTrainer):  # type: ignore[misc,name-defined]
    """dictionary-learning's trainer of this name with a sparse loss."""

    own = _nested.MatryoshkaBatchTopKSAE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def _decoder(self) -> Tensor:
        weight: Tensor = self.ae.W_dec
        return weight

    def _weights(self) -> _Weights:
        ae = self.ae
        return _Weights(entries.rows_of(ae.W_enc), ae.b_enc, ae.W_dec, ae.b_dec)

    def loss(self, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        """Return the loss of `x: [n, activation_dim]`, or with `logging` a `LossLog`."""
        if self.why_not_fast(x):
            return super().loss(x, step=step, logging=logging)
        w = self._weights()
        acts = self._k_of_batch(x, w)
        if step > self.threshold_start_step:
            self.update_threshold(acts.values)
        ends = self.ae.group_sizes.cumsum(0).tolist()
        nested = entries.prefixes(acts, w.W_dec, w.b_dec, ends)
        of_group = (x - nested).pow(2).sum(dim=-1).mean(dim=-1)
        of_group = of_group * of_group.new_tensor(self.group_weights)
        self.effective_l0 = self.k
        self._count(len(x), acts.fired())
        aux = self._auxiliary(x, w, (x - nested[-1]).detach())
        loss = of_group.mean() + self.auxk_alpha * aux
        if not logging:
            return loss
        losses = {"l2_loss": of_group.mean(), "auxk_loss": aux, "loss": loss}
        losses |= {"min_l2_loss": of_group.min(), "max_l2_loss": of_group.max()}
        return self._logged(x, nested[-1], acts, losses)
