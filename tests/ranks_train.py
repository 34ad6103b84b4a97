"""What the tests of training let ranks do: run several runs, one after the other."""

from pathlib import Path
from typing import Any

from blackmamba.train import RunConfig, run


def train_all(runs: list[tuple[RunConfig, Path, bool]]) -> list[Any]:
    """The result of each run: (configuration, folder, resume)."""
    return [run(config, out, resume=resume) for config, out, resume in runs]
