"""Naming some of a model's parameters by patterns."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator

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
            raise ConfigError(f"{what}: {pattern!r} matches nothing; {_nearest(pattern, names)}")
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


def _nearest(pattern: str, names: list[str]) -> str:
    """What may be meant: a name, the beginning of one, or a word of one."""
    valid: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        valid |= dict.fromkeys(".".join(parts[:n]) for n in range(1, len(parts) + 1))
        valid |= dict.fromkeys(parts)
    close = difflib.get_close_matches(pattern, valid, n=1, cutoff=0.3)
    return f"did you mean {close[0]!r}?" if close else f"a name looks like {names[-1]!r}"
