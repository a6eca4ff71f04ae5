"""Checkpoints of other libraries, made with their own code; run by hand."""
