"""``python -m mla``: look at the installation, check it, convert a model, generate, demonstrate.

Bad input prints one line ``mla: error: ...`` and exits with status 2; an interrupt exits with 130.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mla.cli import bench, check, compile, convert, demo, evaluate, generate, heal, info, plan
from mla.cli.console import one_line

COMMANDS = {
    "info": (info, "versions, devices, which implementation runs where, presets"),
    "check": (check, "hold every form of the layer on this machine against the oracle"),
    "compile": (compile, "compile the Triton kernels for every target, without a GPU"),
    "convert": (convert, "turn the attention of a Llama-type model into MLA"),
    "heal": (heal, "train the attention of a converted model for some minutes"),
    "evaluate": (evaluate, "perplexity of a model on a text, with its confidence interval"),
    "generate": (generate, "continue a prompt with a converted or an MLA model"),
    "plan": (plan, "predict cache, time and cost of decoding on one device or many"),
    "bench": (bench, "time this machine, or this tree against an older version"),
    "demo": (demo, "convert a real model and show what that saves and costs"),
}


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mla: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """One subparser for each command."""
    parser = Parser(prog="python -m mla", description="Multi-head latent attention.")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 for success, 1 for a failed check, 2 for bad input, 130 for an interrupt.
    """
    options = build_parser().parse_args(arguments)
    try:
        status = COMMANDS[options.command][0].run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\nmla: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if options.traceback:
            raise
        print(f"mla: error: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
