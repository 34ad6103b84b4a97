"""Checksums of a small prepared folder, which is read whole when it is opened.

checksums.json has the SHA-256 of every other file. (Shards of large texts have them block by block,
checked when they are read: shards.py.)
"""

import json
from pathlib import Path
from typing import Any

from blackmamba.errors import DataError
from blackmamba.files import digest

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Of the files that are in `folder` now."""
    sums = {path.name: digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def check_checksums(folder: Path) -> None:
    """See that every file is as it was written; a folder from before there were any passes.

    Raises:
        DataError: names the file that is damaged or missing.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return
    try:
        sums: Any = json.loads(path.read_text(encoding="utf-8"))
        expected = {str(name): str(value) for name, value in sums.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error})") from None
    for name, value in expected.items():
        try:
            found = digest(folder / name)
        except OSError as error:
            raise DataError(f"{folder / name}: not readable ({error.strerror})") from None
        if found != value:
            raise DataError(
                f"{folder / name}: damaged: its checksum is not the one that was written"
            )
