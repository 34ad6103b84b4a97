"""Where else a run's numbers go than metrics.jsonl: TensorBoard, Weights & Biases, trackio.

Each is a package of its own, imported only when it is asked for.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from blackmamba.config import to_mapping
from blackmamba.errors import ConfigError

LoggerName = Literal["tensorboard", "wandb", "trackio"]
_MODULES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}
_EXTRAS = {"tensorboard": "train", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "blackmamba"


class Logger(Protocol):
    """Takes the numbers of steps."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add those of a step."""
        ...

    def close(self) -> None:
        """Nothing comes any more."""
        ...


def check_loggers(names: Sequence[LoggerName]) -> None:
    """See that all of them can be opened.

    Raises:
        ConfigError: one is not installed.
    """
    for name in names:
        _module(name)


def open_loggers(
    names: Sequence[LoggerName], folder: Path, *, step: int, config: Any
) -> list[Logger]:
    """Begin, or go on with, the records of the run in `folder`.

    Args:
        names: which ones.
        folder: of the run. Its name is the run's.
        step: steps that are done; what was recorded of later ones is void.
        config: the run's, a dataclass.
    Raises:
        ConfigError: one is not installed.
    """
    return [_KINDS[name](_module(name), folder, step, config) for name in names]


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, module: Any, folder: Path, step: int, config: Any):
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project "blackmamba", named as its folder; WANDB_MODE=offline keeps it here.

    What is sent cannot be taken back: steps after a resume or a roll-back are there twice.
    """

    def __init__(self, module: Any, folder: Path, step: int, config: Any):
        path = folder.resolve()
        self._run = module.init(
            project=_PROJECT,
            name=path.name,
            id=_identity(path),
            dir=str(path),
            config=to_mapping(config),
            resume="allow",
            settings={"console": "off"},  # the terminal is the progress bar's
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of the project "blackmamba" in trackio's own local database, named as its folder."""

    def __init__(self, module: Any, folder: Path, step: int, config: Any):
        path = folder.resolve()
        self._run = module.init(
            project=_PROJECT, name=path.name, config=to_mapping(config), resume="allow"
        )
        self._finish = module.finish

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._finish()


_KINDS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def _identity(path: Path) -> str:
    """The same for the same folder."""
    import hashlib

    return hashlib.sha256(str(path).encode()).hexdigest()[:16]


def _module(name: LoggerName) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError:
        raise ConfigError(
            f"train.loggers: {name} is not installed; "
            f"pip install 'blackmamba[{_EXTRAS[name]}]', or leave it out of train.loggers"
        ) from None
