"""Run tasks of lm-evaluation-harness on a model and give their scores."""

import contextlib
import dataclasses
import io
import logging
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from blackmamba.data import Tokenizer
from blackmamba.errors import BlackMambaError, ConfigError, DataError
from blackmamba.evaluate import hub
from blackmamba.evaluate.tasks import known_tasks, local_docs, local_task, named_tasks
from blackmamba.model import BlackMamba


@dataclasses.dataclass(frozen=True)
class Score:
    """One number of one task."""

    task: str
    metric: str
    value: float
    stderr: float
    """Of the mean over the documents; NaN where the harness gives none."""
    n_docs: int
    is_better_higher: bool


def evaluate(
    model: BlackMamba,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    include: str | Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_tokens: int = 4096,
    max_length: int = 0,
    show_progress: bool = False,
) -> list[Score]:
    """Score a model on tasks of lm-evaluation-harness, with its prompts and metrics.

    Args:
        model: its weights are as they are; it is put in evaluation mode.
        tokenizer: the model's.
        tasks: names that the harness knows, "paper" (see `TASK_LISTS`), or those of `include`.
        data: folder of local data, see `blackmamba.evaluate.tasks`; what it lacks the harness
            downloads. Without a network that is looked for in the harness's cache.
        include: folder of a user's own task files, in the harness's YAML.
        few_shot: examples before each question; None: as the task says, which is mostly none.
        limit: no more documents of a task than this.
        batch_tokens, max_length: see `BlackMambaLM`.
        show_progress: draw bars on the standard error.
    Returns:
        The tasks in order, each with its metrics in the harness's order.
    Raises:
        ConfigError: lm_eval is not installed, or an unknown task or a wrong argument.
        DataError: a task's data is damaged or cannot be had.
    """
    for name, value in (("few_shot", few_shot), ("limit", limit)):
        if value is not None and value < (name == "limit"):
            raise ConfigError(f"{name}={value}: must be at least {int(name == 'limit')}")
    try:
        import lm_eval
    except ImportError:
        raise ConfigError(
            "evaluation tasks: lm_eval is not installed; pip install 'blackmamba[eval]'"
        ) from None
    from blackmamba.evaluate.harness import BlackMambaLM

    names = named_tasks(tasks)
    run: Any = lm_eval.simple_evaluate  # its decorator hides its arguments
    manager = known_tasks("" if include is None else str(include))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"unknown task {unknown[0]!r}; `lm-eval ls tasks` lists them all")
    harness = BlackMambaLM(
        model,
        tokenizer,
        batch_tokens=batch_tokens,
        max_length=max_length,
        show_progress=show_progress,
    )
    docs = {name: None if data is None else local_docs(name, _folder(data)) for name in names}
    lacking = [name for name in names if docs[name] is None]
    is_alone = bool(lacking) and not hub.answers()
    scores: list[Score] = []
    with (
        contextlib.nullcontext() if show_progress else _silent(),
        hub.offline() if is_alone else contextlib.nullcontext(),
    ):
        if is_alone:
            _check_cached(lacking, manager)
        for name in names:
            own = docs[name]
            try:
                found: Any = run(
                    harness,
                    tasks=[name if own is None else local_task(name, own, manager)],
                    num_fewshot=few_shot,
                    limit=limit,
                    task_manager=manager,
                    bootstrap_iters=1000,
                    log_samples=False,
                )
            except BlackMambaError:
                raise
            except Exception as error:  # whatever a download of another library may raise
                if own is not None:
                    raise DataError(
                        f"task {name}: its local data does not fit ({error!r})"
                    ) from None
                raise DataError(
                    f"task {name}: its data set cannot be had here ({_first_line(error)}); "
                    f"{_remedy([name])}"
                ) from None
            scores += _scores(found)
    return scores


def _check_cached(names: Sequence[str], manager: Any) -> None:
    """Refuse tasks whose data sets are in no cache, all at once and before any is scored."""
    reasons: dict[str, str] = {}
    for name in names:
        try:
            manager.load([name])
        except Exception as error:  # as above
            reasons[name] = _first_line(error)
    if reasons:
        which = f"task{'s' if len(reasons) > 1 else ''} {', '.join(reasons)}"
        raise DataError(
            f"{which}: the Hugging Face hub does not answer, and its cache here has no such data "
            f"({next(iter(reasons.values()))}); {_remedy(list(reasons))}"
        )


def _remedy(names: Sequence[str]) -> str:
    files = f"{names[0]}.jsonl" if len(names) == 1 else "TASK.jsonl of each"
    return f"put {files} into a folder and give that as data (--data FOLDER): docs/evaluation.md"


def _scores(found: dict[str, Any]) -> list[Score]:
    """The harness's table as rows."""
    rows: list[Score] = []
    for task, results in found["results"].items():
        higher = found.get("higher_is_better", {}).get(task, {})
        n_docs = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
        for key, value in results.items():
            metric, comma, which = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = results.get(f"{metric}_stderr,{which}", math.nan)
            rows.append(
                Score(
                    task=task,
                    metric=metric,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else math.nan,
                    n_docs=n_docs,
                    is_better_higher=bool(higher.get(metric, True)),
                )
            )
    return rows


@contextlib.contextmanager
def _silent() -> Generator[None]:
    """Without the harness's bars and its remarks on every task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of local data")
    return folder


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
