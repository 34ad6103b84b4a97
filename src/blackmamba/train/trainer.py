"""The loop over the steps of a run: read, train, look, save."""

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blackmamba.data import (
    Batch,
    ChatData,
    MixtureData,
    MixtureSampler,
    PreparedData,
    Share,
    TokenLog,
)
from blackmamba.data.conversations import ConversationSampler
from blackmamba.errors import TrainingError
from blackmamba.model import Trace
from blackmamba.model.lora import draw_dropout
from blackmamba.model.size import training_flops_per_token
from blackmamba.train.checkpoints import Counters, folder_of
from blackmamba.train.config import RunConfig
from blackmamba.train.evaluation import Validation, Validations, validate
from blackmamba.train.folder import CHECKPOINTS
from blackmamba.train.interrupt import StopRequest
from blackmamba.train.learner import Learner
from blackmamba.train.loggers import Logger, open_loggers
from blackmamba.train.metrics import ExpertLoad, MetricsLog, NoMetrics
from blackmamba.train.parallel.ranks import Ranks
from blackmamba.train.progress import Progress
from blackmamba.train.rollback import go_back, new_guard
from blackmamba.train.rows import Rows, Step
from blackmamba.train.saver import Saver
from blackmamba.train.schedule import learning_rate
from blackmamba.train.speed import product_rate, slow_ranks
from blackmamba.train.staging import staged
from blackmamba.train.step import train_step

_logger = logging.getLogger(__name__)


class Trainer:
    """The loop, and what it works on."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        data: PreparedData | ChatData | MixtureData,
        learner: Learner,
        counters: Counters,
        progress: Progress,
        ranks: Ranks,
    ):
        self.config, self.out, self.data = config, out, data
        self.learner = learner
        self.counters = counters
        self.progress = progress if ranks.is_first else Progress()
        self._ranks, self._device = ranks, ranks.device
        settings = config.train
        rows = settings.seq_len, settings.batch_size, settings.seed
        if isinstance(data, ChatData):
            self.sampler = data.sampler(*rows)
        else:
            self.sampler = data.sampler(*rows, config.data.packing)
        self._is_ahead = self._device.type != "cpu"
        self._is_stopped = False
        self._saved_step = counters.step  # of the newest checkpoint
        self._sound_step = 0  # of the newest checkpoint after which a step was finite; 0: none
        self._gradients = learner.gradients(capture=settings.capture)
        self._parts = learner.parts()
        self._saver = Saver(self.progress.on_checkpoint, is_async=settings.checkpoint_async)
        self._guard = new_guard(settings, counters, self._device)
        rates = ranks.all_told(product_rate(self._device.type, learner.model.compute_dtype))
        for line in slow_ranks(rates) if ranks.is_first else ():
            _logger.warning(line)
        self.rate = sum(rates)
        flops = training_flops_per_token(learner.model.config, settings.seq_len)
        self._rows = Rows(self.sampler, self.rate, flops, self._device)

    def train(self) -> Validations:
        """All steps that are left; returns the validation after the last."""
        settings, counters = self.config.train, self.counters
        found: Validations | None = None
        waiting: Step | None = None  # on a GPU: runs, while the host prepares the next
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
        return own if self.learner.spread is None else self._is_stopped

    def _token_log(self) -> contextlib.AbstractContextManager[TokenLog | None]:
        if not self.config.data.token_log:
            return contextlib.nullcontext()
        return TokenLog(self.out, self._ranks.rank)

    def sources(self) -> dict[str, Share]:
        """What has been read of each source of a mixture; empty for one text."""
        if not isinstance(self.sampler, MixtureSampler):
            return {}
        return self.sampler.usage(self.counters.step + self.counters.skipped_batches)

    def _begin_step(self, number: int, batch: Batch) -> Step:
        """Start a step; on a GPU it is not done when this returns."""
        settings, counters = self.config.train, self.counters
        lr = learning_rate(settings, counters.step)
        is_logged = _is_due(counters.step + 1, settings.log_every)
        trace = Trace() if is_logged else None
        if self.config.lora.dropout:
            draw_dropout(self.learner.model, settings.seed, number)
        outcome = train_step(
            self.learner.model,
            self.learner.optimizer,
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
        if self.learner.average is not None:
            self.learner.average.update(counters.step)
        experts = ExpertLoad(trace.routing) if trace is not None and trace.routing else None
        return Step(
            counters.step, number, counters.tokens, n_tokens, lr, outcome, experts, is_logged
        )

    def _end_step(
        self, step: Step, metrics: MetricsLog | NoMetrics, found: Validations | None
    ) -> None:
        """Wait for a step's numbers and write them down.

        Raises:
            TrainingError: too many in a row were skipped.
        """
        settings, counters, outcome = self.config.train, self.counters, step.outcome
        row = self._rows.row(step, found)
        counters.bad_steps += not outcome.is_finite
        counters.spikes += outcome.is_spike
        counters.bad_in_a_row = 0 if outcome.is_taken else counters.bad_in_a_row + 1
        if outcome.is_finite:
            self._sound_step = self._saved_step
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
                + ("" if outcome.is_spike else self.sound_checkpoint())
            )

    def sound_checkpoint(self) -> str:
        """Where weights are that gave a finite loss, to end a message with; "" if nowhere."""
        folder = folder_of(self.out / CHECKPOINTS, self._sound_step)
        said = f"; the newest weights that gave a finite loss are in {folder}"
        return said if folder.is_dir() else ""

    def _is_kept(self, step: Step, metrics: MetricsLog | NoMetrics) -> bool:
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
        left_out = go_back(step, self.out / CHECKPOINTS, settings, self.learner, counters)
        if left_out is None:
            return True  # there is nothing to go back to: the step was skipped
        counters.seconds = now - self._began
        self._saved_step = self._sound_step = counters.step
        self._guard = new_guard(settings, counters, self._device)
        self._rows.rolled_back = left_out
        metrics.rewind(counters.step)
        self.progress.on_rollback(step.number, counters.step)
        self._since = time.monotonic()
        return False

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
        weights = validate(self.learner.model, self.data, **options)
        average: Validation | None = None
        if self.learner.average is not None:
            with self.learner.average.in_place():
                average = validate(self.learner.model, self.data, **options)
        found = Validations(weights, average)
        self.progress.on_evaluation(self.counters.step, weights)
        if average is not None:
            self.progress.on_average(self.counters.step, average)
        self._since = time.monotonic()
        return found

    def _save(self) -> None:
        settings, counters, learner = self.config.train, self.counters, self.learner
        self._saved()
        self._ranks.at(f"saves the checkpoint of step {counters.step}")
        if self._guard is not None:
            counters.recent_losses, counters.recent_norms = self._guard.remembered()
        keep_also = {counters.best_step} if settings.keep_best else set[int]()
        if settings.spikes == "rollback":  # a signal's own checkpoint must not push it out
            keep_also.add(counters.step - counters.step % settings.checkpoint_every)
        if counters.bad_in_a_row:  # what is saved now may be of no use
            keep_also.add(self._sound_step)
        self._saved_step = counters.step
        self._saver.save(
            staged(
                self.out / CHECKPOINTS,
                learner.model,
                self.data.tokenizer,
                learner.optimizer,
                counters=counters,
                config=self.config,
                data=self.data.fingerprint,
                keep=settings.keep_checkpoints,
                keep_also=keep_also,
                average=learner.average,
                spread=learner.spread,
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


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what runs there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
