"""Somebody's language model: load it, find its sites, read, replace, splice."""
