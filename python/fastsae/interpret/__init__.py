"""Contexts of all latents, explanations of them in words, and scores of those."""

from fastsae.interpret.sample import ContextSample, sample_contexts

__all__ = ["ContextSample", "sample_contexts"]
