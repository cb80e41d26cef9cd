"""Continue a prompt, text as it comes, with a converted model or an MLA model of transformers.

The text goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mla.checks import UnsupportedError
from mla.cli.console import DTYPES, CommandError, device_of, quiet
from mla.cli.models import go_offline, is_converted, load_model, load_tokenizer, read_config
from mla.cli.options import codec, positive, temperature
from mla.codec import Codec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="folder of the model"
    )
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--chat", action="store_true", help="put it into the model's chat template")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=100, metavar="N", help="default: 100"
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        help="0 takes the likeliest token, more draws at random (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--codec", type=codec, metavar="NAME", help="cache rows as fp8, int8 or int4"
    )
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")


def run(options: argparse.Namespace) -> int:
    go_offline()
    device = device_of(options.device)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    model = load_any(options.model, device=device, dtype=dtype, codec=options.codec)
    tokenizer = load_tokenizer(options.model)
    inputs = encode(tokenizer, options.prompt, is_chat=options.chat).to(device)
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    new = stream(model, tokenizer, inputs, options.max_new_tokens, options.temperature)
    seconds = time.perf_counter() - start
    print(
        f"generate: {new} tokens in {seconds:.1f} s, {new / seconds:.1f} a second", file=sys.stderr
    )
    return 0


def load_any(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    codec: Codec | None = None,
) -> Any:
    """A model that decodes from its latents, cached by ``codec``: converted, or MLA and replaced.

    Raises:
        CommandError: the folder holds neither.
    """
    if is_converted(read_config(folder)):
        from mla.integrations.converted import load_converted

        with quiet():
            model = load_converted(folder, dtype=dtype, device=device).model
    else:
        model = load_model(folder, device=device, dtype=dtype)
    from mla.integrations.transformers import replace_attention

    try:
        report = replace_attention(model, codec=codec)
    except UnsupportedError as error:
        raise CommandError(
            f"{error}; python -m mla convert makes one of a Llama-type model"
        ) from None
    if report.left:
        print(f"mla: {str(report).splitlines()[1]}", file=sys.stderr)
    return model


def encode(tokenizer: Any, prompt: str, *, is_chat: bool) -> Any:
    """Ids and mask of one prompt."""
    if not prompt:
        raise CommandError("--prompt is empty, expected text to continue")
    if not is_chat:
        return tokenizer(prompt, return_tensors="pt")
    if not tokenizer.chat_template:
        raise CommandError("--chat needs a chat template, and the tokenizer of this model has none")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )


def stream(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int, temperature: float) -> int:
    """Print the continuation as it comes; returns the number of new tokens."""
    from transformers import TextStreamer

    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    with quiet():
        result = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **(sampling or {"do_sample": False}),
        )
    return int(result.shape[1] - inputs["input_ids"].shape[1])
