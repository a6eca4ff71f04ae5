"""Latents in words: contexts of all of them in one pass, explanations, and scores of those."""

from fastsae.interpret.ask import llm_explainer, llm_judge
from fastsae.interpret.clients import openai_client, transformers_client
from fastsae.interpret.intervention import Effect, Intervention, effect_explainer
from fastsae.interpret.keywords import keyword_explainer, keyword_judge
from fastsae.interpret.run import Interpretation, interpret, judge_scorers, read_interpretations
from fastsae.interpret.sample import ContextSample, sample_contexts
from fastsae.interpret.scores import (
    Score,
    detection,
    embedding,
    fuzzing,
    mean_embedding,
    surprisal,
)
from fastsae.interpret.similarity import ExplanationSimilarity, explanation_similarity

__all__ = [
    "ContextSample",
    "Effect",
    "ExplanationSimilarity",
    "Interpretation",
    "Intervention",
    "Score",
    "detection",
    "effect_explainer",
    "embedding",
    "explanation_similarity",
    "fuzzing",
    "interpret",
    "judge_scorers",
    "keyword_explainer",
    "keyword_judge",
    "llm_explainer",
    "llm_judge",
    "mean_embedding",
    "openai_client",
    "read_interpretations",
    "sample_contexts",
    "surprisal",
    "transformers_client",
]
