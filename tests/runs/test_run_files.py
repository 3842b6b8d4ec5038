"""Files are written whole or not at all, whatever the disk does."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_run import make_report
from run_files import Metrics, names

from ddqcli.errors import DDQError, UsageError
from ddqcli.runs.files import write_atomic
from ddqcli.runs.run import LAST, RECIPE, Run


def test_a_failed_write_leaves_the_previous_file_and_nothing_else(run: Run) -> None:
    run.save(LAST, {"step": 1})

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        DDQError,
        match=r"last\.pt cannot be written: No space left on device; what was there before is kept",
    ):
        write_atomic(run.path / LAST, fail)
    assert run.load(LAST) == {"step": 1}
    assert names(run) == {RECIPE, LAST}


@pytest.fixture(params=["file size limit", "full disk"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot hold a file of 1 MB."""
    if request.param == "file size limit":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
        yield tmp_path
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root; the file size limit stands in for it")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_sentence_and_the_last_good_state_survives(small_disk: Path) -> None:
    run = Run.create(small_disk / "run", "name")
    good = {"x": torch.ones(10_000)}
    run.save(LAST, good)
    with pytest.raises(
        DDQError, match=r"last\.pt cannot be written: .*; what was there before is kept"
    ) as caught:
        run.save(LAST, {"x": torch.ones(250_000)})
    assert "\n" not in str(caught.value)
    assert torch.equal(run.load(LAST)["x"], good["x"])
    assert names(run) == {LAST}


def test_a_folder_that_vanished_is_one_sentence(run: Run) -> None:
    shutil.rmtree(run.path)
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        run.write_report(make_report())
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        run.append_metrics(Metrics(1))
