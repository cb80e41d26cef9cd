"""A tiny Llama with as many key-value heads as heads, trained on bytes for a few minutes.

Multi-head attention is the case that MLA is made for: its cache is the widest. No such model is
small enough to be fetched here, so one is trained, on the calibration text, and kept in a folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CONTEXT, BATCH = 512, 8
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LEARNING_RATE, WARMUP = 2e-3, 30  # steps
NOTES = "training.json"


def text_bytes(path: Path) -> Tensor:
    """A file as int64 tokens below 256."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()


def byte_windows(path: Path, *, count: int, length: int) -> Tensor:
    """``[count, length]`` from the start of a file; fewer windows where it is shorter."""
    tokens = text_bytes(path)[: count * length]
    return tokens[: len(tokens) // length * length].view(-1, length)


def tiny_mha(
    text: Path, folder: Path, *, minutes: float, progress: Callable[[int, int], None]
) -> Any:
    """The model of ``folder``, trained first where it is not there, or was trained shorter.

    Args:
        text: to train on.
        minutes: of training, on the clock.
        progress: called with (seconds, seconds in all).

    Returns:
        A `LlamaForCausalLM` in eval mode, float32.
    """
    from transformers import LlamaForCausalLM

    notes = folder / NOTES
    if not notes.is_file() or json.loads(notes.read_text())["minutes"] < minutes:
        _train(text, folder, 60 * minutes, progress)
    return LlamaForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def _train(text: Path, folder: Path, seconds: float, progress: Callable[[int, int], None]) -> None:
    """AdamW; the rate falls as a cosine of the time that has passed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    tokens, generator = text_bytes(text), torch.Generator().manual_seed(0)
    start, step, loss, share = time.perf_counter(), 0, torch.tensor(math.nan), 0.0
    while share < 1.0:
        at = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
        window = tokens[at + torch.arange(CONTEXT + 1)]
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            cosine = 0.05 + 0.475 * (1 + math.cos(math.pi * share))
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * cosine
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        passed = time.perf_counter() - start
        share = min(1.0, passed / seconds)
        progress(round(share * seconds), round(seconds))
    model.save_pretrained(folder)
    notes = {"minutes": seconds / 60, "steps": step, "last_loss": loss.item()}
    (folder / NOTES).write_text(json.dumps(notes) + "\n")
