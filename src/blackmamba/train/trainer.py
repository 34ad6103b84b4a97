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
import dataclasses
import math
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blackmamba.checkpoint import save, save_adapter
from blackmamba.data import (
    Batch,
    ChatData,
    MixtureData,
    MixtureSampler,
    PreparedData,
    Share,
    Tokenizer,
    TokenLog,
)
from blackmamba.data.conversations import ConversationSampler
from blackmamba.errors import ConfigError, TrainingError
from blackmamba.model import BlackMamba, Trace
from blackmamba.model.lora import draw_dropout
from blackmamba.model.size import training_flops_per_token
from blackmamba.train.average import WeightAverage
from blackmamba.train.checkpoints import Counters, newest_checkpoint, restore, staged
from blackmamba.train.config import RunConfig, check_ranks
from blackmamba.train.evaluation import Validation, Validations, validate
from blackmamba.train.folder import (
    ADAPTER,
    CHECKPOINTS,
    MODEL,
    RECIPE,
    enter,
    open_data,
    pick_device,
    with_dtype,
)
from blackmamba.train.interrupt import StopRequest
from blackmamba.train.loggers import Logger, check_loggers, open_loggers
from blackmamba.train.memory import keep_freed_memory
from blackmamba.train.metrics import ExpertLoad, MetricsLog, NoMetrics, Row, finite
from blackmamba.train.mixed import narrow_weights
from blackmamba.train.muon import Muon
from blackmamba.train.optimizer import build_optimizer
from blackmamba.train.parallel.ranks import Ranks, join
from blackmamba.train.parts import parameters_by_part
from blackmamba.train.pictures import draw_experts, draw_loss
from blackmamba.train.progress import Progress
from blackmamba.train.recipe import write_recipe
from blackmamba.train.report import RunResult, write_summary, xz_bits_per_byte
from blackmamba.train.saver import Saver
from blackmamba.train.schedule import learning_rate
from blackmamba.train.speed import peak_memory, product_rate
from blackmamba.train.spikes import SpikeGuard
from blackmamba.train.start import DTYPES, started
from blackmamba.train.step import CapturedGradients, GradientsOfBatch, StepOutcome, train_step

if TYPE_CHECKING:
    from blackmamba.train.parallel.spread import Spread

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
        TrainingError: too many steps in a row were skipped, the run went back too often, or `out`
            cannot be written to.
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
    settings = config.train
    model = started(config, data.tokenizer, out, resumed=checkpoint is not None, ranks=ranks)
    masters = narrow_weights(model, DTYPES[settings.dtype]) if settings.weights != "float32" else {}
    model.to(device).recompute = settings.recompute
    spread = _spread(model, config, ranks)
    holder = model
    if spread is not None:
        holder = spread.shards
        masters = {name: holder.piece(name, whole) for name, whole in masters.items()}
    optimizer = build_optimizer(holder, settings, masters)
    if spread is not None and isinstance(optimizer, Muon):
        optimizer.shards = spread.shards
    del masters  # they may be on the device by now
    average: WeightAverage | None = None
    if settings.ema_decay:
        decay, is_spread = settings.ema_decay, spread is not None
        average = WeightAverage(holder, optimizer, decay, is_spread=is_spread)
    counters = Counters()
    if checkpoint is not None:
        restore(checkpoint, model, optimizer, average, spread)
        counters = checkpoint.counters
    if ranks.is_first:
        with _writing(out):
            write_recipe(config, out / RECIPE)

    trainer = Trainer(
        config, out, data, model, optimizer, average, counters, progress, ranks, spread
    )
    found = trainer.train()
    _save_model(model, spread, data.tokenizer, out / MODEL)
    if config.lora.rank and ranks.is_first:
        save_adapter(model, out / ADAPTER, data.tokenizer)
    if average is not None:
        with average.in_place():
            _save_model(model, spread, data.tokenizer, out / AVERAGE)
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


def _spread(model: BlackMamba, config: RunConfig, ranks: Ranks) -> "Spread | None":
    """The model on its ranks; None where there is one process."""
    if not ranks.is_group:
        return None
    from blackmamba.train.parallel.spread import Spread

    return Spread.over(ranks, model, config.parallel)


def _save_model(
    model: BlackMamba, spread: "Spread | None", tokenizer: Tokenizer, folder: Path
) -> None:
    """Write the model folder; of many ranks, all of which call this, the first writes."""
    whole = model if spread is None else spread.gathered()
    if whole is not None:
        save(whole, folder, tokenizer=tokenizer)


class Trainer:
    """The loop, and what it works on."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        data: PreparedData | ChatData | MixtureData,
        model: BlackMamba,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        counters: Counters,
        progress: Progress,
        ranks: Ranks,
        spread: "Spread | None",
    ):
        self.config, self.out, self.data = config, out, data
        self.model, self.optimizer, self.average = model, optimizer, average
        self.counters = counters
        self.progress = progress if ranks.is_first else Progress()
        self._ranks, self._spread = ranks, spread
        self._device = ranks.device
        settings = config.train
        rows = settings.seq_len, settings.batch_size, settings.seed
        if isinstance(data, ChatData):
            self.sampler = data.sampler(*rows)
        else:
            self.sampler = data.sampler(*rows, config.data.packing)
        self._is_ahead = self._device.type != "cpu"
        self._is_stopped = False
        if spread is None:
            kind = CapturedGradients if config.train.capture else GradientsOfBatch
            self._gradients, self._parts = kind(model), parameters_by_part(model)
        else:
            self._gradients = spread.gradients()
            self._parts = parameters_by_part(model, spread.shards.named_parameters())
        self._saver = Saver(self.progress.on_checkpoint, is_async=settings.checkpoint_async)
        self._guard = self._new_guard()
        self._unlogged = [0.0, 0]  # seconds and tokens of the steps since the last log
        self._rolled_back: dict[str, int] | None = None  # to be written down with the next step
        self.rate = product_rate(self._device.type, model.compute_dtype) * ranks.size
        self._flops_per_token = training_flops_per_token(model.config, config.train.seq_len)

    def train(self) -> Validations:
        """All steps that are left; returns the validation after the last."""
        settings, counters = self.config.train, self.counters
        found: Validations | None = None
        waiting: _Step | None = None  # on a GPU: runs, while the host prepares the next
        self._began, self._since = time.monotonic() - counters.seconds, time.monotonic()
        self.progress.on_start(counters.step, settings.steps)
        with (
            self._metrics() as metrics,
            StopRequest() as stop,
            self._token_log() as log,
            self._saver as saver,
        ):
            while counters.step < settings.steps:
                number = counters.step + counters.skipped_batches
                self._ranks.at(f"reads the batch of step {counters.step + 1}")
                batch = self._own(number, log)
                self._ranks.at(f"in step {counters.step + 1}")
                saver.look()
                self._gradients.wants_stop = stop.requested or saver.has_failed
                step = self._begin_step(number, batch)
                is_last = counters.step == settings.steps
                is_validated = is_last or _is_due(counters.step, settings.evaluate_every)
                is_saved = is_last or _is_due(counters.step, settings.checkpoint_every)
                if waiting is not None:
                    if not self._is_kept(waiting, metrics):
                        waiting = None
                        continue
                    self._end_step(waiting, metrics, None)
                waiting = step
                if is_validated or is_saved or not self._is_ahead or self._stops(stop):
                    if not self._is_kept(waiting, metrics):
                        waiting = None
                        continue
                    found = self._validate() if is_validated else None
                    if found is not None and self._is_best(found):
                        is_saved = is_saved or settings.keep_best
                    self._end_step(waiting, metrics, found)
                    waiting = None
                is_stopping = waiting is None and self._stops(stop)
                if is_saved or is_stopping:
                    metrics.sync()
                    self._save()
                if is_stopping and not is_last:
                    self._saved()
                    raise KeyboardInterrupt(
                        f"saved and stopped after step {counters.step} of {settings.steps}; "
                        "--resume goes on from there"
                    )
        return found or self._validate()

    def _own(self, number: int, log: TokenLog | None) -> Batch:
        """What this rank reads of a batch: rows, or its piece of each."""
        ways, rank, size = self.config.parallel.sequence, self._ranks.rank, self._ranks.size
        if log is not None and not isinstance(self.sampler, ConversationSampler):
            log.write(number, self.sampler.windows(number, rank // ways, size // ways))
        batch = self.sampler.batch(number, rank // ways, size // ways)
        return batch if ways == 1 else batch.piece(rank % ways, ways)

    def _metrics(self) -> MetricsLog | NoMetrics:
        if not self._ranks.is_first:
            return NoMetrics()
        step = self.counters.step
        return MetricsLog(self.out, step=step, begin_loggers=self._begin_loggers)

    def _stops(self, stop: StopRequest) -> bool:
        """Whether to stop, of which all ranks think alike: in every step they tell each other."""
        own = stop.requested or self._saver.has_failed
        return own if self._spread is None else self._is_stopped

    def _token_log(self) -> contextlib.AbstractContextManager[TokenLog | None]:
        if not self.config.data.token_log:
            return contextlib.nullcontext()
        return TokenLog(self.out, self._ranks.rank)

    def sources(self) -> dict[str, Share]:
        """What has been read of each source of a mixture; empty for one text."""
        if not isinstance(self.sampler, MixtureSampler):
            return {}
        return self.sampler.usage(self.counters.step + self.counters.skipped_batches)

    def _begin_step(self, number: int, batch: Batch) -> "_Step":
        """Start a step; on a GPU it is not done when this returns."""
        settings, counters = self.config.train, self.counters
        lr = learning_rate(settings, counters.step)
        is_logged = _is_due(counters.step + 1, settings.log_every)
        trace = Trace() if is_logged else None
        if self.config.lora.dropout:
            draw_dropout(self.model, settings.seed, number)
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
            guard=self._guard,
            parts=self._parts if is_logged else None,
        )
        counters.step += 1
        n_tokens = batch.input_ids.numel() * self._ranks.size
        counters.tokens += n_tokens
        if self.average is not None:
            self.average.update(counters.step)
        experts = ExpertLoad(trace.routing) if trace is not None and trace.routing else None
        return _Step(
            counters.step, number, counters.tokens, n_tokens, lr, outcome, experts, is_logged
        )

    def _end_step(
        self, step: "_Step", metrics: MetricsLog | NoMetrics, found: Validations | None
    ) -> None:
        """Wait for a step's numbers and write them down.

        Raises:
            TrainingError: too many in a row were skipped.
        """
        settings, counters, outcome = self.config.train, self.counters, step.outcome
        row: Row = {
            "step": step.number,
            "loss": finite(outcome.loss),
            "lr": step.lr,
            "grad_norm": finite(outcome.grad_norm),
            "skipped": not outcome.is_taken,
            "tokens": step.tokens,
        }
        if outcome.is_spike:
            row["spike"] = True
        if self._rolled_back is not None:
            row["rolled_back"], self._rolled_back = self._rolled_back, None
        row["tokens_per_s"] = round(step.n_tokens / step.seconds, 1)
        self._unlogged[0] += step.seconds
        self._unlogged[1] += step.n_tokens
        if step.experts is not None:
            row["experts"] = step.experts.by_layer()
        if step.is_logged:
            row["grad_norms"] = {k: finite(v) for k, v in outcome.part_norms.items()}
            row["machine"] = self._machine()
            if isinstance(self.sampler, MixtureSampler):
                usage = self.sampler.usage(step.batch + 1)
                row["sources"] = {k: dataclasses.asdict(v) for k, v in usage.items()}
        if found is not None:
            row |= found.row()
        counters.bad_steps += not outcome.is_finite
        counters.spikes += outcome.is_spike
        counters.bad_in_a_row = 0 if outcome.is_taken else counters.bad_in_a_row + 1
        counters.seconds = time.monotonic() - self._began
        row["seconds"] = round(counters.seconds, 3)
        metrics.write(row)
        self.progress.on_step(row)
        if counters.bad_in_a_row >= settings.max_bad_steps:
            what = "an outlier" if outcome.is_spike else "not finite"
            raise TrainingError(
                f"step {step.number}: loss or gradient was {what} for "
                f"{counters.bad_in_a_row} steps in a row; "
                f"try a train.lr below {settings.lr:g} or a longer train.warmup_steps"
                + (", or a larger train.spike_threshold" if outcome.is_spike else "")
            )

    def _machine(self) -> dict[str, float]:
        """How fast the steps since the last time were, and what they took."""
        seconds, tokens = self._unlogged
        self._unlogged = [0.0, 0]
        speed = tokens / seconds
        return {
            "tokens_per_s": round(speed, 1),
            "mfu": round(speed * self._flops_per_token / self.rate, 4),
            "memory_bytes": peak_memory(self._device.type),
        }

    def _is_kept(self, step: "_Step", metrics: MetricsLog | NoMetrics) -> bool:
        """Wait until a step is done. False: it was an outlier, and the run went back.

        Raises:
            TrainingError: it went back too often.
        """
        settings, counters = self.config.train, self.counters
        is_spike = step.outcome.is_spike
        self._is_stopped = step.outcome.stop
        now = time.monotonic()
        step.seconds, self._since = now - self._since, now
        if settings.spikes != "rollback" or not is_spike:
            return True
        self._saved()
        checkpoint = newest_checkpoint(self.out / CHECKPOINTS, settings.checkpoint_every)
        if checkpoint is None:
            return True  # there is nothing to go back to: the step was skipped
        rollbacks = counters.rollbacks + 1
        if rollbacks > settings.max_rollbacks:
            raise TrainingError(
                f"step {step.number}: loss {step.outcome.loss:.4g} or gradient norm "
                f"{step.outcome.grad_norm:.4g} is an outlier, after {counters.rollbacks} "
                f"roll-backs (train.max_rollbacks); try a train.lr below {settings.lr:g}, "
                "or a larger train.spike_threshold"
            )
        restore(checkpoint, self.model, self.optimizer, self.average, self._spread)
        spikes, kept = counters.spikes + 1, checkpoint.counters
        for field in dataclasses.fields(counters):
            setattr(counters, field.name, getattr(kept, field.name))
        counters.spikes, counters.rollbacks = spikes, rollbacks
        counters.skipped_batches = step.batch + 1 - counters.step
        counters.seconds = now - self._began
        self._guard = self._new_guard()
        self._rolled_back = {
            "from_step": step.number,
            "skipped_batches": counters.skipped_batches - kept.skipped_batches,
        }
        metrics.rewind(counters.step)
        self.progress.on_rollback(step.number, counters.step)
        self._since = time.monotonic()
        return False

    def _new_guard(self) -> SpikeGuard | None:
        """One that goes on from the counters; None if outliers do not matter."""
        settings, counters = self.config.train, self.counters
        if settings.spikes == "ignore":
            return None
        remembered = counters.recent_losses, counters.recent_norms
        return SpikeGuard(settings.spike_window, settings.spike_threshold, self._device, remembered)

    def _is_best(self, found: Validations) -> bool:
        """Whether no validation was better; it is remembered."""
        counters, nats = self.counters, found.weights.nats_per_token
        is_best = not counters.best_step or nats < counters.best_nats_per_token
        if is_best and math.isfinite(nats):
            counters.best_step, counters.best_nats_per_token = counters.step, nats
            return True
        return False

    def _validate(self) -> Validations:
        """Of the weights and, if there is one, of their average."""
        self._ranks.at(f"validates after step {self.counters.step}")
        settings = self.config.train
        options: dict[str, Any] = {
            "batch_size": settings.evaluate_batch_size,
            "seq_len": settings.evaluate_seq_len,
            "ranks": self._ranks,
        }
        weights = validate(self.model, self.data, **options)
        average: Validation | None = None
        if self.average is not None:
            with self.average.in_place():
                average = validate(self.model, self.data, **options)
        found = Validations(weights, average)
        self.progress.on_evaluation(self.counters.step, weights)
        if average is not None:
            self.progress.on_average(self.counters.step, average)
        self._since = time.monotonic()
        return found

    def _save(self) -> None:
        settings, counters = self.config.train, self.counters
        self._saved()
        self._ranks.at(f"saves the checkpoint of step {counters.step}")
        if self._guard is not None:
            counters.recent_losses, counters.recent_norms = self._guard.remembered()
        keep_also = {counters.best_step} if settings.keep_best else set[int]()
        if settings.spikes == "rollback":  # a signal's own checkpoint must not push it out
            keep_also.add(counters.step - counters.step % settings.checkpoint_every)
        self._saver.save(
            staged(
                self.out / CHECKPOINTS,
                self.model,
                self.data.tokenizer,
                self.optimizer,
                counters=counters,
                config=self.config,
                data=self.data.fingerprint,
                keep=settings.keep_checkpoints,
                keep_also=keep_also,
                average=self.average,
                spread=self._spread,
                copied=self._saver.is_async,
            )
        )
        self._since = time.monotonic()

    def _saved(self) -> None:
        """Wait until the checkpoint before is there; all ranks do.

        Raises:
            CheckpointError: it could not be written.
        """
        self._ranks.at(f"waits for the checkpoint before, in step {self.counters.step}")
        self._saver.wait()

    def _begin_loggers(self, step: int) -> list[Logger]:
        return open_loggers(self.config.train.loggers, self.out, step=step, config=self.config)


@dataclasses.dataclass
class _Step:
    """A step that was begun."""

    number: int
    """From 1."""
    batch: int
    """The sampler's number of what it read."""
    tokens: int
    """Read up to its end."""
    n_tokens: int
    """Its own."""
    lr: float
    outcome: StepOutcome
    experts: ExpertLoad | None
    is_logged: bool
    seconds: float = 0.0
    """From the end of the step before to its own."""


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
