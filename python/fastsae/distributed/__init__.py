"""One SAE over many processes: latents split where they are trained, tokens where they are read.

With a mesh of `data` by `latent` processes, every process holds `d_sae / latent` latents and
encodes the tokens of its data group. Selection is exact over the whole dictionary and batch, and
reconstructions are sums over processes. Adam's averages are split like the parameters; no gradient
of a matrix exists. Everything goes through `torch.distributed`.

    torchrun --nproc-per-node 4 train.py

    sae = fastsae.TopKSAE(d_in, d_sae, k)
    trainer = fastsae.Trainer(sae, data, fastsae.TrainConfig(mesh=(1, 4)))
    trainer.fit()
"""

from __future__ import annotations

from fastsae.distributed.layout import Layout
from fastsae.distributed.mesh import make_mesh
from fastsae.distributed.rows import Gathered, gathered
from fastsae.distributed.shard import shard_, unshard_, why_not_sharded

__all__ = ["Gathered", "Layout", "gathered", "make_mesh", "shard_", "unshard_", "why_not_sharded"]
