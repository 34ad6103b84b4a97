"""Patterns that name parameters."""

import pytest

from blackmamba.errors import ConfigError
from blackmamba.model import select

NAMES = [
    "embedding.weight",
    *(f"layers.{i}.mixer.in_proj.weight" for i in range(12)),
    "layers.1.feed_forward.router.weight",
    "layers.1.feed_forward.router.bias",
    "final_norm.weight",
]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["embedding"], ["embedding.weight"]),
        (["layers.1"], [n for n in NAMES if n.startswith("layers.1.")]),
        (["*.router.*"], [n for n in NAMES if ".router." in n]),
        (["layers.0-1.mixer"], ["layers.0.mixer.in_proj.weight", "layers.1.mixer.in_proj.weight"]),
        (["layers.10-11"], ["layers.10.mixer.in_proj.weight", "layers.11.mixer.in_proj.weight"]),
        (["*.weight", "*.bias"], NAMES),
        ([], []),
    ],
    ids=str,
)
def test_matches(patterns: list[str], expected: list[str]):
    assert select(NAMES, patterns, "x") == set(expected)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("embeding", "'embedding'"), ("layers.0-3.mixxer", "layers"), ("layers.3-2", "layers.")],
)
def test_a_pattern_without_a_match_names_the_nearest(pattern: str, near: str):
    with pytest.raises(ConfigError, match=f"train.freeze: '{pattern}' matches nothing; .*{near}"):
        select(NAMES, [pattern], "train.freeze")
