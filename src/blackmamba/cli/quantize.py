"""`blackmamba quantize`: a model with its large matrices in 8 or 4 bits, and what that costs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from blackmamba.cli.common import (
    add_tokenizer_argument,
    check_out,
    filled,
    filled_path,
    load_tokenizer,
    read_text,
)
from blackmamba.errors import ConfigError

if TYPE_CHECKING:
    from blackmamba.data import Tokenizer
    from blackmamba.model import BlackMamba


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "quantize",
        help="write a model with its weights in 8 or 4 bits, and measure what that costs",
        description="Quantise a model's weights, print its perplexity before and after, and write "
        "it as a model folder that generate and the other commands take. The text to measure on "
        "is --text, or the validation text of the run that MODEL is in; without one nothing is "
        "measured.",
        epilog="Example: blackmamba quantize runs/demo --bits 4 --what all --out demo-int4",
    )
    parser.add_argument(
        "model", type=filled, metavar="MODEL", help="a model folder, a run folder or a hub name"
    )
    parser.add_argument("--bits", type=int, choices=(8, 4), required=True, help="of each weight")
    parser.add_argument(
        "--what",
        choices=("experts", "all"),
        default="experts",
        help="experts (default): their matrices alone; all: every large matrix",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128),
        help="weights that share a scale; default: 64 for 8 bits, 32 for 4",
    )
    parser.add_argument(
        "--out", required=True, type=filled_path, metavar="DIR", help="the folder to write"
    )
    parser.add_argument(
        "--text", type=filled, metavar="FILE", help="UTF-8 text to measure perplexity on"
    )
    parser.add_argument("--max-tokens", type=int, default=4096, help="read no more (default 4096)")
    add_tokenizer_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantise, measure, write."""
    from blackmamba.checkpoint import load_as_stored, save
    from blackmamba.checkpoint import load_tokenizer as own_tokenizer
    from blackmamba.checkpoint.load import find_folder
    from blackmamba.model import quantize

    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens {args.max_tokens}: must be at least 1")
    folder = find_folder(args.model)
    check_out(args.out, args.model, "quantise")
    text = _text(args.text, Path(args.model), folder)
    model = load_as_stored(folder)
    made = quantize(model, args.bits, what=args.what, group_size=args.group_size)
    if text is None:
        print("perplexity not measured: MODEL is in no run with validation text; give --text FILE")
    else:
        tokenizer = load_tokenizer(args)
        print(f"perplexity on {text}, at most {args.max_tokens:,} tokens:")
        before = _perplexity(model, tokenizer, text, args.max_tokens)
        print(f"  before  {before:.4f}")
        after = _perplexity(made, tokenizer, text, args.max_tokens)
        print(f"  after   {after:.4f} ({100 * (after / before - 1):+.2f} %)")
    save(made, args.out, tokenizer=own_tokenizer(folder))
    old, new = (sum(t.nbytes for t in m.state_dict().values()) for m in (model, made))
    print(
        f"wrote {args.out}: {args.what} in {args.bits} bits, "
        f"{new / 1e6:,.1f} MB of weights instead of {old / 1e6:,.1f}"
    )
    return 0


def _text(given: str | None, source: Path, folder: Path) -> Path | None:
    """The text to measure on: as given, or held out by the run that the model is of.

    A run folder has model/, checkpoints/step-N/ and data/validation.txt; `source` may be any of the
    first three.
    """
    if given is not None:
        return Path(given)
    for run in (source, folder.parent, folder.parent.parent):
        if (run / "data" / "validation.txt").is_file() and (run / "recipe.yaml").is_file():
            return run / "data" / "validation.txt"
    return None


def _perplexity(model: "BlackMamba", tokenizer: "Tokenizer", text: Path, max_tokens: int) -> float:
    from blackmamba.evaluate import perplexity

    return perplexity(model, tokenizer, read_text(str(text)), max_tokens=max_tokens).perplexity
