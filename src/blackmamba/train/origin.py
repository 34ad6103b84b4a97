"""Which code a result came from."""

import functools
import os
import subprocess
from pathlib import Path

from blackmamba.version import __version__

_PLACE = "src/blackmamba/train/"  # of this file in its repository


@functools.cache
def commit() -> str:
    """The commit of this package's source, with "-dirty" if files differ; "" if it has none."""
    return commit_of(Path(__file__).parent)


def commit_of(folder: Path) -> str:
    """The commit of the tree whose src/blackmamba/train is `folder`, as `commit` gives it.

    A package may have been installed or copied into some other project's repository, whose commits
    say nothing of it: only a repository in which this folder has its own place counts, and is
    tracked. "-dirty" is about the package, files that git does not know yet included.
    """
    try:
        if _git(folder, "rev-parse", "--show-prefix") != _PLACE:
            return ""
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        head = _git(folder, "rev-parse", "HEAD")
        differs = _git(folder.parent, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("-dirty" if differs else "")


def origin() -> dict[str, str]:
    """Version and, where it is known, commit, for the record."""
    return {"version": __version__} | ({"commit": commit()} if commit() else {})


def _git(folder: Path, *arguments: str) -> str:
    # A hook's GIT_DIR names the repository of the hook.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout.strip()
