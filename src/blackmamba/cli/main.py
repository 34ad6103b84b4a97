"""The command line: `blackmamba COMMAND`. Each command has a file of its own in this folder.

A mistake of the user's prints one line and exits with status 2, as does memory that does not
suffice; an interrupt exits with 130, and where the time that was given is over, with 124, as
`timeout` does.
"""

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from blackmamba.cli import (
    convert,
    data,
    doctor,
    eval,
    generate,
    info,
    plan,
    quantize,
    reproduce,
    runs,
    train,
    tune,
    upcycle,
)
from blackmamba.errors import BlackMambaError, OutOfTimeError, PeerError
from blackmamba.version import __version__

_COMMANDS = (
    data, plan, train, runs, generate, eval, convert, quantize, upcycle, info, reproduce, tune,
    doctor,
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the list of all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    parser = _Parser(
        prog="blackmamba",
        description="Language models of Mamba state-space layers and routed experts.",
        epilog="Begin with `blackmamba train tiny --out runs/tiny`, then "
        "`blackmamba generate runs/tiny --prompt 'In the beginning'`.",
    )
    parser.add_argument("--version", action="version", version=f"blackmamba {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log progress in detail")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status.

    Args:
        arguments: the words after the program's name; None: those of this process.
    """
    args = build_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    try:
        return int(args.run(args) or 0)
    except PeerError:  # the other process says why
        return 2
    except OutOfTimeError as error:
        print(f"blackmamba: {error}", file=sys.stderr)
        return 124
    except BlackMambaError as error:
        print(f"blackmamba: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"blackmamba: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"blackmamba: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        wanted = _lacking_memory(error)
        if wanted is None:
            raise
        print(
            f"blackmamba: error: out of memory{wanted}: a smaller model, batch or length, or a "
            "narrower dtype, needs less",
            file=sys.stderr,
        )
        return 2


def _lacking_memory(error: Exception) -> str | None:
    """How much was asked for where memory ran out, as far as is known; None: another mistake."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):  # a GPU's
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \wi?B)", text)
        return f" on the GPU, {wanted[1]} more asked for" if wanted else " on the GPU"
    if "Storage size calculation overflowed" in text:  # more than any machine has
        return ""
    if "DefaultCPUAllocator" in text:
        wanted = re.search(r"allocate (\d+) bytes", text)
        return f", {int(wanted[1]) / 1e9:,.1f} GB more asked for" if wanted else ""
    return "" if isinstance(error, MemoryError) else None


def entry_point() -> None:
    """What the installed `blackmamba` program calls."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may be of an encoding that lacks a character
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
