"""One row of the list of compiled kernels, shared by the lists of decode and of prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One kernel with all its constants, for one architecture."""

    name: str
    kernel: Any
    architecture: str
    signature: dict[str, str]  # types of the arguments that are no constants
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    spill_bytes: int = 0  # allowed
    reason: str = ""  # for spills
    mma: str | None = None  # required matrix instruction

    @property
    def family(self) -> str:
        """decode, append, merge, rotate, prefill or expand."""
        return self.name.partition(" ")[0]
