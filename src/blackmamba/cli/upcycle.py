"""`blackmamba upcycle`: a dense Mamba as the beginning of a BlackMamba."""

import argparse

from blackmamba.cli.common import add_tokenizer_argument, check_out, filled, filled_path
from blackmamba.errors import ConfigError

_MLP = "mlp:"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "upcycle",
        help="make a BlackMamba of a dense Mamba, to be trained on",
        description="Copy the layers of a dense Mamba and put layers of experts between them. With "
        "fresh experts the new model computes what the old one did.",
        epilog="Example: blackmamba upcycle state-spaces/mamba-130m --out upcycled, then "
        "blackmamba train RECIPE --from upcycled --out runs/upcycled",
    )
    parser.add_argument(
        "source",
        type=filled,
        metavar="SOURCE",
        help="a dense Mamba: a folder or hub name in the format of state-spaces/mamba or "
        "transformers, or one of ours of mamba layers",
    )
    parser.add_argument(
        "--out", required=True, type=filled_path, metavar="MODEL", help="folder to write"
    )
    parser.add_argument("--experts", type=int, default=8, help="of each new layer (default 8)")
    parser.add_argument(
        "--d-expert",
        type=int,
        default=0,
        metavar="F",
        help="width of an expert; default: that of the MLPs to copy, or 8/3 of the model's",
    )
    parser.add_argument(
        "--every", type=int, default=1, help="Mamba layers before each of experts (default 1)"
    )
    parser.add_argument(
        "--experts-from",
        default="fresh",
        type=filled,
        metavar="fresh|mlp:PATH",
        help="fresh (default): they give 0 at first; mlp:PATH: copies of the trained MLPs of the "
        "model PATH",
    )
    parser.add_argument(
        "--noise",
        type=float,
        help="added to copied experts, in standard deviations of each matrix (default 0.1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    add_tokenizer_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, upcycle, write."""
    from blackmamba.checkpoint import load_as_stored, load_tokenizer, save
    from blackmamba.checkpoint.load import find_folder
    from blackmamba.data import Tokenizer
    from blackmamba.model import upcycle
    from blackmamba.model.size import parameters

    origin = str(args.experts_from)
    if origin != "fresh" and (not origin.startswith(_MLP) or origin == _MLP):
        raise ConfigError(f"--experts-from {origin}: must be fresh or mlp:PATH")
    folder = find_folder(args.source)
    check_out(args.out, args.source, "upcycle")
    dense = load_as_stored(folder)
    donor = None if origin == "fresh" else load_as_stored(find_folder(origin.removeprefix(_MLP)))
    noise = args.noise if args.noise is not None else 0.0 if donor is None else 0.1
    model = upcycle(
        dense,
        n_experts=args.experts,
        d_expert=args.d_expert,
        every=args.every,
        mlps=donor,
        noise=noise,
        seed=args.seed,
    )
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else load_tokenizer(folder)
    save(model, args.out, tokenizer=tokenizer)
    before, after = parameters(dense.config), parameters(model.config)
    n_layers = model.config.n_layers - dense.config.n_layers
    print(
        f"wrote {args.out}: {n_layers} layers of {args.experts} experts of width "
        f"{model.config.d_expert} ({origin}) between {dense.config.n_layers} Mamba layers; "
        f"{after.total:,} parameters, {after.active:,} active per token, instead of "
        f"{before.total:,}"
    )
    if tokenizer is None:
        print("no tokenizer: the source has none; give --tokenizer, or data.tokenizer in training")
    return 0
