from __future__ import annotations

from pathlib import Path

import pytest
from artifact_example import Contents, example

from ddqcli.artifact.encode import encode_artifact


@pytest.fixture(scope="session")
def contents() -> Contents:
    return example()


@pytest.fixture
def file(tmp_path: Path, contents: Contents) -> Path:
    path = tmp_path / "model.ddq"
    path.write_bytes(encode_artifact(*contents.arguments())[0])
    return path
