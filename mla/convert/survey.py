"""What was learnt about the layers of a model before they are converted, in memory or in a folder.

    state.json               fingerprint of what was surveyed, number of layers that are done
    layer-000.safetensors    moments; measured options as JSON in the metadata

A layer's file is written before the state says so, and the state is replaced in one step, so an
interruption leaves a survey that can go on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file

from mla.convert.allocate import Option
from mla.convert.statistics import InputMoments

STATE_FILE = "state.json"
LAYER_FILE = "layer-{:03d}.safetensors"


class LayerSurvey(NamedTuple):
    """What is known about one layer."""

    moments: InputMoments
    options: tuple[Option, ...]  # empty where no budget was given


class Survey(Sequence[LayerSurvey]):
    """What is known about all layers of a model: a list, or files that are read when needed."""

    def __init__(self, layers: Sequence[LayerSurvey | Path]) -> None:
        self._layers = tuple(layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        layer = self._layers[index]
        return _read_layer(layer) if isinstance(layer, Path) else layer


class SurveyFolder:
    """How far the survey in a folder has come; without a folder nothing is kept.

    Args:
        folder: made where it is missing; None: no survey is written or gone on with.
        fingerprint: of what the results depend on; those of another are begun anew.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.folder, self.fingerprint, self.done = folder, fingerprint, 0
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if held.get("fingerprint") == fingerprint:
            self.done = int(held["done"])

    def files(self) -> list[Path]:
        """Of the layers that are done."""
        return [self._file(index) for index in range(self.done)]

    def finish(self, index: int, survey: LayerSurvey) -> Path:
        """Write one layer, and that it is done after it."""
        path = self._file(index)
        tensors = {name: x.contiguous() for name, x in survey.moments._asdict().items()}
        save_file(tensors, path, metadata={"options": json.dumps(survey.options)})
        assert self.folder is not None
        unfinished = self.folder / f"{STATE_FILE}.part"
        values = {"fingerprint": self.fingerprint, "done": index + 1}
        unfinished.write_text(json.dumps(values), encoding="utf-8")
        unfinished.replace(self.folder / STATE_FILE)
        return path

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / LAYER_FILE.format(index)


def _read_layer(path: Path) -> LayerSurvey:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in InputMoments._fields}
        options = json.loads(file.metadata()["options"])
    return LayerSurvey(InputMoments(**tensors), tuple(Option(*values) for values in options))
