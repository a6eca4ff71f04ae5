"""The logger of the library: `logging.getLogger("fastsae")`."""

from __future__ import annotations

import logging

logger = logging.getLogger("fastsae")
