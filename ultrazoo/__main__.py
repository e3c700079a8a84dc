"""``python -m ultrazoo``: the same program as the script `ultrazoo`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
