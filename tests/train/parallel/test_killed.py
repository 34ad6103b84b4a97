"""kill -9 of a rank: torchrun starts all again, and nothing shows it afterwards."""

from pathlib import Path

import kill_ranks
import pytest


@pytest.mark.slow
def test_a_run_with_killed_ranks_is_the_run_without(text: Path, tmp_path: Path):
    assert len(kill_ranks.main(text, tmp_path, kills=1, steps=16, seed=3)) == 1
