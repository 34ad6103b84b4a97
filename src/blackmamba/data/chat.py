"""Conversations as token ids: the chat template, and reading them from JSON Lines.

    <end of text>user
    What is the first book?<end of text>assistant
    Genesis.<end of text>

Each turn is the end-of-text id, a line with the role, and what was said; the last is followed by
one more end of text. A tokenizer never makes that id out of text, so nothing that is said can
begin a turn; and a model that is asked to answer ends its turn as it ends any text.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from blackmamba.config import from_mapping, to_mapping
from blackmamba.data.storage import TextFile, is_folder, reading, walk
from blackmamba.errors import ConfigError, DataError

if TYPE_CHECKING:
    from blackmamba.data.tokenizer import Tokenizer

CHAT_FILE = "chat.json"
Role = Literal["system", "user", "assistant"]
_ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """What each turn begins with, behind the end-of-text id. A model folder has it as chat.json."""

    system: str = "system\n"
    user: str = "user\n"
    assistant: str = "assistant\n"

    def encode(
        self, tokenizer: "Tokenizer", messages: Sequence[Message]
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and which of them are the assistant's: its words and its end.

        Raises:
            InputError: a text is no valid Unicode.
        """
        texts = [text for message in messages for text in self.parts(message)]
        parts = iter(tokenizer.encode_batch(texts))
        ids, answers = [tokenizer.eot_id], [False]
        for message, header, content in zip(messages, parts, parts, strict=False):
            ids += [*header, *content, tokenizer.eot_id]
            is_answer = message.role == "assistant"
            answers += [False] * len(header) + [is_answer] * (len(content) + 1)
        return ids, answers

    def parts(self, message: Message) -> tuple[str, str]:
        """The two texts of a turn: what it begins with, and what is said."""
        headers = {"system": self.system, "user": self.user, "assistant": self.assistant}
        return headers[message.role], message.content

    def prompt(self, tokenizer: "Tokenizer", messages: Sequence[Message]) -> list[int]:
        """Ids to continue with an answer; the answer ends before the next end of text."""
        return self.encode(tokenizer, messages)[0] + tokenizer.encode(self.assistant)

    def to_json(self) -> str:
        """The content of its chat.json."""
        return json.dumps(to_mapping(self), indent=2) + "\n"

    @classmethod
    def beside(cls, tokenizer: Path) -> "ChatTemplate | None":
        """That of the folder that a tokenizer.json is in; None if it has none.

        Raises:
            DataError: it is damaged.
        """
        path = tokenizer.with_name(CHAT_FILE)
        if not path.is_file():
            return None
        try:
            return from_mapping(cls, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:  # a ConfigError is one
            raise DataError(f"{path}: damaged chat template ({error})") from None


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One row of a file."""

    where: str
    """File and line, for messages."""
    messages: tuple[Message, ...]
    """Up to the last of the assistant."""


def conversation_files(names: Sequence[str]) -> list[TextFile]:
    """The files that `names`, files or folders, stand for.

    Raises:
        DataError: there is none.
    """
    found: list[TextFile] = []
    for name in names:
        with reading(name):
            files = list(walk(name)) if is_folder(name) else [TextFile(name)]
            rows = [file for file in files if file.kind in (".jsonl", ".ndjson") and file.is_file]
        if not rows:
            raise DataError(f"{name}: conversations are .jsonl files, and here is none")
        found += rows
    if not found:
        raise DataError("train.chat=true: data.text must name at least one .jsonl file or folder")
    return found


def read_conversations(file: TextFile) -> Iterator[Conversation]:
    """The conversations of a JSON Lines file; empty lines are left out.

    A line is {"messages": [{"role": ..., "content": ...}, ...]}, with the roles system (first
    only), user and assistant, or {"prompt": ..., "response": ...}. Other keys are ignored.

    Raises:
        DataError: a line is anything else; it is named.
    """
    with reading(file.name), file.open() as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}:{number}"
            try:
                content = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not content.strip():
                    continue
                row: Any = json.loads(content)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 text at byte {error.start}") from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error})") from None
            yield Conversation(where, _messages(row, where))


def parse_messages(rows: object, where: str) -> tuple[Message, ...]:
    """Turns out of a list of {"role", "content"}.

    Raises:
        DataError: they are no conversation.
    """
    if not isinstance(rows, list) or not rows:
        raise DataError(f'{where}: "messages" must be a list of turns')
    messages: list[Message] = []
    for i, turn in enumerate(cast("list[Any]", rows)):
        at = f"{where}: messages[{i}]"
        if not isinstance(turn, Mapping):
            raise DataError(f'{at} must be an object with "role" and "content"')
        turn = cast("Mapping[str, Any]", turn)
        role, content = turn.get("role"), turn.get("content")
        if role not in _ROLES:
            raise DataError(f"{at}: role={role!r}: must be one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{at}: content={str(content)[:40]!r}: must be a string")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{at}: half a surrogate pair at character {error.start}") from None
        if role == "system" and i:
            raise DataError(f"{at}: role='system': must be the first turn")
        messages.append(Message(role, content))
    return tuple(messages)


def _messages(row: object, where: str) -> tuple[Message, ...]:
    keys = row.keys() if isinstance(row, dict) else set[str]()
    row = cast("dict[str, Any]", row)
    if "messages" in keys:
        messages = parse_messages(row["messages"], where)
    elif {"prompt", "response"} <= keys:
        pair = zip(("user", "assistant"), (row["prompt"], row["response"]), strict=True)
        messages = parse_messages([{"role": r, "content": c} for r, c in pair], where)
    else:
        raise DataError(
            f'{where}: must be an object with "messages", or with "prompt" and "response"'
        )
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise DataError(f"{where}: no turn of the assistant: nothing to learn from")
    return messages[: answers[-1] + 1]


def check_template(tokenizer: "Tokenizer", name: object) -> ChatTemplate:
    """The template of a model that was trained on conversations.

    Raises:
        ConfigError: it was not.
    """
    if tokenizer.chat is None:
        raise ConfigError(
            f"{name}: has no {CHAT_FILE}, as it was not trained on conversations; "
            "docs/fine-tuning.md says how"
        )
    return tokenizer.chat
