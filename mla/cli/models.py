"""Models, tokenizers and texts from local folders and files; the hub is never asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from mla.cli.console import CommandError, one_line, quiet, require

WINDOW = 1024  # tokens of one calibration window


def go_offline() -> None:
    """Before transformers is imported: nothing is looked up or fetched."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    require("transformers", "safetensors")


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model's folder."""
    if not folder.is_dir():
        fact = "is a file" if folder.exists() else "does not exist"
        raise CommandError(f"{folder} {fact}, expected the folder of a model")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"{folder} has no config.json, expected the folder of a model") from None
    except ValueError as error:
        raise CommandError(f"{folder / 'config.json'} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CommandError(f"{folder / 'config.json'} holds no object, expected a model's config")
    return values


def is_converted(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a converted model."""
    from mla.convert.checkpoint import FORMAT

    return config.get("format") == FORMAT


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A causal language model of transformers in eval mode; dtype None: as stored.

    Raises:
        CommandError: the folder holds no model that can be loaded.
    """
    read_config(folder)
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto" if dtype is None else dtype, local_files_only=True
            )
    except Exception as error:  # transformers raises whatever a broken file leads to
        raise CommandError(f"{folder} cannot be loaded as a model: {one_line(error)}") from error
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a model."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CommandError(f"{folder} has no tokenizer: {one_line(error)}") from error


def read_text(path: Path) -> str:
    """A text file as it is meant to be read."""
    if not path.is_file():
        fact = "is a folder" if path.is_dir() else "does not exist"
        raise CommandError(f"{path} {fact}, expected a file with text")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CommandError(f"{path} is not UTF-8 text") from None
    return text.replace("\f", "")  # separates articles


def calibration_windows(tokenizer: Any, path: Path, num_tokens: int) -> torch.Tensor:
    """``[W, T]`` ids from the start of a text, about ``num_tokens`` of them."""
    from mla.convert.evaluate import token_windows

    length = min(WINDOW, num_tokens)
    return token_windows(tokenizer, read_text(path), count=num_tokens // length, length=length)
