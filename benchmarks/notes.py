"""One line on stderr for what a benchmark leaves out, and why; once for each."""

from __future__ import annotations

import sys
from functools import cache


@cache
def skipped(bench: str, name: str, reason: str) -> None:
    """Say it, unless it has been said."""
    print(f"{bench}: {name} left out: {' '.join(reason.split())[:200]}", file=sys.stderr)
