"""Hold every form of the layer on this machine against the oracle; name the convention that is off.

The oracle is float64 on the CPU; a comparison may lose twice what plain PyTorch loses in the dtype
under test. One that fails is tried again under the known wrong conventions, and those that
explain it are named. Every implementation that can run here is checked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any, cast

import torch

from mla.checks import UnsupportedError
from mla.cli.check_compare import Answer, Question, judge
from mla.cli.check_conventions import conventions_of, wrong_conventions
from mla.cli.check_layer import layer_stage
from mla.cli.check_ops import append_stage, decode_stage, gather_stage, merge_stage, prefill_stage
from mla.cli.check_oracle import Oracle
from mla.cli.check_setup import Setup, config_of
from mla.cli.check_stages import absorb_stage, norm_stage, rope_stage, scale_stage
from mla.cli.console import DTYPES, device_of, table
from mla.config import MLAConfig
from mla.ops.select import TABLE, Impl, OpName, supported_impls
from mla.presets import PRESETS

PLAIN_STAGES = (rope_stage, norm_stage, scale_stage, absorb_stage)
OP_STAGES: tuple[tuple[OpName, Any], ...] = (
    ("mla_append", append_stage),
    ("mla_gather", gather_stage),
    ("mla_decode", decode_stage),
    ("mla_prefill", prefill_stage),
    ("merge_partials", merge_stage),
)
# The layer needs every op: what "auto" takes for each, and the one implementation that has all.
LAYER_IMPLS: tuple[Impl, ...] = ("auto", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, .. (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="sizes and conventions of a published model, with its D and Q made smaller; "
        "default: a small layer with every convention in it",
    )
    names = [row.name for row in TABLE]
    parser.add_argument("--impl", choices=names, help="check this one (default: all that can run)")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    config = config_of(options.preset)
    dtype = DTYPES[options.dtype]
    setup = Setup(config, device_of(options.device, dtype), dtype, options.seed)
    answers = conformance(setup, options.impl)
    failed = [answer for answer in answers if not answer.passed]
    if options.json:
        print(json.dumps(_as_dict(setup, answers), indent=2))
    else:
        print(_heading(setup, options.preset))
        print(table(("stage", "case", "error", "allowed", "result"), _rows(answers)))
        print(_conclusion(setup, answers, failed))
    return 1 if failed else 0


def conformance(setup: Setup, impl: str | None = None) -> list[Answer]:
    """Ask every question of every stage.

    Args:
        setup: the layer, device and dtype.
        impl: one implementation; None: all that can run.

    Raises:
        UnsupportedError: ``impl`` can run none of the ops here.
    """
    config, device, dtype = setup.config, setup.device, setup.dtype
    cpu = torch.device("cpu")

    def oracle(conventions: Any, where: torch.device, precision: torch.dtype) -> Oracle:
        return Oracle(config, conventions, setup.weights, device=where, dtype=precision)

    right = conventions_of(config)
    truth, plain = oracle(right, cpu, torch.float64), oracle(right, device, dtype)
    mistakes = {
        words: oracle(wrong, cpu, torch.float64) for words, wrong in wrong_conventions(config)
    }
    answers: list[Answer] = []
    suspects: dict[str, None] = {}
    for question in _questions(setup, impl):
        answers.append(judge(question, truth, plain, mistakes, suspects))
        suspects.update(dict.fromkeys(answers[-1].explanations))
    return answers


def _questions(setup: Setup, impl: str | None) -> Iterator[Question]:
    for stage in PLAIN_STAGES:
        yield from stage(setup)
    able = {op: _able(op, setup, impl) for op, _ in OP_STAGES}
    if not any(able.values()):
        raise UnsupportedError(
            f"check: impl has value {impl!r}, which runs no op on {_place(setup)}; "
            "python -m mla info says why"
        )
    for op, op_stage in OP_STAGES:
        for name in able[op]:
            yield from _named(op_stage(setup, name), name)
    for name in LAYER_IMPLS:
        if impl in (None, name):
            yield from _named(layer_stage(setup, name), name)


def _able(op: OpName, setup: Setup, impl: str | None) -> list[Impl]:
    """The implementations to check for this op."""
    rows = supported_impls(op, device=setup.device, dtype=setup.dtype)
    able = [cast(Impl, name) for name, reason in rows if reason is None]
    return [name for name in able if impl in (None, name)]


def _named(questions: Iterator[Question], impl: str) -> Iterator[Question]:
    return (question._replace(stage=f"{question.stage}[{impl}]") for question in questions)


def _heading(setup: Setup, preset: str | None) -> str:
    c: MLAConfig = setup.config
    sizes = {
        "D": c.hidden_size,
        "H": c.num_attention_heads,
        "Q": c.q_lora_rank,
        "C": c.kv_lora_rank,
        "N": c.qk_nope_head_dim,
        "R": c.qk_rope_head_dim,
        "V": c.v_head_dim,
    }
    text = " ".join(f"{letter}={size}" for letter, size in sizes.items() if size is not None)
    return f"check: {_place(setup)}, {preset or 'a small layer'}: {text}, seed {setup.seed}"


def _place(setup: Setup) -> str:
    return f"{setup.device} in {str(setup.dtype).removeprefix('torch.')}"


def _rows(answers: list[Answer]) -> list[tuple[str, ...]]:
    return [
        (
            answer.stage,
            answer.case,
            f"{answer.error:.1e}",
            f"{answer.budget:.1e}",
            "ok" if answer.passed else "FAILED",
        )
        for answer in answers
    ]


def _conclusion(setup: Setup, answers: list[Answer], failed: list[Answer]) -> str:
    """What is wrong, the first stage in data-flow order first, and one last line."""
    if not failed:
        return f"check: passed, {len(answers)} comparisons on {_place(setup)}"
    cases: dict[tuple[str, str], list[Answer]] = {}
    for answer in failed:
        found = answer.explanations or [answer.case, answer.problem]
        cases.setdefault((answer.stage, " ".join(found)), []).append(answer)
    lines = []
    for (stage, _), alike in cases.items():
        first, count = alike[0], len(alike)
        others = f" and {count - 1} more" if count > 1 else ""
        lines.append(f"{stage}: {first.case}{others}: {first.sentence()}")
    stages = ", ".join(dict.fromkeys(answer.stage for answer in failed))
    count_text = f"{len(failed)} of {len(answers)} comparisons"
    return "\n".join([*lines, f"check: failed on {_place(setup)}: {count_text}, in {stages}"])


def _as_dict(setup: Setup, answers: list[Answer]) -> dict[str, Any]:
    return {
        "passed": all(answer.passed for answer in answers),
        "device": str(setup.device),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "seed": setup.seed,
        "config": setup.config.to_dict(),
        "comparisons": [
            {
                "stage": answer.stage,
                "case": answer.case,
                "passed": answer.passed,
                "error": answer.error,
                "allowed": answer.budget,
                "problem": answer.problem,
                "matches_if": answer.explanations,
            }
            for answer in answers
        ],
    }
