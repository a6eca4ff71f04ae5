"""In every process: a whole run. `run_fit.py DATA LATENT CLASS OUT [STEPS_TO_STOP_AT]`."""

import signal
import sys

import torch
import torch.distributed as dist

from fastsae import Trainer
from fastsae.distributed import make_mesh
from tests.distributed import cases

data, latent, name, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
stop = int(sys.argv[5]) if len(sys.argv) > 5 else None
torch.set_num_threads(1)
make_mesh(data, latent)

sae, train, val, config = cases.run(name, out, (data, latent))
trainer = Trainer(sae, train, config, val=val)
if stop is not None and dist.get_rank() == dist.get_world_size() - 1:
    step = trainer._step

    def interrupted(x):
        if trainer.steps_done == stop:
            signal.raise_signal(signal.SIGTERM)
        return step(x)

    trainer._step = interrupted
try:
    result = trainer.fit(resume=True)
except KeyboardInterrupt as error:
    print(f"rank {dist.get_rank()}: {error}", flush=True)
else:
    if dist.get_rank() == 0:
        torch.save({"state": dict(result.sae.state_dict()), "final": result.final}, f"{out}.pt")
dist.destroy_process_group()
