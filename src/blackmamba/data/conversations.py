"""Conversations to batches: prepared once, packed in rows, only answers predicted.

A prepared folder:

    tokenizer.json   chat.json   index.json   validation.txt (the held out answers)
    train.ids.npy   train.answers.npy   train.starts.npy   and the same of validation

Letters: `b` batch, `l` sequence.
"""

import bisect
import dataclasses
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blackmamba.config import from_mapping, to_mapping
from blackmamba.data.chat import (
    CHAT_FILE,
    ChatTemplate,
    conversation_files,
    read_conversations,
)
from blackmamba.data.holdout import document_hash
from blackmamba.data.packing import IGNORED, Batch, rows_of_rank
from blackmamba.data.prepare import DataConfig
from blackmamba.data.tokenizer import Tokenizer
from blackmamba.errors import ConfigError, DataError, InputError
from blackmamba.files import atomic_folder

FORMAT = 1
_SPLITS = ("train", "validation")
_ARRAYS = {"ids": np.uint32, "answers": np.bool_, "starts": np.int64}
_logger = logging.getLogger(__name__)
Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChatIndex:
    """What index.json says of its folder."""

    chat_format: int
    fingerprint: str
    """Of the settings, files and tokenizer that it was made from."""
    tokenizer: str
    n_validation_bytes: int
    """UTF-8 bytes of the held out answers."""


@dataclasses.dataclass(frozen=True)
class Conversations:
    """One split; conversation i is ids[starts[i]:starts[i + 1]]."""

    ids: Array
    answers: Array
    """(n_tokens,) bool: what the assistant said, and the end of its turns."""
    starts: Array

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> tuple[Array, Array]:
        part = slice(self.starts[i], self.starts[i + 1])
        return self.ids[part].astype(np.int64), self.answers[part]


@dataclasses.dataclass(frozen=True)
class ChatData:
    """A prepared folder of conversations, opened."""

    folder: Path
    tokenizer: Tokenizer
    train: Conversations
    validation: Conversations
    index: ChatIndex

    @classmethod
    def open(cls, folder: str | Path) -> "ChatData":
        """Open a prepared folder; the files that it was made from need not be there any more.

        Raises:
            DataError: a file is missing or damaged, or two do not belong together.
        """
        folder = Path(folder)
        path = folder / "index.json"
        try:
            index = from_mapping(ChatIndex, json.loads(path.read_text(encoding="utf-8")))
            train, validation = (_open_split(folder, split) for split in _SPLITS)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{folder}: no readable conversations ({error})") from None
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        if index.chat_format != FORMAT or tokenizer.fingerprint != index.tokenizer:
            raise DataError(f"{folder}: of another format, or not of its tokenizer")
        for split in (train, validation):
            sizes = {len(split.ids), len(split.answers), int(split.starts[-1])}
            if len(sizes) > 1 or int(split.ids.max()) >= tokenizer.n_tokens:
                raise DataError(f"{folder}: its files do not belong together; they are damaged")
        return cls(folder, tokenizer, train, validation, index)

    @property
    def fingerprint(self) -> str:
        """Of the settings and files that it was made from."""
        return self.index.fingerprint

    @property
    def validation_text(self) -> Path:
        """The file of the held out answers, with a line end between each two."""
        return self.folder / "validation.txt"

    def sampler(self, seq_len: int, batch_size: int, seed: int) -> "ConversationSampler":
        """The rows that training reads."""
        return ConversationSampler(self.train, seq_len, batch_size, seed, self.tokenizer.eot_id)

    def validation_batches(
        self, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Whole held out conversations, right-padded: input_ids and labels (b, l), lengths (b,)."""
        order = np.argsort(np.diff(self.validation.starts), kind="stable")
        for first in range(0, len(order), batch_size):
            chosen = [self.validation[i] for i in order[first : first + batch_size]]
            lengths = torch.tensor([len(ids) - 1 for ids, _ in chosen])
            rows = _Rows(len(chosen), int(lengths.max()), self.tokenizer.eot_id)
            for row, (ids, answers) in enumerate(chosen):
                rows.put(row, 0, 0, ids, answers)
            yield rows.input_ids, rows.labels, lengths


def _open_split(folder: Path, split: str) -> Conversations:
    arrays = (
        np.load(folder / f"{split}.{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in _ARRAYS
    )
    return Conversations(*arrays)


def prepare_conversations(config: DataConfig, folder: str | Path) -> ChatData:
    """Make the prepared folder for `config`, or open it where it is there already.

    All conversations are in memory while it is made.

    Raises:
        DataError: a file is missing, a line of one is wrong, there are fewer than two
            conversations, or `folder` cannot be written.
    """
    folder = Path(folder)
    files = conversation_files(config.text)
    given = None if config.tokenizer == "train" else Tokenizer.load(config.tokenizer)
    template = (given.chat if given else None) or ChatTemplate()
    fingerprint = hashlib.sha256(json.dumps([
        FORMAT, [file.state() for file in files], to_mapping(template), given and given.fingerprint,
        config.vocab_size if given is None else 0, config.validation_fraction, config.split_seed,
    ]).encode()).hexdigest()  # fmt: skip
    if (folder / "index.json").is_file():
        try:
            ready = ChatData.open(folder)
            if ready.fingerprint == fingerprint:
                return ready
        except DataError as error:
            _logger.warning("%s; preparing the conversations again", error)
    found = [c for file in files for c in read_conversations(file)]
    if len(found) < 2:
        raise DataError(
            f"{', '.join(config.text)}: {len(found)} conversations: must be at least 2, one to "
            "train on and one to hold out"
        )
    texts = (text for c in found for m in c.messages for text in template.parts(m))
    tokenizer = given or Tokenizer.train(texts, config.vocab_size)
    tokenizer.chat = template
    key = str(config.split_seed).encode()
    hashes = [
        document_hash(json.dumps([(m.role, m.content) for m in c.messages]).encode(), key)
        for c in found
    ]
    # At least the lowest is held out, never the highest.
    limit = int(config.validation_fraction * 2**64)
    limit = min(max(limit, min(hashes) + 1), max(hashes))
    if min(hashes) == max(hashes):
        raise DataError(f"{', '.join(config.text)}: all conversations are the same")
    encoded = [template.encode(tokenizer, c.messages) for c in found]
    answers = "\n".join(
        m.content
        for c, number in zip(found, hashes, strict=True)
        if number < limit
        for m in c.messages
        if m.role == "assistant"
    ).encode()
    try:
        with atomic_folder(folder) as temporary:
            for split in _SPLITS:
                kept = [
                    one
                    for one, number in zip(encoded, hashes, strict=True)
                    if (number < limit) == (split == "validation")
                ]
                _write(temporary, split, kept)
            (temporary / "validation.txt").write_bytes(answers)
            (temporary / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
            (temporary / CHAT_FILE).write_text(template.to_json(), encoding="utf-8")
            index = ChatIndex(
                chat_format=FORMAT,
                fingerprint=fingerprint,
                tokenizer=tokenizer.fingerprint,
                n_validation_bytes=max(1, len(answers)),
            )
            text = json.dumps(to_mapping(index), indent=2) + "\n"
            (temporary / "index.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return ChatData.open(folder)


def _write(folder: Path, split: str, conversations: list[tuple[list[int], list[bool]]]) -> None:
    arrays = {
        "ids": [i for ids, _ in conversations for i in ids],
        "answers": [a for _, answers in conversations for a in answers],
        "starts": np.cumsum([0, *(len(ids) for ids, _ in conversations)]),
    }
    for name, dtype in _ARRAYS.items():
        np.save(folder / f"{split}.{name}.npy", np.asarray(arrays[name], dtype))


class ConversationSampler:
    """Training batches as a pure function of (seed, step): there is no state to save.

    A conversation that is longer than a row is cut behind its last answer that fits, and left out
    if none does. Conversations are packed once: longest first, each in the fullest row that has
    room. Every epoch reads all rows in an order of its own. `seq_idx` keeps the conversations of a
    row apart; labels are those of answers alone. Every row has at least one.

    Args:
        conversations: of the training split.
        seq_len: l, inputs of a row.
        batch_size: b, rows of a batch, over all ranks.
        seed: at least 0.
        eot_id: what the end of a row is filled with.

    Attributes:
        n_rows: of an epoch.
        n_cut, n_left_out: conversations that are too long for a row.
    Raises:
        ConfigError: an argument is out of range.
        DataError: no conversation fits in a row.
    """

    def __init__(
        self, conversations: Conversations, seq_len: int, batch_size: int, seed: int, eot_id: int
    ):
        for name, value, least in (("seq_len", seq_len, 1), ("batch_size", batch_size, 1),
                                   ("seed", seed, 0)):  # fmt: skip
            if value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")
        self._conversations, self._eot_id = conversations, eot_id
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed
        self.n_cut = self.n_left_out = 0
        self._lengths = self._cut()
        n = len(conversations)
        if self.n_left_out == n:
            raise DataError(
                f"train.seq_len={seq_len}: not one of {n} conversations has an answer within it; "
                "use a larger one"
            )
        if self.n_cut or self.n_left_out:
            _logger.warning(
                "of %d conversations %d are cut behind an answer and %d left out, as they are "
                "longer than train.seq_len=%d", n, self.n_cut, self.n_left_out, seq_len,
            )  # fmt: skip
        self._rows = self._packed()
        self.n_rows = len(self._rows)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """A rank's slice of the batch of training step `step`, counted from 0.

        Raises:
            ConfigError: batch_size is no multiple of world_size.
            InputError: step is negative.
        """
        if step < 0:
            raise InputError(f"step={step}: must be at least 0")
        numbers = rows_of_rank(step, self._batch_size, rank, world_size)
        rows = _Rows(len(numbers), self._seq_len, self._eot_id)
        for row, number in enumerate(numbers):
            place = 0
            for nth, i in enumerate(self._rows[self._row_of(*divmod(number, self.n_rows))]):
                ids, answers = self._conversations[i]
                n = self._lengths[i]
                rows.put(row, place, nth, ids[: n + 1], answers[: n + 1])
                place += n
        return Batch(rows.input_ids, rows.labels, rows.seq_idx)

    def _row_of(self, epoch: int, place: int) -> int:
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox([self._seed, epoch]))
            self._epoch, self._order = epoch, random.permutation(self.n_rows)
        return int(self._order[place])

    def _cut(self) -> list[int]:
        """Inputs of each conversation in a row; 0: it is left out."""
        data, lengths = self._conversations, list[int]()
        following = np.append(np.asarray(data.answers[1:]), False)
        ends = np.flatnonzero(np.asarray(data.answers) & ~following)  # ends of answers
        for i in range(len(data)):
            start, stop = int(data.starts[i]), int(data.starts[i + 1])
            most = min(stop - start, self._seq_len + 1)
            last = int(np.searchsorted(ends, start + most)) - 1
            n = int(ends[last]) - start if last >= 0 and ends[last] > start else 0
            lengths.append(n)
            self.n_left_out += n == 0
            self.n_cut += 0 < n < stop - start - 1
        return lengths

    def _packed(self) -> list[list[int]]:
        """Which conversations each row has: best fit, longest first, equal ones in random order."""
        lengths = np.array(self._lengths)
        random = np.random.Generator(np.random.Philox([self._seed]))
        order = random.permutation(len(lengths))
        order = order[np.argsort(-lengths[order], kind="stable")]
        rows: list[list[int]] = []
        rooms: list[int] = []  # sizes of free room that some row has, ascending
        with_room: dict[int, list[int]] = defaultdict(list)
        for i in order[lengths[order] > 0].tolist():
            n = self._lengths[i]
            at = bisect.bisect_left(rooms, n)
            if at == len(rooms):
                row, room = len(rows), self._seq_len
                rows.append([])
            else:
                room = rooms[at]
                row = with_room[room].pop()
                if not with_room[room]:
                    del rooms[at]
            rows[row].append(i)
            room -= n
            if room:
                if not with_room[room]:
                    bisect.insort(rooms, room)
                with_room[room].append(row)
        return rows


class _Rows:
    """Rows that conversations are put in."""

    def __init__(self, n_rows: int, seq_len: int, eot_id: int):
        self.input_ids = torch.full((n_rows, seq_len), eot_id, dtype=torch.int64)
        self.labels = torch.full((n_rows, seq_len), IGNORED, dtype=torch.int64)
        self.seq_idx = torch.full((n_rows, seq_len), seq_len, dtype=torch.int32)

    def put(self, row: int, place: int, nth: int, ids: Array, answers: Array) -> None:
        """The inputs of a conversation, as number `nth` of its row, and labels of its answers."""
        part = slice(place, place + len(ids) - 1)
        self.input_ids[row, part] = torch.from_numpy(ids[:-1])
        labels = np.where(answers[1:], ids[1:], IGNORED)
        self.labels[row, part] = torch.from_numpy(labels)
        self.seq_idx[row, part] = nth
