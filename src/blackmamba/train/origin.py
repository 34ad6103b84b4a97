"""Which code a result came from."""

import functools
import subprocess
from pathlib import Path

from blackmamba.version import __version__


@functools.cache
def commit() -> str:
    """The commit of this package's source, with "-dirty" if files differ; "" if it has none."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        # An installed package may lie inside some other project's repository: is this file in it?
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", "__init__.py"], check=True, capture_output=True
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()


def origin() -> dict[str, str]:
    """Version and, where it is known, commit, for the record."""
    return {"version": __version__} | ({"commit": commit()} if commit() else {})
