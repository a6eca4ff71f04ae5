"""`fastsae interpret`: explain latents in words, and score the explanations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.cli.activations import activations_of
from fastsae.cli.console import emit, positive, progress, subcommand, table

if TYPE_CHECKING:
    from fastsae.data import ActivationStore
    from fastsae.interpret import ContextSample, Interpretation
    from fastsae.nn import SAE, NormalizedSAE

EXAMPLE = """
fastsae interpret fastsae-demo/sae fastsae-demo/activations --out words.jsonl
fastsae interpret sae acts --llm qwen3-8b --url http://localhost:8000/v1 --latents 200 --workers 8
fastsae interpret sae acts --llm ./my-chat-model --negatives neighbors
"""


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers,
        "interpret",
        "explain latents in words, and score the explanations",
        EXAMPLE,
        run,
    )
    add = parser.add_argument
    add("sae", help="folder of the SAE")
    add("store", help="folder written by `fastsae harvest`")
    add("--site", action="append", help="which site, if the store has several (default: the SAE's)")
    add("--split", default="train", choices=("train", "val"), help="which text (default: train)")
    add("--model", help="whose tokenizer reads the tokens (default: the store's model)")
    add(
        "--llm",
        help="who explains and judges: a name on the server --url, or a folder or hub name of a "
        "chat model (default: nobody; explanations are the tokens on which a latent peaks)",
    )
    add("--url", help="a server with OpenAI's chat completions, such as http://localhost:8000/v1")
    add("--latents", type=positive, default=100, help="how many, at random (default 100)")
    add("--examples", type=positive, default=20, help="windows an explainer is shown (20)")
    add("--windows", type=positive, default=30, help="windows of each kind to judge (30)")
    add("--negatives", default="random", choices=("random", "neighbors"),
        help="windows without the latent: any, or those of similar latents")  # fmt: skip
    add("--workers", type=positive, default=1, help="latents asked for at once (1)")
    add("--seed", type=int, default=0, help="of the latents and the windows (0)")
    add("--out", default="explanations.jsonl", help="file to write (explanations.jsonl)")


def run(args: argparse.Namespace) -> None:
    """Sample contexts, explain, score, and print the means."""
    if args.url and not args.llm:
        raise ValueError("interpret: expected --llm, a name on the server, together with --url")
    import torch

    from fastsae.interop import load
    from fastsae.interpret import interpret, judge_scorers
    from fastsae.models.load import load_tokenizer
    from fastsae.nn import SAE, NormalizedSAE

    sae = load(args.sae)
    if not isinstance(sae, SAE | NormalizedSAE):
        raise ValueError(f"interpret: expected an SAE in {args.sae}, got {type(sae).__name__}")
    store = activations_of(sae, args.store, args.site, split=args.split)
    decode = load_tokenizer(args.model or store.manifest.model).decode
    explain, judge = who(args)
    sample = _contexts(sae, store, Path(args.out), 2 * args.windows)
    fires = sample.counts.nonzero().flatten()
    generator = torch.Generator().manual_seed(args.seed)
    chosen = fires[torch.randperm(len(fires), generator=generator)[: args.latents]]
    with progress("interpret", len(chosen), "latent") as advance:
        found = interpret(
            sae,
            store,
            sample,
            decode,
            explain,
            judge_scorers(judge, args.seed),
            latents=sorted(chosen.tolist()),
            out=args.out,
            examples=args.examples,
            windows=args.windows,
            negatives=args.negatives,
            label=f"{args.llm or 'keywords'} {args.url or ''}".strip(),
            workers=args.workers,
            seed=args.seed,
            progress=advance,
        )
    result = _summary(found)
    shown = [(name, f"{value:.3f}" if isinstance(value, float) else str(value))
             for name, value in result.items()]  # fmt: skip
    emit(result, args.json, table([*shown, ("written", args.out)]))


def _contexts(
    sae: SAE | NormalizedSAE, store: ActivationStore, out: Path, drawn: int
) -> ContextSample:
    """Take the sample beside the explanations, or make one.

    Raises:
        FileExistsError: what is there is of another SAE or store, or has too few windows.
    """
    from fastsae.interpret import ContextSample, sample_contexts
    from fastsae.interpret.sample import CONTEXTS

    path = out.parent / CONTEXTS
    if path.exists():
        sample = ContextSample.open(path)
        found = int(sample.about["drawn"])
        if found >= drawn and not sample.not_of(sae, store):
            return sample
        raise FileExistsError(
            f"interpret: expected {path} to hold {drawn} drawn windows of this SAE and store, got "
            f"{found} of {'them' if found < drawn else 'others'}; remove it, or choose --out in "
            "another folder"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress("contexts", len(store), "token") as advance:
        sample = sample_contexts(sae, store, drawn=drawn, progress=advance)
    sample.save(path)
    return ContextSample.open(path)


def who(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the explainer and the judge that `--llm` and `--url` name."""
    from fastsae.interpret import (
        keyword_explainer,
        keyword_judge,
        llm_explainer,
        llm_judge,
        openai_client,
        transformers_client,
    )

    if args.llm is None:
        return keyword_explainer, keyword_judge
    if args.url:
        client = openai_client(args.llm, args.url)
    else:
        from fastsae.models.load import load_model

        client = transformers_client(*load_model(args.llm))
    return llm_explainer(client), llm_judge(client)


def _summary(found: list[Interpretation]) -> dict[str, Any]:
    """Return how many latents were explained, and the mean of every score."""
    explained = [x for x in found if x.explanation]
    result: dict[str, Any] = {"latents": len(found), "explained": len(explained)}
    for name in dict.fromkeys(name for x in explained for name in x.scores):
        scores = [x.scores[name] for x in explained]
        values = [score.value for score in scores if score.value == score.value]
        if values:
            result[name] = sum(values) / len(values)
        result[f"{name} unanswered"] = sum(score.unanswered for score in scores)
    return result
