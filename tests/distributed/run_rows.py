"""In every process: rows of its own, some of them bad. `run_rows.py DATA LATENT OUT`."""

import sys

import torch
import torch.distributed as dist

import fastsae
from fastsae import TrainConfig, Trainer
from fastsae.data.source import TensorSource
from fastsae.distributed import gathered, make_mesh

data, latent, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
mesh = make_mesh(data, latent)
world, rank = dist.get_world_size(), dist.get_rank()
D, F, K, N = 8, 40, 4, 64
torch.manual_seed(0)
sae = fastsae.BatchTopKSAE(D, F, K, dtype=torch.float64)
config = TrainConfig(steps=30, batch_size=N, mesh=(data, latent), progress=False)
every = torch.randn(6, N, D, dtype=torch.float64)
own = every.view(6, world, N // world, D)[:, rank]  # by data group, then process

# A loop of one's own: each process gives its rows, and one of them a bad one.
trainer = Trainer(sae, None, config)
trainer.prepare(every.flatten(0, 1))
losses = [trainer.step(batch).loss.item() for batch in own]
bad = own[0].clone()
if rank == world - 1:
    bad[3, 2] = torch.nan
try:
    trainer.step(bad)
    said = ""
except ValueError as error:
    said = str(error)
steps = trainer.steps_done
refused = []


def refusal(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        refused.append(str(error))


refusal(lambda: trainer.step(own[0][: len(own[0]) - (rank == 0)]))
refusal(lambda: fastsae.save(sae, f"{out}.sae"))
refusal(lambda: sae.loss(every[0]))
trainer.finish()
assert sae.d_sae == F
settings = TrainConfig(steps=8, batch_size=N, mesh=(data, latent), progress=False)
apart = torch.randn(2048, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
refusal(lambda: Trainer(fastsae.TopKSAE(D, F, K, dtype=torch.float64), apart, settings).fit())
settings = TrainConfig(steps=8 + rank, batch_size=N, mesh=(data, latent), progress=False)
refusal(
    lambda: Trainer(
        fastsae.TopKSAE(D, F, K, dtype=torch.float64), every.flatten(0, 1), settings
    ).fit()
)

# A source of each process, read by all.
source = gathered(TensorSource(torch.full((40, D), float(rank + 1), dtype=torch.float64)), mesh)
batches = source.batches(4 * world, seed=0)
first = next(batches)
seen = {
    "batch": sorted(first[:, 0].tolist()),
    "in order": [part[:, 0].tolist() for part in source.batches(30, seed=None)],
    "sample": sorted(source.sample(4 * world)[:, 0].tolist()),
    "fingerprint": source.fingerprint(),
}
rest, held = source.hold_back(64 * world) or (None, None)
few = gathered(TensorSource(torch.randn(600, D, dtype=torch.float64) + rank), mesh)
torch.manual_seed(0)
again = fastsae.TopKSAE(D, F, K, dtype=torch.float64)
result = Trainer(again, few, config).fit()
results = [None] * world
dist.all_gather_object(results, (losses, said, steps, seen, refused, result.final["fvu"]))
if rank == 0:
    torch.save(results, out)
dist.destroy_process_group()
