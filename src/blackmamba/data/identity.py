"""What prepared text was made from, told by one fingerprint."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from blackmamba.data.text import Source
from blackmamba.data.tokenizer import Tokenizer


def fingerprints(
    form: int, settings: Mapping[str, Any], sources: Sequence[Source], tokenizer: Tokenizer | None
) -> tuple[str, str]:
    """The fingerprint of prepared text, and the one that was written for it at first.

    Texts and tokenizer are told by what their names lead to, so that a path may be spelled in
    several ways. At first the spelling counted too: a folder of that time is known by the second.

    Args:
        form: of the prepared folder.
        settings: that it was made with, its texts and tokenizer by their names.
        sources: what the texts are.
        tokenizer: the one that is given; None: one is trained.
    """
    known = "" if tokenizer is None else tokenizer.fingerprint
    states = [source.states() for source in sources]
    told = {key: settings[key] for key in settings if key not in ("text", "tokenizer")}
    found = [[source.reader, of] for source, of in zip(sources, states, strict=True)]
    flat = [state for of in states for state in of]
    return digest([form, told, found, known]), digest([form, settings, flat, known])


def digest(content: object) -> str:
    """SHA-256 of something's JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
