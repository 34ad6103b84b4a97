"""A training run from beginning to end: start reading at `run`.

RUN/
    recipe.yaml       the whole configuration, itself a recipe
    data/             tokenizer and tokens
    metrics.jsonl     a line a step          tensorboard/   the same, if wanted
    checkpoints/      step-00000123/, ...    model/         the trained model
    model_ema/        the average of its weights, if wanted
    base/             the model that adapters are of, and adapter/, where such are trained
    loss.png          summary.json           expert-load.png
"""

import contextlib
import math
from collections.abc import Generator
from pathlib import Path

from blackmamba.errors import ConfigError, TrainingError
from blackmamba.train.checkpoints import Counters
from blackmamba.train.config import RunConfig, check_ranks
from blackmamba.train.folder import (
    ADAPTER,
    MODEL,
    RECIPE,
    enter,
    open_data,
    pick_device,
    with_dtype,
)
from blackmamba.train.learner import Learner
from blackmamba.train.loggers import check_loggers
from blackmamba.train.memory import keep_freed_memory
from blackmamba.train.parallel.ranks import Ranks, join
from blackmamba.train.pictures import draw_experts, draw_loss
from blackmamba.train.progress import Progress
from blackmamba.train.recipe import write_recipe
from blackmamba.train.report import RunResult, write_summary, xz_bits_per_byte
from blackmamba.train.restoring import restore
from blackmamba.train.trainer import Trainer

AVERAGE = "model_ema"


def run(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Train a model as `config` says, in the folder `out`.

    A run that was stopped, however roughly, and resumed gives on CPU the same losses and weights,
    bit for bit, as one that was not (with the same torch and number of threads).

    Args:
        config: usually from `load_recipe`.
        out: of this run alone; made if it is missing.
        resume: go on from the newest checkpoint in `out`, or begin where there is none.
        progress: is told how it goes.
    Raises:
        ConfigError: `out` holds a run already and `resume` is False; it was begun with settings
            that may not change (see `check_resumable`); there is no such device.
        DataError: the text is missing, too little, or not what the run began with.
        CheckpointError: a checkpoint is damaged, or a model or checkpoint cannot be written.
        TrainingError: too many steps in a row were skipped, the run went back too often, the model
            at its end has no finite loss, or `out` cannot be written to.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, to any rank, after saving a checkpoint.
        PeerError: another rank failed; that one has raised why.
    """
    with join(pick_device(config.train.device), config.parallel.timeout_s) as ranks:
        return _run(config, Path(out), resume or ranks.is_restart, progress or Progress(), ranks)


def _run(config: RunConfig, out: Path, resume: bool, progress: Progress, ranks: Ranks) -> RunResult:
    """`run`, as one of the ranks."""
    settings, device = config.train, ranks.device
    ranks.first(lambda: check_ranks(config, ranks))
    if settings.capture and device.type != "cuda":
        raise ConfigError("train.capture=true: there are graphs on a GPU only; set it to false")
    keep_freed_memory(device)
    ranks.first(lambda: check_loggers(settings.loggers))
    checkpoint = ranks.first_then_all(lambda: enter(out, config, resume, ranks))
    config = with_dtype(config, checkpoint, device)
    data = ranks.first_then_all(lambda: open_data(out, config, checkpoint))
    is_resumed = checkpoint is not None
    learner = Learner.build(config, data.tokenizer, out, ranks, resumed=is_resumed)
    counters = Counters()
    if checkpoint is not None:
        restore(checkpoint, learner.model, learner.optimizer, learner.average, learner.spread)
        counters = checkpoint.counters
    if ranks.is_first:
        with _writing(out):
            write_recipe(config, out / RECIPE)

    trainer = Trainer(config, out, data, learner, counters, progress, ranks)
    found = trainer.train()
    if not math.isfinite(found.weights.nats):
        raise TrainingError(
            f"{out}: no model is written: after step {counters.step} the loss on the validation "
            f"text is not finite; try a train.lr below {settings.lr:g} or a longer "
            f"train.warmup_steps{trainer.sound_checkpoint()}"
        )
    adapter = out / ADAPTER if config.lora.rank else None
    learner.save_model(out / MODEL, data.tokenizer, adapter)
    if learner.average is not None:
        with learner.average.in_place():
            learner.save_model(out / AVERAGE, data.tokenizer)
    result = RunResult(
        steps=counters.step,
        bad_steps=counters.bad_steps,
        spikes=counters.spikes,
        rollbacks=counters.rollbacks,
        tokens=counters.tokens,
        seconds=counters.seconds,
        nats_per_token=found.weights.nats_per_token,
        bits_per_byte=found.weights.bits_per_byte,
        ema_bits_per_byte=None if found.average is None else found.average.bits_per_byte,
        best_step=counters.best_step,
        best_nats_per_token=counters.best_nats_per_token,
        xz_bits_per_byte=xz_bits_per_byte(data.validation_text) if ranks.is_first else None,
        product_flops_per_s=trainer.rate,
        sources=trainer.sources(),
        model=out / MODEL,
    )
    if not ranks.is_first:
        return result
    with _writing(out):
        draw_loss(out)
        draw_experts(out)
        write_summary(result, out)
    return result


@contextlib.contextmanager
def _writing(out: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{out}: cannot be written to ({error.strerror or error})") from None
