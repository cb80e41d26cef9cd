"""Continue every prompt of a file with one model on many workers of a Ray cluster.

    python examples/ray_generate.py --model DIR --prompts prompts.txt --out results.jsonl
    python examples/ray_generate.py --address auto ...     on the cluster this machine belongs to

The model is a folder of `python -m mla convert` or an MLA model of transformers; each worker, an
actor of Ray Data, loads it once. Prompts are the lines of a .txt file, or of a .jsonl file with
{"prompt": "text"} or {"tokens": [1, 2]}; empty lines are skipped. Decoding is greedy.

Prompts go to workers in parts of --batch-size. A worker that dies is started again and its part
repeated. Finished parts are kept in OUT.unfinished, so the same command goes on where a run was
cut off. At the end OUT is written at once, one line a prompt in the order of the file:
{"index": 0, "prompt": ..., "new_tokens": [...], "text": ...}, an end token included.
kubernetes/README.md says how the same script runs on Kubernetes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from batch_files import Journal, check_model, encode, read_prompts, write_results

from mla.cli.console import DTYPES, CommandError, device_of, one_line, quiet
from mla.cli.generate import load_any
from mla.cli.models import go_offline, load_tokenizer
from mla.cli.options import codec, positive
from mla.codec import Codec

RETRIES = 3  # of one part: one that kills its worker each time must end the run
LOCAL_OBJECT_STORE = 256 * 2**20  # bytes, for token ids; more is spilled to disk
SECONDS_BETWEEN_REPORTS = 2.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker does with each part."""

    model: Path
    max_new_tokens: int
    codec: Codec | None
    dtype: str | None
    device: str
    num_threads: int


class Generator:
    """A worker: the model, and a call for each part. Ray keeps it in a process of its own."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """``{"part": n, "prompts": [[id, ...], ...]}`` to its new tokens, prompt by prompt.

        What is raised here is part of the result: Ray would wrap it in pages of its own.
        """
        found: dict[str, Any] = {"part": row["part"], "error": "", "new_tokens": "[]"}
        found["worker"] = f"{socket.gethostname()}:{os.getpid()}"
        try:
            self._load()
            prompts = json.loads(row["prompts"])
            new_tokens = generate_part(self.model, prompts, self.task.max_new_tokens)
            found["new_tokens"] = json.dumps(new_tokens)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {one_line(error)}"
        return found

    def _load(self) -> None:
        """With the first part, so that a process that dies while it loads has used up a try."""
        if self.model is not None:
            return
        go_offline()
        task = self.task
        torch.set_num_threads(task.num_threads)
        dtype = None if task.dtype is None else DTYPES[task.dtype]
        device = device_of(task.device)
        self.model = load_any(task.model, device=device, dtype=dtype, codec=task.codec)


@torch.inference_mode()
def generate_part(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The likeliest continuation of each prompt, up to and with its end token; padded left."""
    settings = model.generation_config
    ends = settings.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    pad = next((token for token in (settings.pad_token_id, *ends) if token is not None), 0)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with quiet():
        found = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
    return [up_to_end(row, ends) for row in found[:, width:].tolist()]


def up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """``tokens`` without what follows the first of ``ends``."""
    last = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


@contextmanager
def cluster(options: argparse.Namespace) -> Iterator[None]:
    """Join the cluster at --address, or start one on this machine, for as long as this lasts.

    Raises:
        CommandError: Ray is missing, there is no such cluster, or Ray has given up.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise CommandError(f"{one_line(error)}; pip install 'ray[data]' brings it") from None
    where: dict[str, Any] = {"address": options.address}
    if options.address is None:
        where = {
            "address": "local",
            "num_cpus": options.workers * options.cpus,
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises plain ones
        what = "Ray did not start" if options.address is None else f"--address {options.address}"
        raise CommandError(f"{what}: {one_line(error)}") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends a run is said below
    ray.data.DataContext.get_current().enable_progress_bars = False  # the reports are ours
    has = ray.cluster_resources()
    print(
        f"ray_generate: up to {options.workers} workers of {options.cpus} cores; Ray has "
        f"{has.get('CPU', 0):.0f} cores and {has.get('GPU', 0):.0f} GPUs",
        file=sys.stderr,
    )
    try:
        yield
    except ray.exceptions.RayError as error:
        reason = one_line(error)[:200]
        raise CommandError(f"Ray has given up, finished parts are kept: {reason}") from error
    finally:
        ray.shutdown()


def run_parts(
    task: Task, parts: dict[int, list[list[int]]], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Rows of `Generator`, one for each part, in the order in which they are finished.

    Raises:
        CommandError: a worker could not compute its part.
    """
    import ray.data

    # A part is a row and a block: neither its prompts nor its padding depend on who computes it.
    rows = [{"part": part, "prompts": json.dumps(ids)} for part, ids in parts.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.64 is to take away max_task_retries
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Generator,
            fn_constructor_args=(task,),
            compute=ray.data.ActorPoolStrategy(size=min(options.workers, len(rows))),
            num_cpus=options.cpus,
            num_gpus=1 if task.device.startswith("cuda") else None,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
    for row in dataset.iter_rows():
        if row["error"]:
            raise CommandError(f"part {row['part']} on worker {row['worker']}: {row['error']}")
        yield row


class Report:
    """Lines on stderr, not more often than every few seconds."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.new_tokens = total, done, 0
        self.start = time.monotonic()
        self.due = self.start

    def add(self, new_tokens: list[list[int]]) -> None:
        self.done += len(new_tokens)
        self.new_tokens += sum(map(len, new_tokens))
        now = time.monotonic()
        if now < self.due and self.done < self.total:
            return
        self.due = now + SECONDS_BETWEEN_REPORTS
        speed = self.new_tokens / (now - self.start)
        print(
            f"ray_generate: {self.done} of {self.total} prompts, {speed:.0f} tokens a second",
            file=sys.stderr,
            flush=True,
        )


def run(options: argparse.Namespace) -> str:
    """Generate, write, and say what was done."""
    if options.out.exists() and not options.force:
        raise CommandError(f"--out has the file {options.out}, which exists; --force replaces it")
    if not options.out.parent.is_dir():
        raise CommandError(f"--out is in the folder {options.out.parent}, which does not exist")
    go_offline()
    limits = check_model(options.model)
    prompts = read_prompts(options.prompts)
    has_text = any(isinstance(prompt, str) for prompt in prompts)
    tokenizer = load_tokenizer(options.model) if has_text else None
    ids = encode(prompts, tokenizer, limits, options.max_new_tokens)
    size = options.batch_size
    parts = {at // size: ids[at : at + size] for at in range(0, len(ids), size)}
    journal = Journal(
        options.out.with_name(options.out.name + ".unfinished"),
        settings(options),
        restart=options.force,
    )
    missing = {part: rows for part, rows in parts.items() if part not in journal.parts}
    report = Report(len(ids), len(ids) - sum(map(len, missing.values())))
    if journal.parts:
        print(f"ray_generate: {report.done} prompts were finished before", file=sys.stderr)
    if missing:
        task = Task(
            model=options.model.resolve(),
            max_new_tokens=options.max_new_tokens,
            codec=options.codec,
            dtype=options.dtype,
            device=options.device,
            num_threads=options.cpus,
        )
        with cluster(options):
            for row in run_parts(task, missing, options):
                journal.add(row)
                report.add(journal.parts[int(row["part"])])
    seconds = time.monotonic() - report.start
    new_tokens = write_results(options.out, prompts, journal, tokenizer)
    return (
        f"{len(prompts)} prompts, {new_tokens} new tokens in {options.out}; {seconds:.1f} s, "
        f"{len(journal.workers)} worker processes"
    )


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a run must share with the one that it continues."""
    return {
        "model": str(options.model.resolve()),
        "prompts": hashlib.sha256(options.prompts.read_bytes()).hexdigest(),
        "batch-size": options.batch_size,
        "max-new-tokens": options.max_new_tokens,
        "codec": str(options.codec),
        "dtype": options.dtype,
    }


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ray_generate: failed: {message}; see --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="seen by every worker")
    add("--prompts", type=Path, required=True, metavar="FILE", help=".txt or .jsonl")
    add("--out", type=Path, required=True, metavar="FILE", help="results as .jsonl")
    add("--workers", type=positive, default=2, metavar="N", help="default: 2")
    add("--batch-size", type=positive, default=8, metavar="N", help="prompts (default: 8)")
    add("--max-new-tokens", type=positive, default=32, metavar="N", help="default: 32")
    add("--codec", type=codec, metavar="NAME", help="cache rows as fp8, int8 or int4")
    add("--dtype", choices=DTYPES, help="default: as stored")
    add("--device", default="cpu", help="cuda takes one device a worker (default: cpu)")
    add("--cpus", type=positive, default=1, metavar="N", help="cores of a worker (default: 1)")
    add("--address", help="of a Ray cluster, auto: this machine's (default: start one here)")
    add("--force", action="store_true", help="replace --out, forget an unfinished run")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 for success, 1 for bad input or a failed run, 2 for bad arguments."""
    options = build_parser().parse_args(arguments)
    try:
        summary = run(options)
    except (ValueError, OSError) as error:
        print(f"ray_generate: failed: {one_line(error)}", file=sys.stderr)
        return 1
    print(f"ray_generate: {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
