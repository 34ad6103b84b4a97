"""`blackmamba convert`: between our model folders and the authors' released format."""

import argparse
from pathlib import Path

from blackmamba.cli.common import check_out, filled
from blackmamba.config import to_mapping


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "convert",
        help="between our model folders and the released format",
        description="Read a model in either format, told apart by content, and write it in one.",
    )
    parser.add_argument("source", type=filled, metavar="MODEL", help="a model folder or a hub name")
    parser.add_argument("destination", type=filled, metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--to",
        choices=("native", "released"),
        default="native",
        help="native (default): config.json + model.safetensors; released: the authors' layout",
    )
    parser.add_argument(
        "--adapter",
        type=filled,
        metavar="DIR",
        help="add this adapter of the model to its weights",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from blackmamba.checkpoint import convert, load_config
    from blackmamba.model.size import parameters

    check_out(Path(args.destination), args.source, "convert")
    convert(args.source, args.destination, to=args.to, adapter=args.adapter)
    config = load_config(args.destination)
    activation = to_mapping(config)["activation"]
    print(
        f"wrote {args.destination} ({args.to}): {parameters(config).total:,} parameters, "
        f"{config.n_layers} layers, expert activation {activation}"
    )
    return 0
