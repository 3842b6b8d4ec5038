"""`ddq finetune` with several targets: a run for each, started from the one before."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import ddq, exit_code, in_child, inside

from ddqcli.render.progress import ProgressReporter
from ddqcli.training.evaluate import evaluate_all
from ddqcli.training.trainer import Trainer

SWEEP = "runs/s"
BEGIN = f"finetune model.pt --target-bits 3,6,4 --run-dir {SWEEP} -q"
MOMENTS = (12, 17, 35)  # before the second target, within it, at the last step
FOLDERS = ["6-bits", "4-bits", "3-bits"]  # as they are trained


@pytest.fixture(scope="module")
def unharmed(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a finished sweep, made on one thread; not to be changed.

    In kills/STEP/ is the sweep as a kill before that step would leave it; a target has 12.
    """

    def keep_moments() -> None:
        step, seen = Trainer._train_step, itertools.count()

        def watched(*args: Any) -> Any:
            if (number := next(seen)) in MOMENTS:
                shutil.copytree(SWEEP, f"kills/{number}")
            return step(*args)

        Trainer._train_step = watched

    folder = tmp_path_factory.mktemp("sweep") / "project"
    shutil.copytree(pristine, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    with inside(folder):
        child = in_child(BEGIN, before=keep_moments)
        assert exit_code(child) == 0, Path("child.txt").read_text()
    return folder


@pytest.fixture
def swept(unharmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; the test runs there."""
    shutil.copytree(unharmed, tmp_path / "project", ignore=shutil.ignore_patterns("kills"))
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project" / SWEEP


def results(sweep: Path | str) -> list[bytes]:
    return [(Path(sweep) / folder / "final.pt").read_bytes() for folder in FOLDERS]


def report(folder: Path | str) -> dict[str, Any]:
    return json.loads((Path(folder) / "report.json").read_text())


# ---- what a sweep does


def test_each_target_is_trained_as_a_run_of_its_own_from_the_weights_of_the_next_larger(
    project: Path,
) -> None:
    """Against ordinary runs: of model.pt, then of checkpoints made from the run before.

    With labels alone, no flipped images and no compensation: a run of such a checkpoint would
    distill from it, test if it is flip-invariant, and compensate for its errors.
    """
    labels_alone = "--set train.distill.weight=0 --set data.flip=false"
    labels_alone += " --set train.compensate=false -q"
    assert (
        exit_code(
            in_child(f"finetune model.pt --target-bits 3,6,4 --run-dir {SWEEP} {labels_alone}")
        )
        == 0
    )
    swept, checkpoint = Path(SWEEP), Path("model.pt")
    for number, folder in enumerate(FOLDERS):
        alone = f"runs/alone-{folder}"
        command = (
            f"finetune {checkpoint} --target-bits {folder[0]} --run-dir {alone} {labels_alone}"
        )
        assert exit_code(in_child(command)) == 0, Path("child.txt").read_text()
        here, there = (torch.load(run / "final.pt") for run in (swept / folder, Path(alone)))
        for part in ("trained", "weights", "floats"):
            assert all(here[part][name].equal(value) for name, value in there[part].items()), (
                folder,
                part,
            )
        assert (
            report(swept / folder)["accuracy"]["quantized"]
            == report(alone)["accuracy"]["quantized"]
        )
        if report(alone)["course"]["delivered"] == "trained":
            checkpoint = Path(f"start-{number}.pt")
            torch.save(here["weights"] | here["floats"] | here["unfolded"], checkpoint)
        else:
            checkpoint = Path("model.pt")


def test_without_training_each_target_starts_from_the_checkpoint(project: Path) -> None:
    ddq("finetune", "--target-bits", "4,3", "--epochs", "0", "--run-dir", SWEEP, "-q")
    ddq("finetune", "--target-bits", "3", "--epochs", "0", "--run-dir", "runs/alone", "-q")
    here, there = (torch.load(Path(run) / "final.pt") for run in (f"{SWEEP}/3-bits", "runs/alone"))
    for part in ("trained", "weights", "floats"):
        assert all(here[part][name].equal(value) for name, value in there[part].items()), part
    assert report(f"{SWEEP}/3-bits")["accuracy"] == report("runs/alone")["accuracy"]


def test_a_listener_is_told_each_target_before_its_work(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(ProgressReporter, "target", lambda self, text: told.append(text))
    monkeypatch.setattr(ProgressReporter, "progress", lambda self, what, *_: told.append(what))
    assert ddq("finetune", "model.pt", "--target-bits", "4,3", "--epochs", "0").code == 0
    works = list(dict.fromkeys(told[: told.index("3 bits")]))
    assert works == ["4 bits", "evaluate", "calibrate", "compensate"]
    assert {"calibrate", "compensate"} <= set(told[told.index("3 bits") :])


def test_the_start_is_evaluated_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its accuracy is known when it is delivered."""
    for module in ("baseline", "finetune"):
        monkeypatch.setattr(f"ddqcli.commands.{module}.evaluate_all", lambda *_, **__: [12.5])
    data = ddq("finetune", "--target-bits", "4", "--epochs", "0", "--json", "-q").data
    assert data["accuracy"]["float"] == 12.5
    assert data["accuracy"]["quantized"] == data["course"]["stages"][-1]["accuracy"] != 12.5


def test_accuracy_is_held_against_the_checkpoint_and_so_is_distillation(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = []
    begin = Trainer.__init__

    def seen(self: Trainer, converted: Any, teacher: Any, *rest: Any) -> None:
        teachers.append({name: value.clone() for name, value in teacher.state_dict().items()})
        begin(self, converted, teacher, *rest)

    monkeypatch.setattr(Trainer, "__init__", seen)
    data = ddq(
        "finetune", "--target-bits", "6,4", "--set", "train.distill.weight=0.5", "--json", "-q"
    ).data
    given = torch.load("model.pt")
    assert len(teachers) == 2
    assert all(teacher[name].equal(value) for teacher in teachers for name, value in given.items())
    for row in data["targets"]:
        of_run = report(Path(data["run_dir"]) / row["run"])
        assert of_run["accuracy"]["float"] == data["float"]["accuracy"]
        assert row["drop"] == pytest.approx(data["float"]["accuracy"] - row["accuracy"], abs=1e-3)
        assert of_run["source"]["sha256"] == data["source"]["sha256"]


def test_sizes_are_ordered_by_what_they_come_to(project: Path) -> None:
    data = ddq(
        "finetune", "--target-size", "2000,45%, 2.3kB", "--max-steps", "0", "--json", "-q"
    ).data
    assert [row["target"] for row in data["targets"]] == ["45%", "2.3kB", "2000"]
    assert {path.name for path in Path(data["run_dir"]).iterdir() if path.is_dir()} == {
        "45-percent",
        "2.3kB",
        "2000",
    }
    assert all(row["bytes"] <= row["budget_bytes"] for row in data["targets"])


def test_one_target_is_an_ordinary_run_however_it_is_given(project: Path) -> None:
    short = ("finetune", "--max-steps", "2")
    assert (
        "targets"
        not in ddq(*short, "--set", "budget.target_bits=[4]", "--run-dir", "a", "--json", "-q").data
    )
    assert ddq(*short, "--target-bits", "4", "--run-dir", "b", "-q").code == 0
    assert (Path("a") / "recipe.yaml").read_text() == (Path("b") / "recipe.yaml").read_text()
    assert (Path("a") / "final.pt").read_bytes() == (Path("b") / "final.pt").read_bytes()


def test_a_recipe_may_list_its_targets(project: Path) -> None:
    Path("ddq.yaml").write_text(
        Path("ddq.yaml").read_text().replace("target_bits: 4", "target_bits: [3, 5]")
    )
    data = ddq("finetune", "--dry-run", "--json").data
    assert [row["target"] for row in data["targets"]] == ["5 bits", "3 bits"]
    assert {row["accuracy"] for row in data["targets"]} == {None}
    assert data["run_dir"] is None
    assert not Path("runs").exists()
    assert "targets" not in ddq("finetune", "--target-bits", "4", "--dry-run", "--json").data


def test_a_dry_run_warns_of_each_target_that_is_not_met_yet(project: Path) -> None:
    paper = ("finetune", "--target-bits", "3,5", "--set", "gates.rule=paper", "--dry-run")
    out = ddq(*paper).out
    for target in ("3 bits", "5 bits"):
        warning = "these are the first bits; gates.rule=paper comes down to the budget"
        assert f"warning    {target}: {warning}" in out


# ---- what it leaves and says


def test_a_sweep_ends_with_a_table_and_a_picture(swept: Path) -> None:
    assert {path.name for path in swept.iterdir()} == {
        *FOLDERS, "sweep.yaml", "sweep.json", "size-accuracy.png", "size-accuracy.svg",
        ".lock", ".ddq",
    }  # fmt: skip
    answer = ddq("finetune", "--resume", "--run-dir", SWEEP)  # which has nothing left to do
    lines = answer.out.splitlines()
    assert lines[0].split() == [
        *("target", "bytes", "ratio", "bits", "a", "weight", "accuracy", "drop", "run")
    ]
    assert lines[1].split()[0] == "float"
    for line, folder in zip(lines[2:], FOLDERS, strict=False):
        of_run = report(swept / folder)
        totals, accuracy = of_run["totals"], of_run["accuracy"]
        assert line.split() == [
            folder[0], "bits", f"{totals['bytes']:,}",
            f"{totals['float_bytes'] / totals['bytes']:.1f}x", f"{totals['average_bits']:.3f}",
            f"{accuracy['quantized']:.2f}%", f"{accuracy['drop']:.2f}", folder,
        ]  # fmt: skip
    assert f"picture    {SWEEP}/size-accuracy.png" in lines
    assert max(len(line) for line in lines if not line.startswith("warning")) <= 80


def test_what_all_targets_share_is_looked_at_and_said_once(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    float_models = []

    def counted(model: Any, *args: Any, **kwargs: Any) -> list[float]:
        if not any("parametrizations" in name for name, _ in model.named_modules()):
            float_models.append(model)
        return evaluate_all(model, *args, **kwargs)

    monkeypatch.setattr("ddqcli.commands.baseline.evaluate_all", counted)
    said = ddq("finetune", "--target-bits", "6,4", "--max-steps", "2", "--run-dir", SWEEP).err
    assert len(float_models) == 1
    shutil.rmtree(Path(SWEEP) / "4-bits")
    said_again = ddq("finetune", "--resume", "--run-dir", SWEEP).err
    assert len(float_models) == 1
    for what in ("model: ", "data: ", "float accuracy: ", "loss: "):
        for text in (said, said_again):
            assert sum(line.startswith(what) for line in text.splitlines()) == 1, text


def test_a_recipe_that_was_changed_between_targets_is_refused(
    project: Path, unharmed: Path
) -> None:
    restore(unharmed, 12)
    recipe = Path(SWEEP) / "sweep.yaml"
    recipe.write_text(re.sub(r"momentum: .*", "momentum: 0.5", recipe.read_text()))
    answer = ddq("finetune", "--resume")
    assert answer.code == 2
    assert (
        f"{SWEEP}/6-bits was begun with another recipe (train.momentum: 0.9, now 0.5)" in answer.err
    )


def test_its_json_keys_are_these(swept: Path) -> None:
    data = ddq("finetune", "--resume", "--run-dir", SWEEP, "--json").data
    assert list(data) == ["run_dir", "seconds", "version", "metric", "float", "targets", "source"]
    assert list(data["float"]) == ["bytes", "accuracy"]
    for row in data["targets"]:
        assert list(row) == [
            "target",
            "bytes",
            "budget_bytes",
            "average_bits",
            "accuracy",
            "start",
            "drop",
            "run",
            "warnings",
        ]
    assert data.pop("seconds") > 0
    table = json.loads((swept / "sweep.json").read_text())
    assert data == {"run_dir": SWEEP, **{k: v for k, v in table.items() if k != "checksum"}}


def test_its_runs_are_ordinary_ones_and_are_picked_by_target(swept: Path) -> None:
    assert Path(ddq("report", "--json", "--target", "3").data["target"]) == Path(SWEEP) / "3-bits"
    assert ddq("report", f"{SWEEP}/6-bits").code == 0
    assert ddq("export", f"{SWEEP}/6-bits").code == 0
    picked = ddq("export", SWEEP, "--target", "6 bits", "-o", "picked.safetensors", "--json").data
    assert picked["run_dir"] == f"{SWEEP}/6-bits"
    assert (
        Path("picked.safetensors").read_bytes()
        == Path(SWEEP, "6-bits", "model.safetensors").read_bytes()
    )


def test_its_last_lines_are_commands_that_work(swept: Path) -> None:
    out = ddq("finetune", "--resume", "--run-dir", SWEEP, "-q").out
    commands = [line.removeprefix("next").strip() for line in out.splitlines()[-2:]]
    assert commands == [f"ddq report {SWEEP} --target 3", f"ddq export {SWEEP} --target 3"]
    for command in commands:
        assert ddq(*command.split()[1:]).code == 0


# ---- refusals


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("4,0.5,3", "Target 0.5 bits: "),
        ("4,4.0", "The target 4 bits is given twice."),
        ("4,,3", "budget.target_bits = ''"),
        ("4,99", "budget.target_bits = 99.0: input should be less than or equal to 32"),
    ],
)
def test_one_bad_target_refuses_all_before_anything_is_made(
    project: Path, targets: str, said: str
) -> None:
    answer = ddq("finetune", "model.pt", "--target-bits", targets)
    assert answer.code == 2
    assert said in answer.err
    assert not Path("runs").exists()


def test_data_that_are_missing_leave_no_folder(project: Path) -> None:
    Path("images.npz").unlink()
    assert ddq("finetune", "model.pt", "--target-bits", "4,3").code == 2
    assert not Path("runs").exists()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_target_leaves_no_folder(
    project: Path, sent: int, code: int
) -> None:
    def stopped() -> None:
        from ddqcli.commands import sweep

        sweep.finetune = lambda *_, **__: signal.raise_signal(sent)

    assert exit_code(in_child(BEGIN, before=stopped)) == code
    assert not Path(SWEEP).exists()


def test_a_folder_with_a_sweep_is_not_written_over(swept: Path) -> None:
    for targets in ("4", "4,3"):
        answer = ddq("finetune", "model.pt", "--target-bits", targets, "--run-dir", SWEEP)
        assert (answer.code, "already holds a run" in answer.err) == (2, True)


# ---- kills


def restore(unharmed: Path, moment: int) -> None:
    """Put the sweep into the working folder as a kill before this step left it."""
    shutil.copytree(unharmed / f"kills/{moment}", SWEEP)


@pytest.mark.parametrize(
    ("moment", "flags"),
    [
        (MOMENTS[0], f"--run-dir {SWEEP}"),
        (MOMENTS[1], f"--run-dir {SWEEP}/4-bits"),
        (MOMENTS[2], ""),
        (MOMENTS[2], "model.pt --target-bits 6,3,4"),
    ],
)
def test_a_sweep_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    project: Path, unharmed: Path, moment: int, flags: str
) -> None:
    restore(unharmed, moment)
    finished = {path: path.stat().st_mtime_ns for path in Path(SWEEP).glob("*/report.json")}
    assert len(finished) == moment // 12
    assert exit_code(in_child(f"finetune --resume {flags}")) == 0, Path("child.txt").read_text()
    assert results(SWEEP) == results(unharmed / SWEEP)
    assert (Path(SWEEP) / "sweep.json").read_bytes() == (
        unharmed / SWEEP / "sweep.json"
    ).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_a_target_that_was_damaged_is_made_again(swept: Path, unharmed: Path) -> None:
    (swept / "6-bits" / "final.pt").write_bytes(b"no model")
    (swept / "4-bits" / "report.json").write_text("{")
    kept = (swept / "3-bits" / "report.json").stat().st_mtime_ns
    assert exit_code(in_child(f"finetune --resume --run-dir {SWEEP}/4-bits")) == 0, Path(
        "child.txt"
    ).read_text()
    assert results(swept) == results(unharmed / SWEEP)
    assert report(swept / "4-bits") == report(unharmed / SWEEP / "4-bits")
    assert (swept / "3-bits" / "report.json").stat().st_mtime_ns == kept


def test_other_targets_or_data_are_refused_on_resuming(project: Path, unharmed: Path) -> None:
    restore(unharmed, 12)
    answer = ddq("finetune", "model.pt", "--target-bits", "6,4", "--resume")
    assert answer.code == 2
    change = "targets: 3 bits, 4 bits, 6 bits, now 4 bits, 6 bits"
    assert f"with another recipe ({change}); begin a new run." in answer.err
    # Then the finished target alone knows the checkpoint.
    (Path(SWEEP) / "4-bits" / "last.pt").unlink()
    other = torch.load("model.pt")
    other["8.bias"] += 1
    torch.save(other, "model.pt")
    answer = ddq("finetune", "--resume")
    assert answer.code == 2
    assert "The checkpoint is not the one (SHA-256 " in answer.err
    assert f"that {SWEEP}/6-bits was begun with" in answer.err
