"""The command line: `blackmamba COMMAND`. Each command has a file of its own in this folder.

A mistake of the user's prints one line and exits with status 2; an interrupt exits with 130,
and where the time that was given is over, with 124, as `timeout` does.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

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


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    parser = argparse.ArgumentParser(
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


def entry_point() -> None:
    """What the installed `blackmamba` program calls."""
    sys.exit(main())
