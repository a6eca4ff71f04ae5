"""What two processes do; started by test_distributed.py, one JSON line from rank 0."""

from __future__ import annotations

import json
import os
import sys

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import fastsae
from fastsae import StepContext
from fastsae.nn import group_reduce

D, F, K = 16, 64, 4


class Loss(nn.Module):
    """A module whose forward is the training loss, as DDP wants it."""

    def __init__(self, sae: fastsae.SAE) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x):
        return self.sae.training_loss(x).loss


def rows(rank):
    torch.manual_seed(1)
    return torch.randn(80, D)[rank::2]


def gathered(t):
    out = [torch.empty_like(t) for _ in range(2)]
    distributed.all_gather(out, t.detach().contiguous())
    return [o.flatten().tolist() for o in out]


def ddp_statistics(rank, cls):
    """The same thresholds and averages on both ranks, those of all rows."""
    torch.manual_seed(0)
    sae = cls(D, F, K)
    model = DistributedDataParallel(Loss(sae), find_unused_parameters=True)
    model(rows(rank)).backward()
    names = [n for n, b in sae.named_buffers() if b.is_floating_point()]
    if cls is fastsae.JumpReLUSAE:
        names.append("log_threshold")
    return {name: gathered(getattr(sae, name).float().reshape(-1)[:4]) for name in names}


def ddp_own_loss(rank):
    """JumpReLU on the reconstruction alone: every parameter is reached."""
    torch.manual_seed(0)
    sae = fastsae.JumpReLUSAE(D, F, K, threshold=0.5)
    model = DistributedDataParallel(sae)
    x = rows(rank)
    (model(x) - x).square().sum().backward()
    grad = sae.log_threshold.grad
    return {"moves": bool(grad.any()), "grads": gathered(grad[:4])}


def fsdp(rank, cls):
    """Gradients of a sharded SAE are those of one process on all rows, on average."""
    torch.manual_seed(0)
    sae = cls(D, F, K)
    if cls is fastsae.JumpReLUSAE:
        refusal = ""
        torch.manual_seed(0)
        other = fully_shard(cls(D, F, K))
        register_fsdp_forward_method(other, "training_loss")
        try:
            other.training_loss(rows(rank))
        except RuntimeError as error:
            refusal = str(error)
        return {"refusal": refusal}
    fully_shard(sae)
    x = rows(rank)
    (sae(x) - x).square().sum().backward()
    grads = {n: p.grad.full_tensor().flatten()[:6].tolist() for n, p in sae.named_parameters()}
    return grads


def given_reduce(rank):
    """A step context that says over whom to reduce, without DDP."""
    torch.manual_seed(0)
    sae = fastsae.BatchTopKSAE(D, F, K)
    sae.training_loss(rows(rank), StepContext(reduce=group_reduce()))
    alone = fastsae.BatchTopKSAE(D, F, K)
    alone.load_state_dict(sae.state_dict())
    alone.threshold.fill_(float("inf"))
    alone.training_loss(rows(rank))  # no reduction: this rank's own rows
    return {"shared": gathered(sae.threshold[None]), "alone": gathered(alone.threshold[None])}


def main(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {
        "ddp": {
            cls.__name__: ddp_statistics(rank, cls)
            for cls in (fastsae.JumpReLUSAE, fastsae.BatchTopKSAE, fastsae.FeatureChoiceSAE)
        },
        "own_loss": ddp_own_loss(rank),
        "fsdp": fsdp(rank, fastsae.TopKSAE),
        "fsdp_jumprelu": fsdp(rank, fastsae.JumpReLUSAE),
        "reduce": given_reduce(rank),
    }
    if rank == 0:
        print(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's threads abort the process now and then when the interpreter ends


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
