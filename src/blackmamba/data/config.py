"""Which data a run trains on: texts, or a mixture of named sources; and what shards are made of."""

import dataclasses
import math

from blackmamba.data.packing import PackingKind
from blackmamba.data.tokenizer import MIN_VOCAB_SIZE
from blackmamba.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source of a mixture, and how much of the training comes from it."""

    name: str
    path: str = ""
    """A prepared folder (`blackmamba data prepare`, or the data/ of a run) ..."""
    text: tuple[str, ...] = ()
    """... or texts, prepared inside of the run with the mixture's tokenizer."""
    weight: float = 0.0
    """Share of the training tokens, in any unit: weights are divided by their sum."""
    max_epochs: float = 0.0
    """No token is read more often; the other sources then share what is left. 0: no limit."""

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise ConfigError(f"source name {self.name!r}: must be letters, digits, - and _")
        if bool(self.path) == bool(self.text):
            raise ConfigError(f"source {self.name}: must have either a path or a text")
        for field in ("weight", "max_epochs"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ConfigError(
                    f"source {self.name}: {field}={getattr(self, field)}: must be at least 0"
                )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text, how it becomes tokens, how much of it is held out, and how rows are read."""

    text: tuple[str, ...] = ()
    """Files, folders, URLs, "corpus:bible", ...; see `iter_documents`."""
    tokenizer: str = "train"
    """"train": learnt from the training text; else a tokenizer.json, its folder or a hub name.
    A mixture with prepared folders has theirs."""
    vocab_size: int = 4096
    """Tokens of a trained tokenizer; one that is given brings its own."""
    validation_fraction: float = 0.05
    """Expected share of the documents that is held out; prepared folders have theirs."""
    split_seed: int = 0
    """Another seed holds out other documents."""
    field: str = "text"
    """What rows of JSON Lines, parquet and data sets call their text."""
    sources: tuple[SourceConfig, ...] = ()
    """A mixture, in the place of `text`."""
    packing: PackingKind = "stream"
    """Whether the documents of a row are told apart; see `Packing`."""
    token_log: bool = False
    """Write down which windows each step read; see `TokenLog`."""

    def __post_init__(self) -> None:
        if isinstance(self.text, str) or not all(self.text) or not (self.text or self.sources):
            raise ConfigError(f"text={self.text!r}: must be a list of files, folders or corpora")
        if not self.tokenizer:
            raise ConfigError('tokenizer="": must be "train", a path or a hub name')
        if not self.field:
            raise ConfigError('field="": must be the name of what rows have their text in')
        if self.tokenizer == "train" and self.vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(f"vocab_size={self.vocab_size}: must be at least {MIN_VOCAB_SIZE}")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction={self.validation_fraction}: must be between 0 and 1"
            )
        if self.split_seed < 0:
            raise ConfigError(f"split_seed={self.split_seed}: must be at least 0")
        if self.sources:
            self._check_sources()

    def _check_sources(self) -> None:
        if self.text:
            raise ConfigError("data has both text and sources: give one of them")
        names = [source.name for source in self.sources]
        double = {name for name in names if names.count(name) > 1}
        if double:
            raise ConfigError(f"source name {min(double)!r}: given more than once")
        without = [source.name for source in self.sources if source.weight == 0]
        if without:
            raise ConfigError(
                f"sources without a weight: {', '.join(without)}; say which share of the training "
                f"tokens each gives, such as data.sources.{without[0]}.weight=0.2, or leave it out"
            )
        if self.tokenizer == "train" and not any(source.path for source in self.sources):
            raise ConfigError(
                "data.tokenizer='train': a mixture of texts needs a given tokenizer, or a source "
                "that is prepared"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardConfig:
    """Which text, how it becomes tokens, and what the shards are like."""

    text: tuple[str, ...]
    """As `iter_documents` takes them."""
    field: str = "text"
    """What rows of JSON Lines, parquet and data sets call their text."""
    tokenizer: str = "train"
    """"train": learnt from a sample of the text; else as in `DataConfig`."""
    vocab_size: int = 4096
    """Tokens of a trained tokenizer."""
    sample_mb: float = 64.0
    """Million characters that a tokenizer is trained on."""
    validation_fraction: float = 0.01
    """Expected share of the documents that is held out; 0: none."""
    split_seed: int = 0
    """Another seed holds out other documents."""
    shard_mb: float = 256.0
    """Million bytes of ids after which a shard ends."""
    part: int = 0
    """Which share of the text this is, counted from 0 ..."""
    n_parts: int = 1
    """... of how many: file number i is in part i % n_parts."""

    def __post_init__(self) -> None:
        if isinstance(self.text, str) or not self.text or not all(self.text):
            raise ConfigError(f"text={self.text!r}: must be a list of files, folders, URLs, ...")
        if not self.tokenizer or not self.field:
            raise ConfigError("tokenizer and field: must not be empty")
        if self.tokenizer == "train" and self.vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(f"vocab_size={self.vocab_size}: must be at least {MIN_VOCAB_SIZE}")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction={self.validation_fraction}: must be at least 0 and below 1"
            )
        for name in ("sample_mb", "shard_mb"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive and finite")
        if self.split_seed < 0:
            raise ConfigError(f"split_seed={self.split_seed}: must be at least 0")
        if not 0 <= self.part < self.n_parts:
            raise ConfigError(f"part {self.part} of {self.n_parts}: must be 0 .. n_parts - 1")
        if self.n_parts > 1 and self.tokenizer == "train":
            raise ConfigError(
                f"part {self.part} of {self.n_parts}: each would train a tokenizer of its own; "
                "give all the same one"
            )

    @property
    def part_folder(self) -> str:
        """Where in the whole's folder this part belongs."""
        return "." if self.n_parts == 1 else f"part-{self.part:05}-of-{self.n_parts:05}"
