"""The learning rate of each step."""

import math

from blackmamba.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of training step `step`, counted from 0: up in a straight line, then down half a cosine.

    The last step of the warm-up has the peak, config.lr. The cosine would reach
    config.min_lr_ratio * config.lr at the step after the last.

    Source: Loshchilov and Hutter 2017 (arXiv 1608.03983), eq. 5, without restarts.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    height = (1 + math.cos(math.pi * done)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)
