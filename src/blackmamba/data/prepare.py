"""From text to a prepared folder: hold out validation text, train a tokenizer, write token files.

What is held out is decided by document, from nothing but a hash of its content: a document keeps
its side whatever else is added, removed or reordered, and exact copies are on the same side. (If
that leaves a side empty, it gets the document whose hash is nearest.) Fewer documents than
1 / validation_fraction are too coarse for it, such as a single long file: they are cut in sections
of at most `SECTION_CHARACTERS`, and each section counts as a document.
"""

import dataclasses
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from blackmamba.config import to_mapping
from blackmamba.data.config import DataConfig
from blackmamba.data.holdout import document_hash
from blackmamba.data.identity import fingerprints
from blackmamba.data.packing import Packing, PackingKind
from blackmamba.data.sampler import WindowSampler
from blackmamba.data.shards import ShardedData, is_sharded
from blackmamba.data.text import Source, find_sources, sections
from blackmamba.data.tokenizer import Tokenizer
from blackmamba.data.tokens import FORMAT, Index, TokenFile, TokenWriter, dtype_for
from blackmamba.errors import DataError
from blackmamba.files import atomic_folder

SECTION_CHARACTERS = 8192
_TOKENIZER, _INDEX = "tokenizer.json", "index.json"
_TRAIN, _VALIDATION, _VALIDATION_TEXT = "train.bin", "validation.bin", "validation.txt"
_FILES = {_TOKENIZER, _INDEX, _TRAIN, _VALIDATION, _VALIDATION_TEXT}

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A prepared folder, opened."""

    folder: Path
    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile
    index: Index

    @classmethod
    def open(cls, folder: str | Path) -> "PreparedData":
        """Open a prepared folder; the text that it was made from need not be there any more.

        Raises:
            DataError: a file is missing or damaged, or two do not belong together.
        """
        folder = Path(folder)
        index = Index.read(folder / _INDEX)
        tokenizer = Tokenizer.from_file(folder / _TOKENIZER)
        if (tokenizer.fingerprint, tokenizer.n_tokens) != (index.tokenizer, index.vocab_size):
            raise DataError(f"{folder / _TOKENIZER}: not the tokenizer that the tokens are of")
        train = TokenFile(folder / _TRAIN, index, "train")
        validation = TokenFile(folder / _VALIDATION, index, "validation")
        return cls(folder, tokenizer, train, validation, index)

    @property
    def fingerprint(self) -> str:
        """Of the settings and texts that it was made from."""
        return self.index.fingerprint

    @property
    def validation_text(self) -> Path | None:
        """The file of the validation documents themselves, with a line end between each two."""
        return self.folder / _VALIDATION_TEXT

    def sampler(
        self, seq_len: int, batch_size: int, seed: int, packing: PackingKind = "stream"
    ) -> WindowSampler:
        """The rows that training reads."""
        settings = Packing(kind=packing, eot_id=self.tokenizer.eot_id)
        return WindowSampler(self.train.tokens, seq_len, batch_size, seed, settings)


def open_prepared(folder: str | Path) -> PreparedData | ShardedData:
    """Open a folder that `prepare`, `prepare_shards` or `join_parts` made.

    Raises:
        DataError: it is missing, damaged or not finished, or its files do not belong together.
    """
    folder = Path(folder)
    return ShardedData(folder) if is_sharded(folder) else PreparedData.open(folder)


def prepare(config: DataConfig, folder: str | Path) -> PreparedData:
    """Make the prepared folder for `config`, or open it where it is there already.

    It is made anew when the settings, a text's size or time, or the tokenizer have changed, or when
    it is damaged. Whatever interrupts that, `folder` is what it was before.

    Raises:
        DataError: the text or the tokenizer is missing, damaged or too little; `folder` is
            something else, or cannot be written.
    """
    folder = Path(folder)
    sources = find_sources(config.text, config.field)
    tokenizer = None if config.tokenizer == "train" else Tokenizer.load(config.tokenizer)
    fingerprint, *others = fingerprints(FORMAT, _settings(config), sources, tokenizer)
    ready = _reusable(folder, (fingerprint, *others))
    if ready is not None:
        return ready
    split = _Split(config, sources)
    if tokenizer is None:
        _logger.info("training a tokenizer of %d tokens", config.vocab_size)
        tokenizer = Tokenizer.train(split.training_documents(), config.vocab_size)
        if tokenizer.n_tokens < config.vocab_size:
            _logger.warning(
                "the text has words for only %d of %d tokens", tokenizer.n_tokens, config.vocab_size
            )
    try:
        with atomic_folder(folder) as temporary:
            _write(temporary, split, tokenizer, fingerprint)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from None
    data = PreparedData.open(folder)
    _logger.info(
        "%s: %d tokens to train on, %d held out, %.2f bytes each",
        folder, data.train.n_tokens, data.validation.n_tokens,
        data.validation.n_bytes / data.validation.n_tokens,
    )  # fmt: skip
    return data


def _settings(config: DataConfig) -> dict[str, Any]:
    """Those that decide what the prepared folder holds."""
    settings = to_mapping(config)
    if settings["field"] == "text":
        del settings["field"]  # as it was before there was a choice
    for name in ("sources", "packing", "token_log"):  # what is read later, not what is prepared
        del settings[name]
    return settings


def _reusable(folder: Path, right: Collection[str]) -> PreparedData | None:
    """What is in `folder` if it is right; never lets anything but a prepared folder be replaced."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; the prepared text needs one of its own")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if names - _FILES:
        raise DataError(
            f"{folder}: has other files, such as {min(names - _FILES)}, and will not be replaced; "
            "the prepared text needs a folder of its own"
        )
    if not names:
        return None
    try:
        data = PreparedData.open(folder)
    except DataError as error:
        _logger.warning("%s; preparing the text again", error)
        return None
    if data.index.fingerprint not in right:
        _logger.info("%s: text or settings have changed; preparing the text again", folder)
        return None
    return data


class _Split:
    """The documents of all sources, each on its side."""

    def __init__(self, config: DataConfig, sources: list[Source]):
        self._sources = sources
        self._key = str(config.split_seed).encode()
        self._in_sections = False
        n_documents, lowest, highest = self._scan()
        if n_documents * config.validation_fraction < 1 or lowest == highest:
            self._in_sections = True
            _, lowest, highest = self._scan()
        if lowest == highest:
            raise DataError(
                f"text {', '.join(config.text)}: too little to hold some out for validation; it "
                f"needs two different documents, or more than {SECTION_CHARACTERS} characters"
            )
        # Documents hashed below the limit are held out: at least the lowest, never the highest.
        limit = int(config.validation_fraction * 2**64)
        self._limit = min(max(limit, lowest + 1), highest)

    def training_documents(self) -> Iterator[str]:
        return (text for text, held_out in self.documents() if not held_out)

    def documents(self) -> Iterator[tuple[str, bool]]:
        """Each document in order, and whether it is held out."""
        return ((text, self._hash(text) < self._limit) for text in self._texts())

    def _texts(self) -> Iterator[str]:
        for source in self._sources:
            for text in source.documents():
                if self._in_sections:
                    yield from sections(text, SECTION_CHARACTERS)
                else:
                    yield text

    def _scan(self) -> tuple[int, int, int]:
        """How many documents there are, their lowest and their highest hash."""
        n_documents, lowest, highest = 0, 2**64, -1
        for text in self._texts():
            n_documents += 1
            position = self._hash(text)
            lowest, highest = min(lowest, position), max(highest, position)
        return n_documents, lowest, highest

    def _hash(self, text: str) -> int:
        return document_hash(text.encode(), self._key)


def _write(folder: Path, split: _Split, tokenizer: Tokenizer, fingerprint: str) -> None:
    (folder / _TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    with (
        TokenWriter(folder / _TRAIN, tokenizer) as train,
        TokenWriter(folder / _VALIDATION, tokenizer) as validation,
        (folder / _VALIDATION_TEXT).open("wb") as validation_text,
    ):
        between = b""
        for text, held_out in split.documents():
            if held_out:
                validation.add(text)
                validation_text.write(between + text.encode())
                between = b"\n"
            else:
                train.add(text)
        index = Index(
            format=FORMAT,
            fingerprint=fingerprint,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.n_tokens,
            dtype=dtype_for(tokenizer.n_tokens),
            train=train.finish(),
            validation=validation.finish(),
        )
    index.write(folder / _INDEX)
