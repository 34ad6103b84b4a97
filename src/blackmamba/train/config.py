"""How a model is trained, and everything that a run is made of."""

import dataclasses
import math
from typing import Literal, cast

from blackmamba.config import ModelConfig
from blackmamba.data import DataConfig, SourceConfig
from blackmamba.data.storage import located
from blackmamba.errors import ConfigError
from blackmamba.model.lora import LoRAConfig
from blackmamba.train.loggers import LoggerName
from blackmamba.train.muon import MuonScale
from blackmamba.train.parallel.config import ParallelConfig
from blackmamba.train.parallel.mesh import check_fits
from blackmamba.train.parallel.ranks import Ranks

_AT_LEAST = {
    1: ("steps", "batch_size", "accumulate", "seq_len", "evaluate_batch_size", "evaluate_seq_len",
        "log_every", "keep_checkpoints", "max_bad_steps"),
    2: ("spike_window",),
    0: ("warmup_steps", "seed", "evaluate_every", "checkpoint_every", "grad_clip", "weight_decay",
        "max_rollbacks"),
}  # fmt: skip
_FREE_ON_RESUME = frozenset((
    "steps", "device", "evaluate_every", "evaluate_batch_size", "evaluate_seq_len",
    "checkpoint_every", "keep_checkpoints", "log_every", "max_bad_steps", "loggers",
    "recompute", "capture", "keep_best", "max_rollbacks", "checkpoint_async",
))  # fmt: skip
_PATHS = ("text", "tokenizer", "sources")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The optimisation, and when to look at it and to save it.

    A step reads batch_size windows of seq_len tokens and updates the weights once.
    """

    steps: int
    batch_size: int
    """Windows of a step, over all its micro-batches."""
    seq_len: int
    lr: float
    """Peak learning rate, reached at the end of the warm-up."""

    accumulate: int = 1
    """Micro-batches of a step: less memory, and the same gradient but for the experts' balance,
    which Sinkhorn then finds for each micro-batch alone. Divides batch_size."""
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    """The schedule falls from lr to min_lr_ratio * lr."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 1.0
    """Largest norm of all gradients together; 0: no limit."""

    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of the products; optimizer, scan state and loss are float32 either way, parameters as
    `weights` says.
    "auto": bfloat16 where the device multiplies it faster than float32 (`blackmamba doctor` says
    whether a CPU does), else float32; a run that is resumed goes on in the dtype that it began
    with."""
    weights: Literal["float32", "master", "stochastic", "auto"] = "float32"
    """How parameters are kept. "float32", cast for every product. "master": those of the products
    in `dtype`, and a float32 copy in the optimizer, which is what it updates: the same memory and
    fewer passes over it. "stochastic": in `dtype` alone, rounded at random: a quarter less memory.
    "auto": "master" for bfloat16 where a kernel updates them (a GPU, or native kernels), else
    "float32"; a run that is resumed goes on as it began. Norms, router, A_log, D and dt_bias are
    float32 in any case."""
    recompute: Literal["none", "cheap", "layers"] = "none"
    """What is computed again in the backward pass and so not kept for it. "cheap": outputs of norms
    and convolutions. "layers": all inside of a layer, products too."""
    capture: bool = False
    """Record forward and backward pass as a CUDA graph at the first step and replay it: for models
    so small that starting kernels takes longer than running them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": the GPU if there is one."""
    seed: int = 0
    """Of the first weights and of the order of the windows."""

    evaluate_every: int = 0
    """Steps from one validation to the next; there is always one at the end. 0: only that."""
    evaluate_batch_size: int = 16
    """Parallel streams that the validation text is cut into."""
    evaluate_seq_len: int = 256
    """Tokens of each stream that are read at once; the memory is carried on."""
    checkpoint_every: int = 0
    """Steps from one checkpoint to the next; there is always one at the end. 0: only that."""
    keep_checkpoints: int = 2
    checkpoint_async: bool = False
    """Write checkpoints beside the training, from a copy in the host's memory of all that a rank
    holds: a step waits for the copy alone, and for a checkpoint before that is not there yet."""
    log_every: int = 10
    """Steps from one record of what takes more looking to the next: the experts' load, the
    gradient's norm by part, utilisation and memory."""
    max_bad_steps: int = 10
    """So many steps in a row without a finite loss and gradient end the run."""
    loggers: tuple[LoggerName, ...] = ()
    """Where the numbers go beside metrics.jsonl; each is a package to be installed."""

    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """The learning rate after the warm-up. "wsd" (warm-up, stable, decay): constant, and down in
    the last steps alone, so that a run can be made longer from a checkpoint before them."""
    decay_fraction: float = 0.2
    """Share of all steps in which "wsd" falls."""
    decay_shape: Literal["1-sqrt", "linear"] = "1-sqrt"
    """How "wsd" falls: at share x of the way down to 1 - sqrt(x) or 1 - x."""

    ema_decay: float = 0.0
    """A moving average of the weights, float32, is kept, validated and saved as RUN/model_ema:
    after each step so much of it stays (less in the first steps). 0: none."""

    spikes: Literal["ignore", "skip", "rollback"] = "ignore"
    """What happens to a step whose loss or gradient norm is an outlier. "skip": no update.
    "rollback": the run goes back to the newest checkpoint of `checkpoint_every`, and goes on with
    the data after the outlier's; where there is none yet, "skip"."""
    spike_window: int = 100
    """Usual steps of which outliers are told; as many steps at the beginning are never any."""
    spike_threshold: float = 10.0
    """An outlier is above the median by more than so many deviations, each 1.4826 times the median
    absolute deviation."""
    max_rollbacks: int = 5
    """One more ends the run."""

    keep_best: bool = False
    """Keep the checkpoint of the best validation beside the last ones; a validation that is better
    than all before is saved, whether a checkpoint is due or not."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon": the matrices of layers and experts by Muon; embedding, head, router, convolution,
    norms, biases, A_log and D by AdamW all the same."""
    muon_momentum: float = 0.95
    muon_scale: MuonScale = "moonlight"
    """Size of Muon's steps. "moonlight": as AdamW's, so that `lr` and `weight_decay` mean what they
    do there; "jordan": of the original, larger for small matrices."""
    muon_dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Of the products that make Muon's matrices orthogonal, which need no more than bfloat16; the
    number and shape of the matrices decide their cost, and not the number of tokens. "auto":
    bfloat16 where the device multiplies it faster than float32, else as `dtype`, as always in runs
    of before this was a setting; a run that is resumed goes on as it began."""
    adamw_lr_ratio: float = 1.0
    """Of "muon": learning rate of what it leaves to AdamW, over `lr`."""

    @property
    def decay_steps(self) -> int:
        """Of "wsd"."""
        return round(self.decay_fraction * self.steps)

    init: str = ""
    """The model to begin with: a model folder, a run folder or a hub name; "": random weights. The
    configuration of the model and the tokenizer are then that model's."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are: "embedding", "layers.0-3", "*.router.*"; see `select`."""
    chat: bool = False
    """data.text has conversations: train on their answers alone."""

    def __post_init__(self) -> None:
        for least, names in _AT_LEAST.items():
            for name in names:
                value = getattr(self, name)
                if not least <= value < math.inf:
                    raise ConfigError(f"train.{name}={value}: must be finite and at least {least}")
        for name in ("lr", "adam_eps", "spike_threshold", "adamw_lr_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"train.{name}={getattr(self, name)}: must be positive and finite"
                )
        for name in ("beta1", "beta2", "ema_decay", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"train.{name}={getattr(self, name)}: must be at least 0 and below 1"
                )
        for name in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"train.{name}={getattr(self, name)}: must be 0 .. 1")
        if self.optimizer == "muon" and self.weights == "stochastic":
            raise ConfigError(
                "train.weights='stochastic': train.optimizer='muon' needs float32 weights or "
                "masters; use 'master'"
            )
        if self.optimizer == "adamw" and self.adamw_lr_ratio != 1:
            raise ConfigError(
                f"train.adamw_lr_ratio={self.adamw_lr_ratio:g}: of train.optimizer='muon' alone; "
                "with 'adamw' set train.lr"
            )
        if self.spikes == "rollback" and not self.checkpoint_every:
            raise ConfigError(
                "train.spikes='rollback': needs checkpoints to go back to; set "
                "train.checkpoint_every, or train.spikes='skip'"
            )
        if len(set(self.loggers)) < len(self.loggers):
            raise ConfigError(f"train.loggers={list(self.loggers)}: each may be there once")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"train.accumulate={self.accumulate}: must divide batch_size={self.batch_size}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """All that a run depends on. Equal ones give equal models on the same machine."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    """Adapters to train in place of the model's own weights."""
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.lora.rank and not self.train.init:
            raise ConfigError(
                f"lora.rank={self.lora.rank}: adapters are of a trained model; train.init names it"
            )
        if self.lora.rank and self.train.freeze:
            raise ConfigError(
                f"train.freeze={list(self.train.freeze)}: with lora.rank={self.lora.rank} all but "
                "the adapters is frozen; choose them by lora.targets"
            )
        if self.train.chat and (
            self.data.sources or self.data.token_log or self.data.packing != "stream"
        ):
            raise ConfigError(
                "train.chat=true: conversations have a packing of their own, and neither "
                "data.sources nor data.token_log"
            )
        is_learnt = self.data.tokenizer == "train" and not self.data.sources
        if is_learnt and self.data.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"data.vocab_size={self.data.vocab_size}: must be at most "
                f"model.vocab_size={self.model.vocab_size}"
            )
        if self.parallel.shard != "none" and self.train.weights in ("master", "stochastic"):
            raise ConfigError(
                f"train.weights={self.train.weights!r}: parallel.shard={self.parallel.shard!r} "
                "keeps float32 parameters and gathers them in train.dtype; use 'float32' or 'auto'"
            )
        if is_learnt and self.train.init:
            raise ConfigError(
                f"data.tokenizer='train': a run from train.init={self.train.init} needs the "
                "tokenizer of that model; load_recipe finds it"
            )


def check_ranks(config: RunConfig, ranks: Ranks) -> None:
    """See that so many ranks can do this run.

    Raises:
        ConfigError: a degree or the batch cannot be divided; a setting needs torchrun, or one
            process.
    """
    parallel, train = config.parallel, config.train
    check_fits(parallel, config.model, ranks.size, ranks.node_size)
    readers = ranks.size // parallel.sequence
    parts = readers * train.accumulate
    if ranks.size > 1 and train.batch_size % parts:
        whose = "ranks" if parallel.sequence == 1 else f"groups of {parallel.sequence} ranks"
        raise ConfigError(
            f"train.batch_size={train.batch_size}: must be a multiple of {parts}, for "
            f"{readers} {whose} of {train.accumulate} micro-batches"
        )
    least = max(1, config.model.d_conv - 1) * parallel.sequence
    if train.seq_len % parallel.sequence or train.seq_len < least:
        raise ConfigError(
            f"train.seq_len={train.seq_len}: must be a multiple of "
            f"parallel.sequence={parallel.sequence}, and at least {least}"
        )
    if train.chat and parallel.sequence > 1:
        raise ConfigError(
            f"parallel.sequence={parallel.sequence}: with train.chat=true a piece of a row may "
            "have no answer in it; set it to 1"
        )
    if parallel.cpu_offload and not ranks.is_group:
        raise ConfigError("parallel.cpu_offload=true: start the run with torchrun")
    if parallel.cpu_offload and ranks.device.type == "cpu":
        raise ConfigError("parallel.cpu_offload=true: train.device is the CPU; set it to false")
    if train.capture and ranks.is_group:
        raise ConfigError("train.capture=true: is for one process without torchrun")


def check_resumable(old: RunConfig, new: RunConfig, ranks: tuple[int, int] = (1, 1)) -> None:
    """See that `new` may go on with a run that began as `old`.

    What is learnt must stay the same: model, data, batches and optimizer. What only watches or
    saves it may change, and so may `device` and `steps` (the learning rate then goes on along the
    new cosine, so the end differs from that of a run that had these steps from its beginning). As
    many micro-batches in all are the same on any number of ranks.

    Args:
        old, new: what the run began with, and what it is to go on with.
        ranks: how many there were, and are.
    Raises:
        ConfigError: names every key that differs and may not.
    """
    differing: list[str] = []
    readers = [n // run.parallel.sequence for n, run in zip(ranks, (old, new), strict=True)]
    for part in ("model", "data", "train", "lora"):
        before, after = getattr(old, part), getattr(new, part)
        for field in dataclasses.fields(before):
            if part == "train" and field.name in _FREE_ON_RESUME:
                continue
            if (part, field.name) == ("data", "token_log"):
                continue
            was, now = getattr(before, field.name), getattr(after, field.name)
            if field.name == "accumulate" and was * readers[0] == now * readers[1]:
                continue
            if field.name in _PATHS and _found(was) == _found(now):
                continue
            if was != now:
                differing.append(f"{part}.{field.name} (was {was!r}, now {now!r})")
    if differing:
        raise ConfigError(
            f"this run began with other settings: {', '.join(differing)}; "
            "resume with the same, or begin anew in another folder"
        )


def _found(value: object) -> object:
    """What names a text or a tokenizer, with each path in one spelling."""
    if isinstance(value, str):
        return located(value)
    if isinstance(value, tuple):
        return tuple(map(_found, cast("tuple[object, ...]", value)))
    if isinstance(value, SourceConfig):
        return dataclasses.replace(
            value, path=located(value.path), text=tuple(map(located, value.text))
        )
    return value
