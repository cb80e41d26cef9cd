"""What a healing knows in between, and the file that lets an interrupted one go on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla.integrations.converted.heal_records import LayerMatch, Measure

FORMAT = "mla-healing-1"


@dataclass
class HealState:
    """Everything that the rest of a healing depends on, besides models, text and options."""

    weights: list[Tensor]  # of the step that comes next; these and the best are on the CPU
    best: list[Tensor]
    best_losses: Tensor  # [W, T-1] of the held-out windows
    best_measure: Measure
    before: Measure
    before_losses: Tensor
    layers: list[LayerMatch] = field(default_factory=list)
    held_out: list[Measure] = field(default_factory=list)  # empty until all layers are matched
    losses: list[float] = field(default_factory=list)  # one for each step of the distillation
    optimizer: dict[str, Any] | None = None
    seconds: float = 0.0  # on the clock, in this and earlier processes
    match_seconds: float = 0.0  # those of them before the distillation
    processor_seconds: float = 0.0
    stopped: str | None = None  # why the distillation has ended


def save_state(path: Path, state: HealState, task: dict[str, Any]) -> None:
    """Write the file, complete under its name or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    values = {entry.name: getattr(state, entry.name) for entry in fields(state)}
    for name in ("best_measure", "before"):
        values[name] = tuple(values[name])
    for name in ("layers", "held_out"):
        values[name] = [tuple(entry) for entry in values[name]]
    torch.save({"format": FORMAT, "task": task, "state": values}, unfinished)
    unfinished.replace(path)


def load_state(path: Path, task: dict[str, Any]) -> HealState:
    """Read a file of `save_state`; nothing in it is executed.

    Raises:
        ValueError: it is no such file, or of another model, text or options.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        found, state = values["task"], dict(values["state"])
        if values["format"] != FORMAT:
            raise ValueError(values["format"])
    except FileNotFoundError:
        raise ValueError(
            f"heal: state {path} does not exist, expected that of a healing to resume"
        ) from None
    except Exception as error:  # unpickling broken bytes raises whatever they lead to
        raise ValueError(
            f"heal: state {path} has no readable healing ({type(error).__name__}), expected one "
            "of this version; delete it to start anew"
        ) from error
    for name, value in task.items():
        if found.get(name) != value:
            raise ValueError(
                f"heal: state {path} has {name}={found.get(name)!r}, expected {value!r} to resume; "
                "delete it to start anew"
            )
    for name in ("best_measure", "before"):
        state[name] = Measure(*state[name])
    state["layers"] = [LayerMatch(*entry) for entry in state["layers"]]
    state["held_out"] = [Measure(*entry) for entry in state["held_out"]]
    return HealState(**state)


def task_of(options: Any, steps: int, seconds: float | None, **tensors: Iterable[Tensor]) -> dict:
    """Plain values that tell one healing from another: options, and digests of tensors."""
    task: dict[str, Any] = {"steps": steps, "seconds": seconds, **asdict(options)}
    for name, group in tensors.items():
        digest = hashlib.sha256()
        for x in group:
            digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        task[name] = digest.hexdigest()
    return task
