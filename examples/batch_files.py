"""Files around batch generation: prompts, finished parts, results. Used by ray_generate.py."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mla.cli.console import CommandError, one_line, quiet
from mla.cli.models import is_converted, read_config

Prompt = str | list[int]


@dataclass(frozen=True)
class Limits:
    """What a model can be asked: token ids below one number, positions up to another."""

    vocab_size: int
    positions: int | None


def read_prompts(path: Path) -> list[Prompt]:
    """Text or token ids of each line.

    Raises:
        CommandError: no such file, or a line that is no prompt; the message names it.
    """
    if path.suffix not in {".txt", ".jsonl"}:
        raise CommandError(f"--prompts has the file {path.name}, expected a .txt or .jsonl file")
    if not path.is_file():
        raise CommandError(f"--prompts has the file {path}, which does not exist")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise CommandError(f"{path} is not UTF-8 text") from None
    read = _prompt_of_json if path.suffix == ".jsonl" else _prompt_of_text
    found = [read(line, f"{path}:{at}") for at, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise CommandError(f"{path} holds no prompts, expected at least one line")
    return found


def _prompt_of_text(line: str, where: str) -> Prompt:
    return line.rstrip("\r")


def _prompt_of_json(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CommandError(f"{where} is not JSON: {error}") from None
    if isinstance(value, dict):
        prompt, tokens = value.get("prompt"), value.get("tokens")
        if isinstance(prompt, str) and prompt and tokens is None:
            return prompt
        is_list = isinstance(tokens, list) and bool(tokens) and prompt is None
        if is_list and all(type(token) is int for token in tokens):
            return list(tokens)
    expected = '{"prompt": "text"} or {"tokens": [1, 2]}'
    raise CommandError(f"{where} holds no prompt, expected {expected}")


def encode(prompts: Sequence[Prompt], tokenizer: Any, limits: Limits, room: int) -> list[list[int]]:
    """Token ids of each prompt; ``tokenizer`` may be None where all prompts are ids.

    Raises:
        CommandError: a prompt has no tokens, tokens that the model does not know, or leaves less
            than ``room`` positions for new ones.
    """
    found = []
    for index, prompt in enumerate(prompts):
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if not ids:
            raise CommandError(f"prompt {index} has no tokens, expected at least one")
        odd = [token for token in ids if not 0 <= token < limits.vocab_size]
        if odd:
            raise CommandError(
                f"prompt {index} has token {odd[0]}, expected 0 to {limits.vocab_size - 1}"
            )
        if limits.positions is not None and len(ids) + room > limits.positions:
            raise CommandError(
                f"prompt {index} has {len(ids)} tokens and {room} are to follow, expected at most "
                f"{limits.positions} together"
            )
        found.append(ids)
    return found


def check_model(folder: Path) -> Limits:
    """Look at a model's folder without its weights.

    Raises:
        CommandError: it holds neither a converted model nor an MLA model of transformers.
    """
    values = read_config(folder)
    if is_converted(values):
        host = values["host"]
        return Limits(host["vocab_size"], host.get("max_position_embeddings"))
    from transformers import AutoConfig, AutoModelForCausalLM

    from mla.integrations.transformers import replace_attention

    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            replace_attention(AutoModelForCausalLM.from_config(config))
    except Exception as error:  # transformers raises whatever a broken file leads to
        raise CommandError(f"{folder} holds no MLA model: {one_line(error)}") from None
    text = config.get_text_config()
    return Limits(text.vocab_size, getattr(text, "max_position_embeddings", None))


class Journal:
    """Finished parts in a file, a line each as they come; the first line says of which run.

    Attributes:
        parts: number of a part -> new tokens of each of its prompts.
        workers: which processes computed them.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, restart: bool) -> None:
        self.parts: dict[int, list[list[int]]] = {}
        self.workers: set[str] = set()
        self.path = path
        whole = b"" if restart or not path.exists() else path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]  # the last line may have been cut off
        lines = [json.loads(line) for line in whole.splitlines()]
        if len(lines) < 2:  # no part was finished: nothing to go on from
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return
        other = sorted(name for name in settings if lines[0].get(name) != settings[name])
        if other:
            raise CommandError(
                f"{path} is of a run with another {', '.join(other)}; --force begins again"
            )
        os.truncate(path, len(whole))
        for line in lines[1:]:
            self._take(line)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a part that a worker has sent."""
        line = {"part": int(row["part"]), "worker": row["worker"]}
        line["new_tokens"] = json.loads(row["new_tokens"])
        self._take(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _take(self, line: dict[str, Any]) -> None:
        assert line["part"] not in self.parts, f"part {line['part']} twice"
        self.parts[line["part"]] = line["new_tokens"]
        self.workers.add(line["worker"])


def write_results(path: Path, prompts: Sequence[Prompt], journal: Journal, tokenizer: Any) -> int:
    """Write the whole file or nothing, then drop the journal; the number of new tokens."""
    found = [tokens for part in sorted(journal.parts) for tokens in journal.parts[part]]
    lines = []
    for index, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
        row: dict[str, Any] = {"index": index}
        row["prompt" if isinstance(prompt, str) else "tokens"] = prompt
        row["new_tokens"] = tokens
        if isinstance(prompt, str):
            row["text"] = tokenizer.decode(tokens, skip_special_tokens=True)
        lines.append(json.dumps(row) + "\n")
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    journal.path.unlink()
    return sum(map(len, found))
