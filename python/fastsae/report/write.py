"""One HTML page about a trained SAE: its numbers, its plots, and what its latents respond to.

The page is one file without scripts that loads nothing, so it can be mailed or archived.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastsae._files.write import write_atomic
from fastsae.analysis.examples import ActivatingExamples
from fastsae.analysis.lens import promoted_tokens
from fastsae.data import ActivationStore
from fastsae.eval import CrossEntropy, EvalResult
from fastsae.nn import SAE
from fastsae.report import sections
from fastsae.report.html import latent_section, page, table_rows


def write_report(
    path: str | os.PathLike[str],
    sae: SAE,
    store: ActivationStore,
    tokenizer: Any,
    result: EvalResult,
    *,
    model: nn.Module | None = None,
    cross_entropy: CrossEntropy | None = None,
    history: Sequence[dict[str, float]] = (),
    facts: dict[str, str] | None = None,
    n_latents: int = 50,
    max_rows: int = 200_000,
) -> None:
    """Write the report of an SAE.

    Args:
        path: the HTML file.
        sae: the SAE, for raw activations.
        store: where the example contexts come from.
        tokenizer: with `decode([id])`.
        result: of `evaluate` on held-out rows.
        model: for the tokens that each latent promotes; shown for late residual streams only.
        cross_entropy: of the model with the SAE spliced in.
        history: the trainer's rows of metrics.
        facts: further lines for "How this was made".
        n_latents: latents shown.
        max_rows: rows of the store that are searched for contexts.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    examples = ActivatingExamples(sae, store, max_rows=max_rows)
    latents = examples.interesting(n_latents)
    rows = sae.W_dec.detach()[[latent.index for latent in latents]]
    promoted = promoted_tokens(model, store.site, rows) if model is not None else None
    decode = _decoder(tokenizer)
    body = _BODY.format(
        lead=sections.lead(sae, store),
        figures=sections.figures(result, cross_entropy),
        numbers=sections.numbers(sae, result, cross_entropy),
        plots=sections.plots(sae, result, history),
        about=sections.about(latents, examples.n, store, promoted is not None),
        latents="\n".join(
            latent_section(latent, promoted[i] if promoted else [], decode)
            for i, latent in enumerate(latents)
        ),
        facts=table_rows(list((facts or {}).items())),
    )
    write_atomic(path, page(f"Sparse autoencoder of {store.manifest.model}", body))


def _decoder(tokenizer: Any) -> Callable[[int], str]:
    known: dict[int, str] = {}

    def decode(token: int) -> str:
        if token not in known:
            known[token] = str(tokenizer.decode([token]))
        return known[token]

    return decode


_BODY = """<p class="lead">{lead}</p>
<ul class="figures">{figures}</ul>
<h2>Numbers</h2>
<table>
{numbers}
</table>
<h2>Plots</h2>
<div class="plots">{plots}</div>
<h2>What latents respond to</h2>
{about}
{latents}
<h2>How this was made</h2>
<table>
{facts}
</table>"""
