"""A converted model as a folder, read and written all or nothing.

    config.json         format and version, the host's config, one `MLAConfig` a layer, reports
    model.safetensors   every parameter once, under the names of the converted model
    tokenizer files     if a tokenizer was given

Reading checks everything before anything is used; nothing in a folder is executed or unpickled.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mla.config import MLAConfig
from mla.convert.gqa import FitReport
from mla.module import MultiheadLatentAttention

FORMAT = "mla-converted"
VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
LAYER_PREFIX = "model.layers.{}.self_attn."  # of the tensors of one attention layer


class Checkpoint(NamedTuple):
    """A converted model without the code around it."""

    host_config: dict[str, Any]  # of the model around the attention, as transformers writes it
    generation_config: dict[str, Any]
    layers: tuple[MLAConfig, ...]
    reports: tuple[FitReport, ...]  # one for each layer
    tensors: dict[str, Tensor]


def save_checkpoint(
    path: Path | str,
    checkpoint: Checkpoint,
    *,
    overwrite: bool = False,
    write_extra: Callable[[Path], object] | None = None,
) -> None:
    """Write a folder: complete under its name, or not at all.

    Args:
        path: a folder that does not exist or is empty.
        checkpoint: what to write.
        overwrite: replace a converted model at ``path``; anything else there stays refused.
        write_extra: called with the unfinished folder, to add tokenizer files.

    Raises:
        ValueError: ``path`` is taken; it is left as it is.
    """
    with whole_folder(
        path, "save_checkpoint", overwrite=overwrite, recognise=_recognise
    ) as unfinished:
        if write_extra is not None:
            write_extra(unfinished)
        tensors = {name: x.detach().cpu().contiguous() for name, x in checkpoint.tensors.items()}
        save_file(tensors, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(_config_values(checkpoint), indent=1) + "\n"
        (unfinished / CONFIG_FILE).write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(
    path: Path | str, op: str, *, overwrite: bool, recognise: Callable[[Path], object]
) -> Iterator[Path]:
    """An unfinished folder to write into; it takes the name ``path`` if nothing went wrong.

    Args:
        path: a folder that does not exist or is empty.
        op: named by errors.
        overwrite: replace what ``recognise`` accepts.
        recognise: raises ValueError for a folder that is not to be replaced.

    Raises:
        ValueError: ``path`` is taken; it is left as it is.
    """
    path = Path(path)
    check_folder(path, op, overwrite, recognise)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp and safetensors hide what they write from others
        for file in unfinished.glob("*.safetensors"):
            file.chmod(0o644)
        _move_into_place(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a folder of `save_checkpoint`; tensors are mapped from the file, not copied.

    Raises:
        ValueError: it is not a complete converted model; the message names file and fact.
    """
    path = Path(path)
    values = _read_config(path)
    layers = _parse(path, values, "layers", MLAConfig.from_dict)
    reports = _parse(path, values, "reports", _report_of)
    if not layers or len(reports) != len(layers):
        raise _problem(
            path, CONFIG_FILE, f"{len(layers)} layers and {len(reports)} reports", "as many"
        )
    tensors = _read_tensors(path)
    for index, config in enumerate(layers):
        _check_layer(path, tensors, LAYER_PREFIX.format(index), config)
    return Checkpoint(values["host"], values["generation"], layers, reports, tensors)


def _problem(path: Path, file: str, fact: str, expected: str) -> ValueError:
    return ValueError(f"load_checkpoint: {path / file} has {fact}, expected {expected}")


def _config_values(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "host": checkpoint.host_config,
        "generation": checkpoint.generation_config,
        "layers": [config.to_dict() for config in checkpoint.layers],
        "reports": [report._asdict() for report in checkpoint.reports],
    }


def check_folder(path: Path, op: str, overwrite: bool, recognise: Callable[[Path], object]) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if overwrite and path.is_dir():
        try:
            recognise(path)
            return
        except (ValueError, OSError):
            fact, advice = "something else than a converted model", "choose another folder"
    else:
        fact, advice = "something in it already", "overwrite=True replaces a converted model"
    raise ValueError(f"{op}: {path} has {fact}, expected an empty folder; {advice}")


def _recognise(path: Path) -> None:
    """Raise ValueError if ``path`` holds no converted model."""
    _read_config(path)


def _move_into_place(finished: Path, path: Path) -> None:
    """Rename, keeping what was there until the new folder has its name."""
    if not path.exists():
        finished.rename(path)
        return
    old = finished.with_name(finished.name + "-old")
    path.rename(old)
    try:
        finished.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        fact = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"load_checkpoint: {path} {fact}, expected the folder of a model")
    try:
        values = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"load_checkpoint: {path} has no {CONFIG_FILE}, expected the folder of a model"
        ) from None
    except (ValueError, OSError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise _problem(path, CONFIG_FILE, f"no readable JSON ({error})", "JSON") from None
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise _problem(
            path, CONFIG_FILE, f"format {found!r}", f"{FORMAT!r}: it is not a converted model"
        )
    if values.get("version") != VERSION:
        raise _problem(path, CONFIG_FILE, f"version {values.get('version')!r}", str(VERSION))
    kinds = {"host": dict, "generation": dict, "layers": list, "reports": list}
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise _problem(path, CONFIG_FILE, f"no {name}", f"a {kind.__name__}")
    result: dict[str, Any] = values
    return result


def _parse(
    path: Path, values: dict[str, Any], name: str, parse: Callable[[Any], Any]
) -> tuple[Any, ...]:
    parsed = []
    for index, entry in enumerate(values[name]):
        try:
            parsed.append(parse(entry))
        except (ValueError, TypeError, AttributeError) as error:
            fact = f"a wrong entry {index} in {name} ({error})"
            raise _problem(path, CONFIG_FILE, fact, "one as it was written") from None
    return tuple(parsed)


def _report_of(entry: Any) -> FitReport:
    report = FitReport(**entry)
    return report._replace(
        rotated_frequencies=tuple(report.rotated_frequencies), spectrum=tuple(report.spectrum)
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"load_checkpoint: {path} has no {WEIGHTS_FILE}, expected the weights")
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _problem(
            path, WEIGHTS_FILE, f"no complete tensors ({error})", "all of them"
        ) from None


def _check_layer(path: Path, tensors: dict[str, Tensor], prefix: str, config: MLAConfig) -> None:
    """Compare names, shapes and dtype of one attention layer with what its config asks for."""
    with torch.device("meta"):
        layer = MultiheadLatentAttention(config)
    expected = {f"{prefix}mla.{name}": x.shape for name, x in layer.state_dict().items()}
    found = {name: x.shape for name, x in tensors.items() if name.startswith(prefix)}
    if found.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - found), sorted(found.keys() - expected)
        fact = f"missing {missing} and unknown {extra} tensors"
        raise _problem(path, WEIGHTS_FILE, fact, "those of the layer's config")
    for name, shape in expected.items():
        if found[name] != shape or not tensors[name].is_floating_point():
            fact = f"{tuple(found[name])} {tensors[name].dtype} at {name}"
            raise _problem(path, WEIGHTS_FILE, fact, f"{tuple(shape)} of a floating dtype")
