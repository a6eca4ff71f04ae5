"""How well an explanation tells where a latent fires: detection, fuzzing, surprisal, embedding.

    detection   is the latent active in this text?          balanced accuracy of a judge
    fuzzing     are the marked tokens those of the latent?  balanced accuracy of a judge
    surprisal   -log p(text | neutral) + log p(text | explanation), of a language model      AUROC
    embedding   cosine of the explanation and the text, of a model of sentences              AUROC

Positives are windows in which the latent fires, negatives windows in which it is silent; 1 is
perfect, 0.5 chance. Nothing here sees the windows that the explanation was made from.

Source: Paulo et al. 2024 (arXiv 2410.13928), section 3; detection and fuzzing as balanced accuracy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsae.analysis.examples import Context
from fastsae.analysis.head_codes import roc_auc
from fastsae.interpret.ask import Judge
from fastsae.interpret.text import CLOSE, OPEN, Decode, active, marked, plain
from fastsae.models.probe import device_of, evaluating, options

Embed = Callable[[list[str]], Tensor]
"""Texts to vectors, `[n, d]`."""

NEUTRAL = "Various unrelated sentences."
QUERY = "Find texts that match this description: "


@dataclass(frozen=True)
class Score:
    """How an explanation did."""

    value: float
    """Balanced accuracy or AUROC; nan where nothing was answered for one of the classes."""
    positives: int
    """Windows with the latent that were judged."""
    negatives: int
    """Windows without."""
    hits: int | None = None
    """Of the positives, how many were called so; None of an AUROC."""
    rejections: int | None = None
    """Of the negatives, how many were called so."""
    unanswered: int = 0
    """Windows on which the judge said nothing; they count for nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Return what is known, in JSON types."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {**values, "value": None if math.isnan(self.value) else self.value}


def detection(
    judge: Judge,
    explanation: str,
    positives: Sequence[Context],
    negatives: Sequence[Context],
    decode: Decode,
    seed: int = 0,
) -> Score:
    """Ask whether the latent is active in texts, shown in random order."""
    texts = [(plain(context, decode), True) for context in positives]
    texts += [(plain(context, decode), False) for context in negatives]
    return _judged(judge, "detection", explanation, texts, seed)


def fuzzing(
    judge: Judge,
    explanation: str,
    positives: Sequence[Context],
    negatives: Sequence[Context],
    decode: Decode,
    seed: int = 0,
) -> Score:
    """Ask whether marked tokens are those of the latent.

    In the negatives as many tokens are marked, at random, as in the positives on average. Texts in
    which `<<` or `>>` is written are left out: nobody could tell what is marked there.
    """
    positives, negatives = (
        [c for c in part if not any(mark in plain(c, decode) for mark in (OPEN, CLOSE))]
        for part in (positives, negatives)
    )
    texts = [(marked(context, decode, active(context)), True) for context in positives]
    draw = random.Random(seed)
    mean = sum(sum(active(context)) for context in positives) / max(len(positives), 1)
    for context in negatives:
        n = len(context.token_ids)
        chosen = set(draw.sample(range(n), min(n, math.ceil(mean))))
        texts.append((marked(context, decode, [i in chosen for i in range(n)]), False))
    return _judged(judge, "fuzzing", explanation, texts, seed)


def _judged(
    judge: Judge, task: str, explanation: str, texts: list[tuple[str, bool]], seed: int
) -> Score:
    texts = random.Random(seed).sample(texts, len(texts))
    verdicts = judge(task, explanation, [text for text, _ in texts])
    if len(verdicts) != len(texts):
        raise ValueError(
            f"{task}: expected {len(texts)} verdicts of the judge, got {len(verdicts)}"
        )
    pairs = [(v, true) for v, (_, true) in zip(verdicts, texts, strict=True) if v is not None]
    said = [v for v, true in pairs if true]
    denied = [not v for v, true in pairs if not true]
    value = math.nan
    if said and denied:
        value = (sum(said) / len(said) + sum(denied) / len(denied)) / 2
    missing = len(texts) - len(pairs)
    return Score(value, len(said), len(denied), sum(said), sum(denied), missing)


def surprisal(
    model: nn.Module,
    tokenizer: Any,
    explanation: str,
    positives: Sequence[Context],
    negatives: Sequence[Context],
    decode: Decode,
) -> Score:
    """Ask how much less surprising a text is to a language model after the explanation.

    Args:
        model: a causal language model of `transformers`, best a base model.
        tokenizer: its own.
        explanation: what is scored.
        positives: windows in which the latent fires.
        negatives: windows in which it is silent.
        decode: of the tokens of the windows.
    """
    texts = [plain(context, decode) for context in (*positives, *negatives)]
    neutral, told = (
        torch.tensor(
            [log_probability(model, tokenizer, f"{before}\n\n", x) for x in texts],
            dtype=torch.float64,
        )
        for before in (NEUTRAL, explanation)
    )
    return _ranked(told - neutral, len(positives))


def log_probability(model: nn.Module, tokenizer: Any, before: str, text: str) -> float:
    """Return the log-probability of a text after another, in nats, summed over its tokens."""
    prefix = tokenizer(before)["input_ids"]
    ids = [*prefix, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    tokens = torch.tensor([ids], device=device_of(model))
    with torch.no_grad(), evaluating(model):
        logits = model(input_ids=tokens, **options(model)).logits[0, len(prefix) - 1 : -1]
    return -float(F.cross_entropy(logits.double(), tokens[0, len(prefix) :], reduction="sum"))


@torch.no_grad()
def embedding(
    embed: Embed,
    explanation: str,
    positives: Sequence[Context],
    negatives: Sequence[Context],
    decode: Decode,
) -> Score:
    """Ask how similar the vectors of the explanation and of a text are."""
    texts = [plain(context, decode) for context in (*positives, *negatives)]
    vectors = embed([QUERY + explanation, *texts]).double()
    if vectors.ndim != 2 or len(vectors) != len(texts) + 1:
        raise ValueError(
            f"embedding: expected vectors to be [{len(texts) + 1}, d], got {[*vectors.shape]}"
        )
    return _ranked(F.cosine_similarity(vectors[:1], vectors[1:]), len(positives))


def _ranked(scores: Tensor, n: int) -> Score:
    labels = torch.arange(len(scores)) < n
    value = roc_auc(scores.cpu(), labels) if 0 < n < len(scores) else math.nan
    return Score(value, n, len(scores) - n)


def mean_embedding(model: nn.Module, tokenizer: Any) -> Embed:
    """Return the mean of a model's last hidden states as the vector of a text.

    Args:
        model: any model of `transformers` that gives hidden states; one that was trained for
            sentences does far better.
        tokenizer: its own.
    """

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        vectors = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]], device=device_of(model))
            with evaluating(model):
                states = model(input_ids=ids, output_hidden_states=True).hidden_states
            vectors.append(states[-1][0].float().mean(0))
        return torch.stack(vectors)

    return embed
