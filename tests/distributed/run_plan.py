"""In every process: what a step sends and holds. `run_plan.py DATA LATENT OUT`."""

import json
import sys

import torch

import fastsae
from fastsae import TrainConfig, Trainer
from fastsae.distributed import make_mesh

D, F, K, N = 24, 512, 8, 256
CLASSES = {
    "topk": fastsae.TopKSAE,
    "batchtopk": fastsae.BatchTopKSAE,
    "matryoshka": fastsae.MatryoshkaSAE,
    "jumprelu": fastsae.JumpReLUSAE,
    "transcoder": fastsae.Transcoder,
}

if __name__ == "__main__":
    data, latent, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    make_mesh(data, latent)
    found = {}
    for name, cls in CLASSES.items():
        torch.manual_seed(0)
        sae = cls(D, *([D] if name == "transcoder" else []), F, K)
        settings = TrainConfig(
            steps=20, batch_size=N, mesh=(data, latent), dead_after_tokens=10**9, progress=False
        )
        trainer = Trainer(sae, None, settings)
        trainer.prepare(torch.randn(2048, sum(sae.columns.widths)))
        used = sae.parallel.used
        for _ in range(4):
            before = dict(used)
            acts = trainer._step(torch.randn(N // data, sum(sae.columns.widths))).acts
        counts = {key: used[key] - before.get(key, 0) for key in used}
        state = trainer._update.state_dict()
        averages = [t for part in ("exp_avg", "exp_avg_sq") for t in state[part].values()]
        found[name] = {
            # JumpReLU keeps those near a threshold too.
            "entries": float(
                sae.parallel.sum_over_all(torch.tensor(float(len(acts.values.flatten()))))
            )
            / N,
            "used": {key: count for key, count in counts.items() if count},
            "parameters": sum(p.numel() * p.element_size() for p in sae.parameters()),
            "optimizer": sum(t.numel() * t.element_size() for t in averages),
        }
    if torch.distributed.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    torch.distributed.destroy_process_group()
