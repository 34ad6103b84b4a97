"""A training run from beginning to end: start reading at `run`.

RUN/
    recipe.yaml       the whole configuration, itself a recipe
    data/             tokenizer and tokens
    metrics.jsonl     a line a step          tensorboard/   the same, if wanted
    checkpoints/      step-00000123/, ...    model/         the trained model
    loss.png          summary.json
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor

from blackmamba.checkpoint import save
from blackmamba.data import Batch, PreparedData, WindowSampler, prepare
from blackmamba.errors import ConfigError, DataError, TrainingError
from blackmamba.model import BlackMamba, Trace
from blackmamba.train.checkpoints import (
    Checkpoint,
    Counters,
    newest_checkpoint,
    remove_leftovers,
    restore,
    save_checkpoint,
)
from blackmamba.train.config import RunConfig, check_resumable
from blackmamba.train.evaluation import Validation, validate
from blackmamba.train.interrupt import StopRequest
from blackmamba.train.memory import keep_freed_memory
from blackmamba.train.metrics import (
    METRICS_FILE,
    MetricsLog,
    Row,
    check_tensorboard,
    expert_load,
    finite,
)
from blackmamba.train.mixed import narrow_weights
from blackmamba.train.optimizer import build_optimizer
from blackmamba.train.progress import Progress
from blackmamba.train.recipe import write_recipe
from blackmamba.train.report import RunResult, draw_loss, write_summary, xz_bits_per_byte
from blackmamba.train.schedule import learning_rate
from blackmamba.train.start import DTYPES, started
from blackmamba.train.step import CapturedGradients, GradientsOfBatch, StepOutcome, train_step

RECIPE, DATA, CHECKPOINTS, MODEL = "recipe.yaml", "data", "checkpoints", "model"
_logger = logging.getLogger(__name__)


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
        TrainingError: too many steps in a row were not finite, or `out` cannot be written to.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    out, settings, progress = Path(out), config.train, progress or Progress()
    device = _pick_device(settings.device)
    if settings.capture and device.type != "cuda":
        raise ConfigError("train.capture=true: there are graphs on a GPU only; set it to false")
    keep_freed_memory(device)
    if settings.tensorboard:
        check_tensorboard()
    checkpoint = _enter(out, config, resume)
    config = _with_dtype(config, checkpoint, device)
    data = _open_data(out, config, checkpoint)
    settings = config.train
    model = started(config, data.tokenizer, resumed=checkpoint is not None)
    masters = narrow_weights(model, DTYPES[settings.dtype]) if settings.weights != "float32" else {}
    model.to(device).recompute = settings.recompute
    optimizer = build_optimizer(model, settings, masters)
    del masters  # they may be on the device by now
    counters = Counters()
    if checkpoint is not None:
        restore(checkpoint, model, optimizer)
        counters = checkpoint.counters
    with _writing(out):
        write_recipe(config, out / RECIPE)

    trainer = Trainer(config, out, data, model, optimizer, counters, progress)
    validation = trainer.train()
    save(model, out / MODEL, tokenizer=data.tokenizer)
    result = RunResult(
        steps=counters.step,
        bad_steps=counters.bad_steps,
        tokens=counters.tokens,
        seconds=counters.seconds,
        nats_per_token=validation.nats_per_token,
        bits_per_byte=validation.bits_per_byte,
        xz_bits_per_byte=xz_bits_per_byte(data.validation_text),
        model=out / MODEL,
    )
    with _writing(out):
        draw_loss(out)
        write_summary(result, out)
    return result


class Trainer:
    """The loop, and what it works on."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        data: PreparedData,
        model: BlackMamba,
        optimizer: torch.optim.Optimizer,
        counters: Counters,
        progress: Progress,
    ):
        self.config, self.out, self.data = config, out, data
        self.model, self.optimizer = model, optimizer
        self.counters, self.progress = counters, progress
        self._device = model.embedding.weight.device
        self._is_ahead = self._device.type != "cpu"
        self._gradients = (CapturedGradients if config.train.capture else GradientsOfBatch)(model)

    def train(self) -> Validation:
        """All steps that are left; returns the validation after the last."""
        settings, counters = self.config.train, self.counters
        sampler = WindowSampler(
            self.data.train.tokens, settings.seq_len, settings.batch_size, settings.seed
        )
        validation: Validation | None = None
        waiting: _Step | None = None  # on a GPU: runs, while the host prepares the next
        self._since = time.monotonic()
        began = self._since - counters.seconds
        self.progress.on_start(counters.step, settings.steps)
        with (
            MetricsLog(self.out, step=counters.step, tensorboard=settings.tensorboard) as metrics,
            StopRequest() as stop,
        ):
            while counters.step < settings.steps:
                step = self._begin_step(sampler.batch(counters.step))
                is_last = counters.step == settings.steps
                is_validated = is_last or _is_due(counters.step, settings.evaluate_every)
                is_saved = is_last or _is_due(counters.step, settings.checkpoint_every)
                if waiting is not None:
                    self._end_step(waiting, metrics, None, began)
                waiting = step
                if is_validated or is_saved or not self._is_ahead or stop.requested:
                    validation = self._validate() if is_validated else None
                    self._end_step(waiting, metrics, validation, began)
                    waiting = None
                is_stopping = waiting is None and stop.requested
                if is_saved or is_stopping:
                    metrics.sync()
                    self._save()
                if is_stopping and not is_last:
                    raise KeyboardInterrupt(
                        f"saved and stopped after step {counters.step} of {settings.steps}; "
                        "--resume goes on from there"
                    )
        return validation or self._validate()

    def _begin_step(self, batch: Batch) -> "_Step":
        """Start a step; on a GPU it is not done when this returns."""
        settings, counters = self.config.train, self.counters
        lr = learning_rate(settings, counters.step)
        trace = Trace() if _is_due(counters.step + 1, settings.log_every) else None
        outcome = train_step(
            self.model,
            self.optimizer,
            _sent(batch.input_ids, self._device),
            _sent(batch.labels, self._device),
            lr=lr,
            accumulate=settings.accumulate,
            grad_clip=settings.grad_clip,
            trace=trace,
            seq_idx=None if batch.seq_idx is None else _sent(batch.seq_idx, self._device),
            gradients=self._gradients,
        )
        counters.step += 1
        n_tokens = batch.input_ids.numel()
        counters.tokens += n_tokens
        experts = expert_load(trace.routing) if trace is not None and trace.routing else None
        return _Step(counters.step, counters.tokens, n_tokens, lr, outcome, experts)

    def _end_step(
        self, step: "_Step", metrics: MetricsLog, validation: Validation | None, began: float
    ) -> None:
        """Wait for a step's numbers and write them down.

        Raises:
            TrainingError: too many in a row were not finite.
        """
        settings, counters, outcome = self.config.train, self.counters, step.outcome
        row: Row = {
            "step": step.number,
            "loss": finite(outcome.loss),
            "lr": step.lr,
            "grad_norm": finite(outcome.grad_norm),
            "skipped": not outcome.is_finite,
            "tokens": step.tokens,
        }
        now = time.monotonic()
        row["tokens_per_s"] = round(step.n_tokens / (now - self._since), 1)
        self._since = now
        if step.experts is not None:
            row["experts"] = step.experts
        if validation is not None:
            row["validation"] = {
                "nats_per_token": finite(validation.nats_per_token),
                "bits_per_byte": finite(validation.bits_per_byte),
            }
        counters.bad_steps += not outcome.is_finite
        counters.bad_in_a_row = 0 if outcome.is_finite else counters.bad_in_a_row + 1
        counters.seconds = now - began
        row["seconds"] = round(counters.seconds, 3)
        metrics.write(row)
        self.progress.on_step(row)
        if counters.bad_in_a_row >= settings.max_bad_steps:
            raise TrainingError(
                f"step {step.number}: loss or gradient was not finite for "
                f"{counters.bad_in_a_row} steps in a row; "
                f"try a train.lr below {settings.lr:g} or a longer train.warmup_steps"
            )

    def _validate(self) -> Validation:
        settings = self.config.train
        validation = validate(
            self.model,
            self.data,
            batch_size=settings.evaluate_batch_size,
            seq_len=settings.evaluate_seq_len,
        )
        self.progress.on_evaluation(self.counters.step, validation)
        return validation

    def _save(self) -> None:
        folder = save_checkpoint(
            self.out / CHECKPOINTS,
            self.model,
            self.data.tokenizer,
            self.optimizer,
            counters=self.counters,
            config=self.config,
            data=self.data.index.fingerprint,
            keep=self.config.train.keep_checkpoints,
        )
        self.progress.on_checkpoint(folder)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step that was begun."""

    number: int
    """From 1."""
    tokens: int
    """Read up to its end."""
    n_tokens: int
    """Its own."""
    lr: float
    outcome: StepOutcome
    experts: dict[str, dict[str, float]] | None


@contextlib.contextmanager
def _writing(out: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{out}: cannot be written to ({error.strerror or error})") from None


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what runs there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# ---- before the first step -----------------------------------------------------------------


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device='cuda': no usable GPU here; use 'auto' or 'cpu'")
    return torch.device(name)


def _enter(out: Path, config: RunConfig, resume: bool) -> Checkpoint | None:
    """See that the run may use the folder `out`; the checkpoint to go on from, if any."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: not a folder; a run needs one of its own")
    held = [name for name in (RECIPE, METRICS_FILE, CHECKPOINTS, MODEL) if (out / name).exists()]
    if held and not resume:
        raise ConfigError(
            f"{out}: holds a run already ({held[0]}); go on with it by --resume, "
            "or choose another --out"
        )
    remove_leftovers(out / CHECKPOINTS)
    checkpoint = newest_checkpoint(out / CHECKPOINTS)
    if checkpoint is None:
        if resume:
            _logger.warning("%s: no checkpoint to resume from; beginning with step 1", out)
        return None
    check_resumable(checkpoint.config, _with_dtype(config, checkpoint, torch.device("cpu")))
    if checkpoint.counters.step > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps}: {checkpoint.folder} has more steps done already"
        )
    return checkpoint


def _with_dtype(
    config: RunConfig, checkpoint: Checkpoint | None, device: torch.device
) -> RunConfig:
    """The configuration with what it stands for in the place of "auto"."""
    train, begun = config.train, None if checkpoint is None else checkpoint.config.train
    if train.dtype == "auto":
        dtype = "bfloat16" if _multiplies_bfloat16(device) else "float32"
        train = dataclasses.replace(train, dtype=begun.dtype if begun else dtype)
    if train.weights == "auto":
        weights = "master" if device.type == "cuda" and train.dtype == "bfloat16" else "float32"
        train = dataclasses.replace(train, weights=begun.weights if begun else weights)
    return dataclasses.replace(config, train=train)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _open_data(out: Path, config: RunConfig, checkpoint: Checkpoint | None) -> PreparedData:
    folder = out / DATA
    if checkpoint is None:
        return prepare(config.data, folder)
    try:
        data = PreparedData.open(folder)  # the text itself may be gone by now
    except DataError:
        data = prepare(config.data, folder)
    if data.index.fingerprint != checkpoint.data:
        raise DataError(f"{folder}: not the text that this run began with; begin a new run")
    return data
