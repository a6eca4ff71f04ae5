"""`python -m fastsae.cli` is `fastsae`."""

import sys

from fastsae.cli import main

sys.exit(main())
