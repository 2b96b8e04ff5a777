"""``python -m facegen`` is ``facegen``."""

from __future__ import annotations

import sys

from facegen.cli import main

if __name__ == "__main__":
    sys.exit(main())
