from __future__ import annotations

from pathlib import Path

import pytest

from ddqcli.recipe.schema import Recipe
from ddqcli.runs.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "run", "name")
    run.write_recipe(Recipe())
    return run
