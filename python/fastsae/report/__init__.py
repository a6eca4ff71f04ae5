"""Pages to look at: what was learned, what it costs the model, what latents mean."""

from fastsae.report.dark_matter import write_dark_matter
from fastsae.report.write import write_report

__all__ = ["write_dark_matter", "write_report"]
