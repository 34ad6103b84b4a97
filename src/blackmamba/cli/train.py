"""`blackmamba train`: from text to a model, by a recipe."""

import argparse

from blackmamba.cli.common import filled, filled_path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "train",
        help="train a model from text",
        description="Train a model as a recipe says. Everything about the run goes into one "
        "folder: data, checkpoints, metrics, the final model and a picture of the loss.",
        epilog="Example: blackmamba train demo --text my.txt --set train.lr=2e-3 --out runs/mine",
    )
    parser.add_argument(
        "recipe",
        type=filled,
        metavar="RECIPE",
        help="demo, tiny, another name in docs/recipes.md, or a YAML file",
    )
    parser.add_argument(
        "--out", required=True, type=filled_path, metavar="RUN", help="the run's folder"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value of the recipe, such as train.lr=3e-4; repeatable",
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        type=filled,
        metavar="PATH",
        help="train on this file or folder instead of the recipe's text; repeatable",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=filled,
        metavar="MODEL",
        help="start with the weights and tokenizer of this model, run folder or hub name "
        "(train.init)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in RUN"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train with a progress bar and print the result."""
    import json

    from rich.console import Console

    from blackmamba.errors import BlackMambaError, PeerError
    from blackmamba.model.size import parameters
    from blackmamba.train import RichProgress, load_recipe, trained_parameters
    from blackmamba.train import run as run_training
    from blackmamba.train.parallel.ranks import is_first

    speaks = is_first()  # of the processes that torchrun starts
    overrides = list(args.set)
    if args.text:
        overrides.append(f"data.text={json.dumps(args.text)}")
    if args.source:
        overrides.append(f"train.init={json.dumps(args.source)}")
    try:
        config = load_recipe(args.recipe, overrides, begun=args.out if args.resume else None)
    except BlackMambaError as error:
        if speaks:
            raise
        raise PeerError(str(error)) from None
    count, settings = parameters(config.model), config.train
    trained = trained_parameters(config)
    if speaks:
        print(
            f"{count.total:,} parameters, {count.active:,} active per token"
            f"{'' if trained == count.total else f', {trained:,} trained'}; "
            f"{settings.steps:,} steps of {settings.batch_size * settings.seq_len:,} tokens"
        )
    console = Console(quiet=not speaks)
    with RichProgress(console) as progress:
        result = run_training(config, args.out, resume=args.resume, progress=progress)
    if not speaks:
        return 0
    print(result.report())
    if (args.out / "loss.png").exists():
        print(f"loss curve: {args.out / 'loss.png'}")
    return 0
