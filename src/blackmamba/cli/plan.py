"""`blackmamba plan`: what a run would take on many GPUs, before any is asked for."""

import argparse
import json
from typing import Any

from blackmamba.cli.common import filled
from blackmamba.errors import ConfigError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    from blackmamba.analyse.machines import MACHINES

    parser = commands.add_parser(
        "plan",
        help="memory, traffic and time of a step on many GPUs, by formula",
        description="Print what each GPU would hold, send and compute in a step of a recipe, and "
        "the tokens a second of all. Runs and builds nothing; docs/scaling.md has the formulas, "
        "their assumptions, and how near they are to what was measured.",
    )
    parser.add_argument(
        "recipe", type=filled, metavar="RECIPE", help="a recipe's name or a YAML file"
    )
    parser.add_argument("--gpus", type=int, default=1, help="how many GPUs (default 1)")
    parser.add_argument("--nodes", type=int, help="on how many machines (default: full ones)")
    parser.add_argument("--gpu", choices=sorted(MACHINES), default="h100", help="default: h100")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe's value"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compute and print."""
    from blackmamba.analyse.machines import MACHINES
    from blackmamba.analyse.scaling import Grid, plan
    from blackmamba.model.size import parameters
    from blackmamba.train import load_recipe

    machine = MACHINES[args.gpu]
    if args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: must be at least 1")
    nodes = -(-args.gpus // machine.node_gpus) if args.nodes is None else args.nodes
    if nodes < 1 or args.gpus % nodes:
        raise ConfigError(f"--nodes {nodes}: must be at least 1 and divide --gpus {args.gpus}")
    config = load_recipe(args.recipe, args.set)
    grid = Grid.of(config, args.gpus, args.gpus // nodes)
    found = plan(config.model, config.train, grid, machine)
    best, worst = found.step_s
    facts: dict[str, Any] = {
        "recipe": args.recipe,
        "parameters": parameters(config.model).total,
        "gpus": args.gpus,
        "nodes": nodes,
        "gpu": machine.name,
        "shards": grid.shards,
        "experts_over": grid.experts,
        "sequence_over": grid.sequence,
        "tokens_per_step": found.tokens,
        "micro_batch_tokens": found.micro_tokens,
        "memory_bytes": found.memory,
        "gpu_memory_bytes": machine.memory_bytes,
        "traffic": [
            {
                "what": t.what,
                "sent_bytes": t.sent_bytes,
                "ranks": t.group,
                "seconds": t.seconds(machine, grid),
                "beside_arithmetic": t.overlaps,
            }
            for t in found.traffic
        ],
        "compute_seconds": found.seconds,
        "step_seconds": {"all_hidden": best, "nothing_hidden": worst},
        "tokens_per_second": {"most": found.tokens / best, "least": found.tokens / worst},
        "utilisation": {"most": found.utilisation(best), "least": found.utilisation(worst)},
    }
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)
    return 0


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            made.add_column(column, justify="left" if i == 0 else "right")
        return made

    console.print(
        f"{facts['recipe']}: {facts['parameters']:,} parameters on {facts['gpus']} {facts['gpu']} "
        f"in {facts['nodes']} nodes; a copy on {facts['shards']}, experts over "
        f"{facts['experts_over']}, rows over {facts['sequence_over']}"
    )
    console.print(
        f"{facts['tokens_per_step']:,} tokens a step; a GPU reads "
        f"{facts['micro_batch_tokens']:,} at once"
    )
    memory = table("memory of a GPU", "part", "GB")
    for what, size in facts["memory_bytes"].items():
        memory.add_row(what, f"{size / 1e9:.2f}")
    total, room = sum(facts["memory_bytes"].values()), facts["gpu_memory_bytes"]
    memory.add_section()
    memory.add_row("all", f"{total / 1e9:.2f}")
    console.print(memory)
    if total > room:
        console.print(f"too much: a GPU has {room / 1e9:.0f} GB")
    traffic = table("a GPU sends in a step", "what", "ranks", "GB", "ms", "")
    for row in facts["traffic"]:
        beside = "beside arithmetic" if row["beside_arithmetic"] else "waited for"
        sent, ms = row["sent_bytes"] / 1e9, 1e3 * row["seconds"]
        traffic.add_row(row["what"], str(row["ranks"]), f"{sent:.3f}", f"{ms:.1f}", beside)
    if facts["traffic"]:
        console.print(traffic)
    seconds = table("a GPU computes in a step", "kind", "ms")
    for kind, each in facts["compute_seconds"].items():
        seconds.add_row(kind, f"{1e3 * each:.1f}")
    seconds.add_section()
    seconds.add_row("all", f"{1e3 * sum(facts['compute_seconds'].values()):.1f}")
    console.print(seconds)
    step, rate, share = (facts[k] for k in ("step_seconds", "tokens_per_second", "utilisation"))
    console.print(
        f"a step: {1e3 * step['all_hidden']:.1f} ms with all hidden that can be, "
        f"{1e3 * step['nothing_hidden']:.1f} ms with nothing hidden"
    )
    console.print(
        f"tokens a second: {rate['least']:,.0f} to {rate['most']:,.0f}; "
        f"utilisation {share['least']:.1%} to {share['most']:.1%}"
    )
