"""Training: recipes, the loop, exact resume. Start at runner.py.

from blackmamba.train import load_recipe, run
result = run(load_recipe("tiny"), "runs/tiny")
"""

from blackmamba.train.compare import RunRecord, differing_settings, read_runs
from blackmamba.train.config import RunConfig, TrainConfig
from blackmamba.train.evaluation import Validation, validate
from blackmamba.train.pictures import draw_comparison
from blackmamba.train.progress import Progress, RichProgress
from blackmamba.train.recipe import load_recipe, recipe_names, write_recipe
from blackmamba.train.report import RunResult
from blackmamba.train.runner import run
from blackmamba.train.start import trained_parameters
from blackmamba.train.step import train_step

__all__ = [
    "Progress",
    "RichProgress",
    "RunConfig",
    "RunRecord",
    "RunResult",
    "TrainConfig",
    "Validation",
    "differing_settings",
    "draw_comparison",
    "load_recipe",
    "read_runs",
    "recipe_names",
    "run",
    "train_step",
    "trained_parameters",
    "validate",
    "write_recipe",
]
