"""`blackmamba runs`: several training runs side by side."""

import argparse

from blackmamba.cli.common import filled_path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "runs",
        help="compare training runs: losses, speed, settings",
        description="Print what each run reached and how fast, and the settings in which the runs "
        "differ; draw their losses into one picture. Runs that still go on count as far as they "
        "are.",
        epilog="Example: blackmamba runs runs/adamw runs/muon --png compared.png",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=filled_path, help="a run's folder")
    parser.add_argument(
        "--png", type=filled_path, metavar="FILE", help="draw the losses into this file"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, print, draw."""
    from rich.console import Console
    from rich.table import Table

    from blackmamba.train import differing_settings, draw_comparison, read_runs

    records = read_runs(args.runs)
    table = Table("run", title=None)
    for heading in ("steps", "tokens", "time", "tokens/s", "training", "validation", "at step",
                    "bits/byte", "skipped"):  # fmt: skip
        table.add_column(heading, justify="right")
    for record in records:
        last, best = record.rows[-1], record.best
        minutes, seconds = divmod(round(last["seconds"]), 60)
        table.add_row(
            record.name,
            f"{last['step']:,}",
            f"{last['tokens']:,}",
            f"{minutes}:{seconds:02}",
            f"{record.tokens_per_s:,.0f}",
            "-" if record.loss is None else f"{record.loss:.3f}",
            *(("-",) * 3 if best is None else (f"{best[1]:.3f}", f"{best[0]:,}", f"{best[2]:.3f}")),
            str(record.skipped),
        )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    print("training: mean loss of the last 50 steps; validation: the best; both in nats per token")
    if differing := differing_settings(records):
        settings = Table("setting", *(record.name for record in records))
        for key, values in differing.items():
            settings.add_row(key, *values)
        console.print(settings)
    if args.png is not None and draw_comparison(records, args.png):
        print(f"losses: {args.png}")
    return 0
