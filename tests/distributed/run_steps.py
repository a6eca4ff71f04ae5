"""In every process: steps of all classes, and selections. `run_steps.py DATA LATENT OUT`."""

import sys

import torch

from fastsae.distributed import Layout, make_mesh, shard_, unshard_
from fastsae.distributed.select import keep_largest, keep_largest_of_rows
from fastsae.train import make_update
from fastsae.types import SparseActs
from tests.distributed import cases

data, latent, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
mesh = make_mesh(data, latent)


def steps(name):
    sae, batches = cases.build(name)
    shard_(sae, mesh)
    layout = sae.parallel
    own = slice(layout.first_latent, layout.first_latent + layout.held)
    n = cases.N // data
    rows = slice(layout.data.rank * n, (layout.data.rank + 1) * n)
    update = make_update(sae, cases.CONFIG)
    dead = cases.dead_latents()[own]
    losses, used = [], []
    for turn, batch in enumerate(batches):
        before = dict(layout.used)
        out = update.step(batch[rows], cases.context(dead, turn), 1e-3)
        losses.append(out.loss.item())
        used.append({kind: count - before.get(kind, 0) for kind, count in layout.used.items()})
    unshard_(sae)
    return {"losses": losses, "state": dict(sae.state_dict()), "used": used}


def selections():
    layout = Layout(mesh, cases.F)
    own = slice(layout.first_latent, layout.first_latent + layout.held)
    n = cases.N // data
    rows = slice(layout.data.rank * n, (layout.data.rank + 1) * n)
    found = {}
    for name, matrix in cases.matrices().items():
        part = matrix[rows, own]
        key = part  # all are candidates, in the order of the latents
        kept = keep_largest_of_rows(key, cases.K, layout.share, layout.latent)
        acts = SparseActs.from_dense(part.clamp_min(0))
        some, threshold = keep_largest(acts, int(2.5 * cases.N), layout.data, layout.latent)
        found[name] = (kept, some.to_dense(), threshold)
    return found, rows, own


parts = selections()
every = [None] * mesh.size()
torch.distributed.all_gather_object(every, parts)
names = cases.CLASSES if mesh.size() == 2 else cases.BY_FOUR
results = {name: steps(name) for name in names}
if mesh.get_rank() == 0:
    torch.save({"selections": every, "steps": results}, out)
torch.distributed.destroy_process_group()
