"""A record of what each step read, to prove that no token was seen twice or skipped."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from blackmamba.data.packing import Window
from blackmamba.errors import DataError


class TokenLog:
    """Appends a JSON object a step to tokens-RANK.jsonl; a context manager.

        {"step": 7, "windows": [["pile", 0, 81920], ...]}

    `step` counts from 0; a window is its source, epoch and first token. A run that is resumed reads
    the steps after its checkpoint again, so a step may have several lines: the last one counts, and
    all are equal, because a batch follows from the step alone. Ranks that share rows, each its
    piece (`parallel.sequence`), write down the same ones.

    Args:
        folder: of the run.
        rank: whose windows these are.
    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self._path = folder / f"tokens-{rank}.jsonl"
        try:
            # A line that a killed process cut short gets an end, so that the next stands alone.
            content = self._path.read_bytes()[-1:] if self._path.exists() else b"\n"
            self._file = self._path.open("ab", buffering=0)
            if content not in (b"\n", b""):
                self._write(b"\n")
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, step: int, windows: Sequence[Window]) -> None:
        """Add a step, before it is taken."""
        line = json.dumps({"step": step, "windows": windows}) + "\n"
        try:
            self._write(line.encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> "TokenLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _write(self, line: bytes) -> None:
        left = memoryview(line)
        while left:  # a disk that is nearly full takes a part
            left = left[self._file.write(left) :]

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"{self._path}: cannot be written ({error.strerror})")


def read_token_log(path: Path) -> dict[int, list[Window]]:
    """The windows of each step, of the last line about it. A line cut short is left out.

    Raises:
        DataError: two lines about one step differ, or the file cannot be read.
    """
    found: dict[int, list[Window]] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        step, windows = row["step"], [Window(*window) for window in row["windows"]]
        if found.setdefault(step, windows) != windows:
            raise DataError(f"{path}: step {step} read two different batches")
    return found
