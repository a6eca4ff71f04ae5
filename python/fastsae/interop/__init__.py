"""Formats of files: one module each, which reads and, where it makes sense, writes."""

from fastsae.interop.saelens import read as load
from fastsae.interop.saelens import write as save

__all__ = ["load", "save"]
