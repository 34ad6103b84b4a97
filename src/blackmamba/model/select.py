"""Naming some of a model's parameters by patterns."""

import fnmatch
import re
from collections.abc import Iterable, Iterator

from blackmamba.config import nearest
from blackmamba.errors import ConfigError

_RANGE = re.compile(r"(?<![^.])(\d{1,4})-(\d{1,4})(?![^.])")


def select(names: Iterable[str], patterns: Iterable[str], what: str) -> set[str]:
    """Those of `names` that a pattern matches.

    A pattern matches a name, or the beginning of one up to a dot: "embedding" is
    "embedding.weight". "*", "?" and "[...]" are as in file names, and "*" goes past dots; "0-3" in
    the place of a number is each of 0, 1, 2, 3.

    Args:
        names: dotted, as `named_parameters` gives them.
        patterns: such as "layers.0-3" or "*.router.*".
        what: the setting that the patterns are of, for messages.
    Raises:
        ConfigError: a pattern matches nothing; the nearest name is given.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        plain = [p for one in _alternatives(pattern) for p in (one, f"{one}.*")]
        matched = {name for name in names if any(fnmatch.fnmatchcase(name, p) for p in plain)}
        if not matched:
            beginnings = dict.fromkeys(b for name in names for b in _beginnings(name))
            raise ConfigError(
                f"{what}: {pattern!r} matches nothing; {nearest(pattern, beginnings)}"
            )
        found |= matched
    return found


def _alternatives(pattern: str) -> Iterator[str]:
    """The pattern with each range of numbers written out."""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _alternatives(f"{pattern[: match.start()]}{number}{pattern[match.end() :]}")


def _beginnings(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))
