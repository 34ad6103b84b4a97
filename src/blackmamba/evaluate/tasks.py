"""Tasks of lm-evaluation-harness by name, with data from local files where there are some.

A task TASK finds its data in a folder as TASK.jsonl, an object a line with the fields that its data
set has; for some, files as they are passed around are understood too (`_KNOWN_FILES`). Prompts and
metrics are the harness's own either way.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blackmamba.errors import ConfigError, DataError

TASK_LISTS = {
    "paper": (
        "hellaswag", "piqa", "winogrande",
        "lambada_openai", "arc_easy", "arc_challenge", "openbookqa", "boolq",
    ),
}  # fmt: skip
"""Names for several tasks. "paper": eight zero-shot tasks; that the paper has the first three is
sourced, the other five are what is remembered of it."""

_KNOWN_FILES = {
    "lambada_openai": ("lambada_test.jsonl",),
    "piqa": ("piqa_valid.jsonl", "valid.jsonl"),
    "hellaswag": ("hellaswag_val*.jsonl",),
}

Doc = dict[str, Any]


def named_tasks(names: Sequence[str]) -> list[str]:
    """Each task once, lists by their tasks.

    Raises:
        ConfigError: there is no name.
    """
    found = [task for name in names for task in TASK_LISTS.get(name, (name,))]
    if not found:
        raise ConfigError(f"no task: name some, or a list such as {', '.join(TASK_LISTS)}")
    return list(dict.fromkeys(found))


def local_docs(task: str, folder: Path) -> list[Doc] | None:
    """The documents of a task in a folder of local data; None if it has none.

    Raises:
        DataError: a file is damaged.
    """
    for pattern in (f"{task}.jsonl", *_KNOWN_FILES.get(task, ())):
        for path in sorted(folder.glob(pattern)):
            docs = _read(path)
            labels = path.with_name(f"{path.stem}-labels.lst")
            if task == "piqa" and labels.exists():
                docs = _labelled(docs, labels)
            return docs
    return None


@functools.lru_cache(maxsize=4)
def known_tasks(include: str) -> Any:
    """lm_eval's index of its own task files and those in a folder ("": none): seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include or None)


def local_task(task: str, docs: list[Doc], known: Any) -> dict[str, Any]:
    """What lm-evaluation-harness takes for a task in place of its name, to read `docs`."""
    import datasets

    config: Mapping[str, Any] = known.task_index[task].cfg or {}
    split = "test" if config.get("test_split") else "validation"
    own: dict[str, Any] = {
        "task": task,
        "custom_dataset": _Local({split: datasets.Dataset.from_list(docs)}),
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        "fewshot_split": split,
    }
    own[f"{split}_split"] = split
    if task == "hellaswag" and "query" in docs[0]:  # prepared already
        own |= {"process_docs": None, "doc_to_target": "gold"}
    return {"group": f"{task}_local", "task": [own]}  # in a group, the rest is as its own file says


class _Local:
    """What the harness calls for a task's data."""

    def __init__(self, splits: Mapping[str, Any]):
        self._splits = splits

    def __call__(self, **_: Any) -> Mapping[str, Any]:
        return self._splits

    def __deepcopy__(self, _: Any) -> "_Local":
        return self


def _read(path: Path) -> list[Doc]:
    docs = list(_lines(path, _object))
    if not docs:
        raise DataError(f"{path}: no line; a task needs at least one")
    return docs


def _labelled(docs: list[Doc], path: Path) -> list[Doc]:
    labels = list(_lines(path, int))
    if len(labels) != len(docs):
        raise DataError(f"{path}: {len(labels)} labels for {len(docs)} questions")
    return [{**doc, "label": label} for doc, label in zip(docs, labels, strict=True)]


def _lines(path: Path, parse: Callable[[str], Any]) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield parse(line)
            except ValueError:
                raise DataError(f"{path}: line {number} is damaged") from None


def _object(line: str) -> Doc:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError
    return value
