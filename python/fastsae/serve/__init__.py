"""A local web page to look through all latents of an SAE."""

from fastsae.serve.dashboard import Dashboard, Refused
from fastsae.serve.explanations import Explanations
from fastsae.serve.live import Live
from fastsae.serve.server import DashboardServer
from fastsae.serve.words import Words

__all__ = ["Dashboard", "DashboardServer", "Explanations", "Live", "Refused", "Words"]
