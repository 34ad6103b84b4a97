"""The learning rate of each step."""

import math

from blackmamba.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of training step `step`, counted from 0: a function of the step and the settings alone.

    Up in a straight line, then as `config.schedule` says. The last step of the warm-up has the
    peak, config.lr. A fall would reach config.min_lr_ratio * config.lr at the step after the last.

    Source:
        Cosine: Loshchilov and Hutter 2017 (arXiv 1608.03983), eq. 5, without restarts. Warm-up,
        stable, decay: Hu et al. 2024 (arXiv 2404.06395), section 4; the shape 1 - sqrt: Hagele et
        al. 2024 (arXiv 2405.18392), section 3.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    height = _height(config, step)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)


def _height(config: TrainConfig, step: int) -> float:
    """From 1 to 0."""
    match config.schedule:
        case "constant":
            return 1.0
        case "cosine":
            begin = config.warmup_steps
        case "wsd":
            begin = max(config.warmup_steps, config.steps - config.decay_steps)
    done = max(0, step - begin) / max(1, config.steps - begin)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1 - (math.sqrt(done) if config.decay_shape == "1-sqrt" else done)
