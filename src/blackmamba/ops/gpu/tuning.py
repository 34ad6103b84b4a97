"""How kernels are cut, chosen by measuring on the GPU at hand, and kept on disk.

Nothing is measured unasked: a kernel has a default that was chosen on an H100 or H200, and `pick`
gives it where nothing better is kept for this GPU. Within `measuring`, which `blackmamba tune`
uses, `pick` times all candidates where they are first called, with the tensors of that call.
Another cut adds numbers up in another order: results differ in their last bits.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import re
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from blackmamba.files import write_text
from blackmamba.ops import gpu
from blackmamba.ops.gpu.cuda import kept_kernels
from blackmamba.version import __version__

_logger = logging.getLogger(__name__)

WORTHWHILE = 0.98
"""A candidate takes the default's place if it needs at most this share of its time."""

_REPEATS = 9
_FLUSHED_BYTES = 1 << 28  # more than any cache holds
_HEAD_START = 10_000_000  # clock cycles, some 6 ms: the host queues all launches meanwhile


class Cut(Protocol):
    """A frozen dataclass of whole numbers."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


C = TypeVar("C", bound=Cut)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found for one kernel at one size."""

    kernel: str
    size: str
    default: Cut
    chosen: Cut
    default_s: float
    chosen_s: float
    n_candidates: int


def pick(
    kernel: str,
    size: str,
    default: C,
    candidates: Callable[[], Sequence[C]],
    run: Callable[[C], object],
) -> C:
    """The cut to launch a kernel with.

    Args:
        kernel: its name, of all kernels of the package.
        size: what the choice depends on, such as "l=2048 d=2304".
        default: where nothing is kept.
        candidates: what may be chosen instead; called seldom.
        run: launch the kernel so cut; may be called any number of times.
    """
    session = _Sessions.current
    if session is not None:
        return session.pick(kernel, size, default, candidates, run)
    if not (kept := _kept(_device())):
        return default
    if (found := kept.get((kernel, size))) is None:
        return default
    if isinstance(found, dict):  # as it was read: nobody has asked for it yet
        found = next((c for c in candidates() if dataclasses.asdict(c) == found), default)
        kept[kernel, size] = found
    return found


def rounded(n: int) -> int:
    """The power of two at or above n: sizes that share a choice."""
    return 1 << max(0, n - 1).bit_length()


# ---- measuring -----------------------------------------------------------------------------------


def seconds(run: Callable[[], object]) -> float:
    """Median time that the GPU takes, with its caches emptied before each call."""
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    run()
    torch.cuda.synchronize()
    found: list[float] = []
    for _ in range(_REPEATS):
        flushed.zero_()
        torch.cuda._sleep(_HEAD_START)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


class Session:
    """Measures each kernel at each size once.

    Args:
        measure: seconds of a call.
        on_measured: is told of each kernel and size.
    """

    def __init__(
        self,
        measure: Callable[[Callable[[], object]], float] = seconds,
        on_measured: Callable[[Measured], object] = lambda _: None,
    ):
        self.found: dict[tuple[str, str], Measured] = {}
        self._measure = measure
        self.on_measured = on_measured

    def pick(
        self,
        kernel: str,
        size: str,
        default: C,
        candidates: Callable[[], Sequence[C]],
        run: Callable[[C], object],
    ) -> C:
        """`tuning.pick`."""
        known = self.found.get((kernel, size))
        if known is not None:
            chosen: Any = known.chosen
            return chosen
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return default
        times: dict[C, float] = {}
        for cut in dict.fromkeys((default, *candidates())):
            try:
                times[cut] = self._measure(functools.partial(run, cut))
            except _refusals() as error:
                if cut == default:
                    raise
                _logger.info("%s, %s, %s: %s", kernel, size, cut, error)
        chosen = min(times, key=times.__getitem__)
        if times[chosen] > WORTHWHILE * times[default]:
            chosen = default
        result = Measured(
            kernel, size, default, chosen, times[default], times[chosen], len(times)
        )  # fmt: skip
        self.found[kernel, size] = result
        self.on_measured(result)
        return chosen


class _Sessions:
    current: Session | None = None  # of all threads: gradients have one of their own


@contextlib.contextmanager
def measuring(session: Session) -> Generator[Session]:
    """Every `pick` measures within the block."""
    assert _Sessions.current is None
    _Sessions.current = session
    try:
        yield session
    finally:
        _Sessions.current = None


def _refusals() -> tuple[type[Exception], ...]:
    """What is raised of a cut that this GPU cannot run: too much shared memory, say."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError, RuntimeError


# ---- what is kept --------------------------------------------------------------------------------


def path() -> Path:
    """The file of the current GPU's choices; it may be removed at any time."""
    return _path(_device())


def keep(session: Session) -> Path:
    """Put what differs from the defaults on disk, beside what was kept of other sizes.

    Raises:
        OSError: the file cannot be written.
    """
    kept = {name: _as_dict(cut) for name, cut in _kept(_device()).items()}
    for name, result in session.found.items():
        kept.pop(name, None)
        if result.chosen != result.default:
            kept[name] = dataclasses.asdict(result.chosen)
    choices: dict[str, dict[str, Any]] = {}
    for (kernel, size), cut in sorted(kept.items()):
        choices.setdefault(kernel, {})[size] = cut
    text = json.dumps({"made_with": _versions(_device()), "choices": choices}, indent=2)
    write_text(path(), text + "\n")
    _kept.cache_clear()
    return path()


def forget() -> bool:
    """Remove what was kept for the current GPU; whether there was anything."""
    found = path().exists()
    path().unlink(missing_ok=True)
    _kept.cache_clear()
    return found


def describe() -> str:
    """One line for `blackmamba doctor`."""
    if gpu.missing() is not None:
        return "none"
    n = len(_kept(_device()))
    return f"{n} sizes, {path()}" if n else "defaults; `blackmamba tune` measures others"


_Choices = dict[tuple[str, str], Any]  # options as they were read, or the cut that they name


@functools.cache
def _kept(device: int) -> _Choices:
    file = _path(device)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["made_with"] != _versions(device):
            _logger.info("%s: made with %s; not used", file, content["made_with"])
            return {}
        return {
            (kernel, size): {str(name): int(value) for name, value in cut.items()}
            for kernel, sizes in content["choices"].items()
            for size, cut in sizes.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _logger.warning("%s: cannot be read (%s); kernels are cut by default", file, error)
        return {}


def _as_dict(cut: Any) -> Mapping[str, int]:
    return cut if isinstance(cut, dict) else dataclasses.asdict(cut)


def _device() -> int:
    """The current GPU's index; -1 where kernels are interpreted."""
    return torch.cuda.current_device() if torch.cuda.is_available() else -1


def _name(device: int) -> str:
    return torch.cuda.get_device_name(device) if device >= 0 else "interpreted"


def _path(device: int) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", _name(device).lower()).strip("-")
    return kept_kernels().with_name("tuning") / f"{slug}.json"


def _versions(device: int) -> dict[str, str]:
    import triton

    return {
        "blackmamba": __version__,
        "gpu": _name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
