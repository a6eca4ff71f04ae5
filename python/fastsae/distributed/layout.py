"""What a step of a spread SAE does with the other processes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastsae import ops
from fastsae.distributed.mesh import Peers, check_mesh
from fastsae.distributed.select import (
    keep_largest,
    keep_largest_of_columns,
    keep_largest_of_rows,
)
from fastsae.nn.parallel import Parallel
from fastsae.ops import _tape
from fastsae.ops._encode import attach, attachable
from fastsae.types import BatchTopK, SparseActs, accumulator_dtype


class _Sum(torch.autograd.Function):
    """The sum over processes; every part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, peers: Peers) -> Tensor:
        return peers.sum(part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _sum(part: Tensor, peers: Peers) -> Tensor:
    if peers.size == 1:
        return part
    total: Tensor = _Sum.apply(part, peers)  # type: ignore[no-untyped-call]
    return total


class Layout(Parallel):
    """Which latents and tokens this process has of a dictionary of `d_sae` latents.

    Process l of `latent` has latents `first_latent : first_latent + held`: `ceil(d_sae / latent)`,
    or what is left. The tokens of a batch are those of data group 0, then those of group 1 and
    so on, equally many each; the processes of a group are given the same ones.

    Every process calls everything here, in the same order.

    Args:
        mesh: from `make_mesh`.
        d_sae: number of latents.

    Raises:
        ValueError: another mesh, or a process would be left without a latent.
    """

    def __init__(self, mesh: DeviceMesh, d_sae: int) -> None:
        check_mesh(mesh)
        self.mesh = mesh
        self.used: Counter[str] = Counter()
        """Collectives so far, by kind and dimension, and `bytes` that this process gave to them."""
        self.data = Peers(mesh, "data", self.used)
        self.latent = Peers(mesh, "latent", self.used)
        self.d_sae = d_sae
        self.share = -(-d_sae // self.latent.size)
        self.first_latent = self.share * self.latent.rank
        self.held = min(self.share, d_sae - self.first_latent)
        if d_sae <= self.share * (self.latent.size - 1):
            raise ValueError(
                f"shard_: expected d_sae with at least one of {self.share} latents for each of "
                f"{self.latent.size} processes, got {d_sae}"
            )

    @property
    def is_alone(self) -> bool:
        """See `Parallel.is_alone`."""
        return False

    def latents(self, held: int) -> int:
        """See `Parallel.latents`."""
        return self.d_sae

    def tokens(self, n: int) -> int:
        """See `Parallel.tokens`."""
        return n * self.data.size

    def count(self, held: int) -> int:
        """See `Parallel.count`."""
        if self.latent.size == 1:
            return held
        device = self.mesh.device_type
        return int(self.latent.sum(torch.tensor(held, device=device)))

    def encode_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        *,
        b_dec: Tensor | None = None,
        absolute: bool = False,
        **options: Any,
    ) -> SparseActs:
        """See `Parallel.encode_topk`. One collective of n min(k, share) numbers."""
        _expect_plain(x, W_enc, b_enc, b_dec)
        with torch.no_grad():
            n, held = x.shape[0], W_enc.shape[0]
            own = min(k, held)
            values = x.new_empty(n, 0)
            indices = torch.empty(n, 0, dtype=torch.int32, device=x.device)
            if own:
                values, indices = ops.encode_topk(
                    x,
                    W_enc,
                    b_enc,
                    own,
                    b_dec=b_dec,
                    relu=False,
                    absolute=absolute,
                    **options,
                )
            key = values.abs() if absolute else values
            kept = keep_largest_of_rows(key, k, min(k, self.share), self.latent)
            if not absolute:
                values = values.relu()
            acts = _only(values, indices, kept, held)
        return attach(acts, x, W_enc, b_enc, b_dec)

    def encode_batch_topk(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: float, **options: Any
    ) -> BatchTopK:
        """See `Parallel.encode_batch_topk`. Per dimension of the mesh 3 collectives of 2,048 counts
        (6 in float64), and one of a count per token."""
        bias = options.get("b_dec")
        _expect_plain(x, W_enc, b_enc, bias)
        with torch.no_grad():
            n, held = x.shape[0], W_enc.shape[0]
            budget = int(k * self.tokens(n))
            own = min(budget, n * held)
            # int(k n) of the op is `own` again, however k is rounded.
            acts = ops.encode_batch_topk(x, W_enc, b_enc, (own + 0.5) / max(n, 1), **options).acts
            acts, threshold = keep_largest(acts.trimmed(), budget, self.data, self.latent)
        return BatchTopK(attach(acts, x, W_enc, b_enc, bias), threshold)

    def encode_feature_topk(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, budget: Tensor, total: int, **options: Any
    ) -> SparseActs:
        """See `Parallel.encode_feature_topk`. One collective over the data groups, of as many
        numbers as all budgets here, at most n each."""
        bias = options.get("b_dec")
        _expect_plain(x, W_enc, b_enc, bias)
        with torch.no_grad():
            own = budget.clamp_max(x.shape[0])
            acts = ops.encode_feature_topk(x, W_enc, b_enc, own, int(own.sum()), **options)
            acts = keep_largest_of_columns(acts.trimmed(), budget, own, self.data)
        return attach(acts, x, W_enc, b_enc, bias)

    def sparse_decode(
        self, acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None, **options: Any
    ) -> Tensor:
        """See `Parallel.sparse_decode`. One collective of n d_out numbers."""
        part: Tensor = ops.sparse_decode(acts, W_dec, **options)
        total = self.sum_over_latents(part)
        return total if b_dec is None else total + b_dec

    def sum_over_latents(self, part: Tensor) -> Tensor:
        """See `Parallel.sum_over_latents`."""
        return _sum(part, self.latent)

    def sum_over_tokens(self, part: Tensor) -> Tensor:
        """See `Parallel.sum_over_tokens`."""
        return _sum(part, self.data)

    def sum_over_all(self, part: Tensor) -> Tensor:
        """See `Parallel.sum_over_all`."""
        return _sum(_sum(part, self.latent), self.data)

    def min_over_tokens(self, part: Tensor) -> Tensor:
        """See `Parallel.min_over_tokens`."""
        return self.data.gather(part).amin(0)

    def of_all_latents(self, held: Tensor) -> Tensor:
        """See `Parallel.of_all_latents`; rows, where `held` has some for each latent."""
        if self.latent.size == 1:
            return held
        padded = held
        if len(held) < self.share:
            padded = held.new_zeros(self.share, *held.shape[1:])
            padded[: len(held)] = held
        every = self.latent.gather(padded).flatten(0, 1)
        return every if len(every) == self.d_sae else every[: self.d_sae].clone()

    def of_own_latents(self, every: Tensor) -> Tensor:
        """See `Parallel.of_own_latents`."""
        return every[self.first_latent : self.first_latent + self.held]

    def total_variance(self, x: Tensor) -> Tensor:
        """See `Parallel.total_variance`. One collective of d + 1 numbers over the data groups.

        With the mean m_g and the sum of squared deviations s_g of each group of n tokens:
            sum_g s_g + n |m_g - mean m|^2
        Source: Chan, Golub and LeVeque 1979, "Updating formulae", equation 2.1.
        """
        x = x.detach().to(accumulator_dtype(x.dtype)).reshape(-1, x.shape[-1])
        mean = x.mean(0)
        own = (x - mean).square().sum()
        if self.data.size == 1:
            return own
        every = self.data.gather(torch.cat([mean, own.unsqueeze(0)]))
        means = every[:, :-1]
        return every[:, -1].sum() + x.shape[0] * (means - means.mean(0)).square().sum()


def _only(values: Tensor, indices: Tensor, kept: Tensor, d_sae: int) -> SparseActs:
    """Return the code of those entries `[n, k]` that are kept.

    Elsewhere than on a CPU, where their number would be a wait, all stay, the others with value 0.
    """
    if values.device.type != "cpu":
        return SparseActs(values.where(kept, 0), indices, None, d_sae)
    offsets = torch.zeros(len(kept) + 1, dtype=torch.int32)
    torch.cumsum(kept.sum(1), 0, dtype=torch.int32, out=offsets[1:])
    return SparseActs(values[kept], indices[kept], offsets, d_sae)


def _expect_plain(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> None:
    if not attachable(x, W_enc, b_enc, b_dec) or x.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(
            "fastsae: expected a spread SAE to run eagerly in float32 or float64, in reverse mode, "
            f"without autocast, compile and torch.func, got another use (x is {x.dtype})"
        )
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x, W_enc, b_enc))
    if graph and not _tape.is_open():
        raise RuntimeError(
            "fastsae: expected a spread SAE to be trained by Trainer, or used under "
            "torch.no_grad(): gradients here would be those of the latents of one process"
        )
