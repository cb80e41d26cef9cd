"""The last line of a test run: how many tests passed, failed and were skipped, and why."""

from collections import Counter
from collections.abc import Iterable

MAX_REASON_CHARACTERS = 60


def clean_reason(reason: str) -> str:
    """One short line of what a test gave as its reason to skip."""
    lines = reason.removeprefix("Skipped: ").strip().splitlines() or ["no reason given"]
    line = lines[0].strip()
    return line if len(line) <= MAX_REASON_CHARACTERS else line[: MAX_REASON_CHARACTERS - 3] + "..."


def summary_line(passed: int, failed: int, skip_reasons: Iterable[str]) -> str:
    """`mla tests: 8 passed, 0 failed, 3 skipped (2 no CUDA device, 1 no C++ compiler)`.

    Args:
        passed: tests that passed; expected failures belong here.
        failed: tests that failed or could not be set up or collected.
        skip_reasons: one entry for each skipped test.
    """
    reasons = Counter(clean_reason(reason) for reason in skip_reasons)
    line = f"mla tests: {passed} passed, {failed} failed, {reasons.total()} skipped"
    if reasons:
        by_count = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        line += f" ({', '.join(f'{count} {reason}' for reason, count in by_count)})"
    return line
