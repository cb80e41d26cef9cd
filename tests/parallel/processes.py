"""Run a function in several gloo processes of this machine and collect what each returns.

    results = run_ranks(fn, 2, *args)       # fn(*args) in every process, results in order of rank

Functions are found by name: keep them, and what they import, in modules that load quickly.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

# One process imports torch, the ranks are forked from it: 0.15 s for a world of 4 instead of 5 s.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch.distributed.tensor.parallel", "torch.distributed.fsdp", "mla"]
)


class RanksFailed(RuntimeError):
    """At least one rank did not return.

    Attributes:
        outcomes: for each rank None where it returned, else its traceback, or that it was killed.
        seconds: until the last rank had ended.
    """

    def __init__(self, outcomes: list[str | None], seconds: float) -> None:
        lines = [f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if text is not None]
        super().__init__("\n".join([f"{len(lines)} of {len(outcomes)} ranks failed", *lines]))
        self.outcomes, self.seconds = outcomes, seconds


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60
) -> list[Any]:
    """``fn(*args)`` in ``world_size`` processes with one thread each and a gloo group of all.

    A rank that raises ends at once, which breaks the connections of the others; they are left to
    notice it themselves, so that a test sees whether they do. Whoever runs at the end of
    ``timeout`` is killed.

    Args:
        fn: a function of a module that can be imported; its result is pickled.
        world_size: number of processes.
        args: pickled, the same for every rank.
        timeout: seconds for everything, and for one collective.

    Returns:
        What each rank returned, in order of rank.

    Raises:
        RanksFailed: a rank raised, died, or was still running at the end.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = (fn, world_size, folder, timeout, args)
        ranks = [
            _CONTEXT.Process(target=_run_rank, args=(rank, *options), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        killed = _join(ranks, start + timeout)
        outcomes = [
            f"killed, it was running after {timeout} s"
            if rank in killed
            else _outcome(folder, rank, process.exitcode)
            for rank, process in enumerate(ranks)
        ]
        if any(outcome is not None for outcome in outcomes):
            raise RanksFailed(outcomes, time.monotonic() - start)
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(world_size)]


def _join(ranks: Sequence[Any], deadline: float) -> set[int]:
    """Wait for all until the deadline; the ranks that had to be killed."""
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(running), timeout=left):
            del running[sentinel]
    for rank in running.values():
        ranks[rank].kill()
    for process in ranks:
        process.join()
    return set(running.values())


def _result(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.pt"


def _error(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.txt"


def _outcome(folder: Path, rank: int, exit_code: int | None) -> str | None:
    if _error(folder, rank).exists():
        return _error(folder, rank).read_text("utf-8")
    return None if _result(folder, rank).exists() else f"died with exit code {exit_code}"


def _run_rank(
    rank: int,
    fn: Callable[..., Any],
    world_size: int,
    folder: Path,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of this machine may lead nowhere
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = fn(*args)
        dist.barrier()  # nobody leaves while another still talks to it
        torch.save(result, _result(folder, rank))
        dist.destroy_process_group()
    except BaseException:
        _error(folder, rank).write_text(traceback.format_exc(), "utf-8")
        os._exit(1)  # no clean-up: it would wait for the others
