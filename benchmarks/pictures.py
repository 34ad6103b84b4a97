"""The pictures of docs/images drawn again from the numbers beside them.

    python benchmarks/pictures.py [FOLDER]

`blackmamba reproduce` writes files of these forms: latency-1.csv, ladder-curves.csv.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from blackmamba.analyse import figures
from blackmamba.analyse.latency import Latency

DOCS = Path(__file__).parent.parent / "docs" / "images"


def latencies(path: Path) -> list[Latency]:
    """The rows of a table of latencies, of one batch size."""
    return [
        Latency(
            name=row["network"],
            context=int(row["context"].replace(",", "")),
            batch_size=1,
            prompt_s=float(row["prompt, s"]),
            token_ms=float(row["token, ms"]),
            state_bytes=int(row["memory, bytes"].replace(",", "")),
        )
        for row in _rows(path)
    ]


def lines(path: Path) -> dict[str, list[list[figures.Point]]]:
    """A ladder's lines: by network, one a seed."""
    found: dict[str, dict[str, list[figures.Point]]] = {}
    network, seed, *numbers = figures.CURVES_HEAD
    for row in _rows(path):
        flops, seconds, loss, tokens = (float(row[key]) for key in numbers)
        run = found.setdefault(row[network], {}).setdefault(row[seed], [])
        run.append((flops, seconds, loss, tokens))
    return {name: list(runs.values()) for name, runs in found.items()}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(folder: Path) -> None:
    """Draw what there are numbers of: latency*.csv, ladder*.csv."""
    for path in sorted(folder.glob("latency*.csv")):
        figures.draw_latency(path.with_suffix(".png"), latencies(path))
    for path in sorted(folder.glob("ladder*.csv")):
        figures.draw_ladder(path.with_suffix(".png"), lines(path))


def arguments(given: Sequence[str]) -> Path:
    """The folder."""
    return Path(given[0]) if given else DOCS


if __name__ == "__main__":
    main(arguments(sys.argv[1:]))
