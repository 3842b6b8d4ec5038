"""`ddq finetune`: the files of a run, kills and resuming, and training that goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import STEPS, ddq, exit_code, in_child, inside

from ddqcli.runs import files
from ddqcli.runs import run as runs
from ddqcli.runs.run import Run
from ddqcli.training.metrics import Look
from ddqcli.training.trainer import Trainer

RUN = "runs/a"
BEGIN, RESUME = f"finetune model.pt --run-dir {RUN} -q", f"finetune --resume --run-dir {RUN}"
REMEDY = f"`ddq finetune --resume --run-dir {RUN}` continues it."


def result(run: str = RUN) -> list[bytes]:
    """The files of which an export is a function."""
    return [(Path(run) / name).read_bytes() for name in ("final.pt", "report.json")]


def steps(run: str = RUN) -> list[int]:
    """The steps at which the run reported its loss."""
    return [entry["step"] for entry in metrics(run) if "loss" in entry]


def look_steps(run: str = RUN) -> list[int]:
    """The steps at which the run looked at held-out samples."""
    return [entry["step"] for entry in metrics(run) if "held_out_loss" in entry]


def metrics(run: str = RUN) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def kills(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a whole run, and in kills/ its folder as a kill at each moment leaves it."""
    folder = tmp_path_factory.mktemp("kills") / "project"
    shutil.copytree(pristine, folder, ignore=shutil.ignore_patterns("runs"))
    with inside(folder):
        assert exit_code(in_child(BEGIN, before=keeping_moments(RUN))) == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(kills: Path) -> list[bytes]:
    """The result of a run that nothing disturbs."""
    return result(str(kills / RUN))


# ---- the files of a run


def test_a_run_meets_its_budget_and_reports_it_in_its_folder_and_its_output(project: Path) -> None:
    data = ddq("finetune", "model.pt", "--json", "-q").data
    totals = data["totals"]
    assert totals["bytes"] <= totals["budget_bytes"] < totals["float_bytes"]
    assert totals["average_bits"] <= 4
    assert set(data["accuracy"]) == {"float", "quantized", "drop"}
    assert all(
        {"name", "kind", "shape", "bits", "levels", "bytes", "float_bytes", "error"} == set(r)
        for r in data["layers"]
    )
    assert data.pop("seconds") > 0
    folder = Path(data.pop("run_dir"))
    assert {p.name for p in folder.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "last.pt", "final.pt", "report.json", ".lock", ".ddq",
    }  # fmt: skip
    assert data.items() <= ddq("report", "--json").data.items()
    assert steps(folder) == [10, 12]


BUFFERED = """
import torch
from net import build
from torch import nn

class Buffered(nn.Module):
    def __init__(self, grows):
        super().__init__()
        self.grows = grows
        self.register_buffer("seen", torch.zeros(0), persistent=True)

    def forward(self, x):
        if self.grows == "once" or not (self.training or torch.is_grad_enabled()):
            self.seen = torch.zeros(100 if self.grows == "once" else 300)
        return x

def buffered(grows):
    net = build()
    net.append(Buffered(grows))
    return net
"""


def test_buffers_that_a_forward_pass_makes_are_within_the_budget(project: Path) -> None:
    Path("buffered.py").write_text(BUFFERED)
    torch.save(torch.load("model.pt") | {"9.seen": torch.zeros(0)}, "model.pt")
    command = ["finetune", "model.pt", "--arch", "buffered.py:buffered", "--max-steps", "2"]
    command += ["--target-size", "2600", "--set"]
    report = ddq(*command, "model.kwargs.grows=once", "--run-dir", "once", "--json", "-q").data
    totals = report["totals"]
    assert 2450 < totals["bytes"] <= 2600
    final = torch.load("once/final.pt")
    assert len(final["floats"]["9.seen"]) == 100
    inputs = sum(row["bytes"] for row in report["activations"])
    assert totals["kept_bytes"] == inputs + sum(value.nbytes for value in final["floats"].values())
    answer = ddq(*command, "model.kwargs.grows=evaluated", "--run-dir", "evaluated", "-q")
    assert answer.code == 1
    assert (
        "buffers grew while it ran; register those that need not be stored with persistent=False"
        in answer.err
    )
    command[command.index("2600")] = "1900"
    answer = ddq(*command, "model.kwargs.grows=once", "--run-dir", "none", "-q")
    assert answer.code == 2
    assert "9.seen in float (400)" in answer.err
    assert not Path("none").exists()


SHORT = ("finetune", "model.pt", "--max-steps", "2")


def losses(run: str) -> list[float]:
    """The training losses of a run."""
    return [step["loss"] for step in Run.open(Path(run)).metrics()]


def test_padding_and_flips_are_chosen_by_the_model_unless_the_recipe_sets_them(
    project: Path,
) -> None:
    def told(run: str, *settings: str) -> str:
        return ddq(*SHORT, "--run-dir", run, *settings).err

    padded, flipped, view = "crops are padded with", "images are (not )?flipped", "and its flip"
    auto = told("auto")
    assert padded in auto
    assert padded not in told("mean", "--set", "data.fill=mean")
    assert padded not in told("none", "--set", "data.pad=0")
    told("black", "--set", "data.fill=black")
    same = "black" if f"{padded} black" in auto else "mean"
    assert losses("auto") == losses(same)
    assert losses("mean") != losses("black")
    match = re.search(flipped, auto)
    assert match
    flips = match[1] is None
    assert (view in auto) == flips
    for flip in (True, False):
        err = told(f"{flip}", "--set", f"data.flip={str(flip).lower()}")
        assert not re.search(flipped, err)
        assert (view in err) == flip
    assert losses("auto") == losses(f"{flips}")
    assert losses("True") != losses("False")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    project: Path, undisturbed: list[bytes]
) -> None:
    assert exit_code(in_child(BEGIN)) == 0
    assert result() == undisturbed
    assert exit_code(in_child("finetune model.pt --seed 1 --run-dir runs/b")) == 0
    assert result("runs/b")[0] != undisturbed[0]


def test_a_dry_run_warns_if_the_first_bits_exceed_the_budget(project: Path) -> None:
    assert ddq("finetune", "model.pt", "--dry-run", "--json").data["warnings"] == []
    answer = ddq("finetune", "model.pt", "--dry-run", "--set", "gates.rule=paper")
    assert answer.code == 0
    assert "first bits; gates.rule=paper comes down to the budget while training" in answer.out


def test_the_recipe_alone_may_name_the_model(project: Path) -> None:
    assert ddq("finetune", "--dry-run").code == 0


# ---- kills


def keeping_moments(run: str) -> Callable[[], None]:
    """Copy the run's folder at each step, look, checkpoint and stage of a file write.

    A kill leaves on the disk what is there in its moment, so that one run shows what each of many
    kills would leave: kills/NUMBER-WHAT-STEP/.
    """

    def before() -> None:
        numbers = itertools.count()

        def keep(what: str, step: int | None = None) -> None:
            if Path(run, "recipe.yaml").exists():
                shutil.copytree(run, f"kills/{next(numbers):03}-{what}-{step}")

        def watched(function: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                keep(function.__name__)
                result = function(*args)
                if after:
                    keep(function.__name__)
                return result

            return call

        append, save = runs.Run.append_metrics, runs.Run.save

        def append_and_keep(run: runs.Run, entry: Any) -> None:
            keep("append")
            append(run, entry)
            keep("look" if isinstance(entry, Look) else "line", entry.step)

        def save_and_keep(run: runs.Run, name: str, state: dict[str, Any]) -> None:
            save(run, name, state)
            keep("saved", state.get("step"))

        runs.Run.append_metrics, runs.Run.save = append_and_keep, save_and_keep
        Trainer._train_step = watched(Trainer._train_step)
        files.os.fsync = watched(os.fsync)
        files.os.replace = watched(os.replace, after=True)

    return before


def restore(moment: Path, run: str = RUN) -> None:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(moment, run)


def test_a_kill_at_any_step_and_in_any_write_loses_nothing(
    project: Path, kills: Path, undisturbed: list[bytes]
) -> None:
    """At the first and last moment and three between; tests/benchmarks/kill_resume.py does more."""
    expected_metrics = [(sorted(entry), entry["step"]) for entry in metrics(str(kills / RUN))]
    first, *moments, last = sorted((kills / "kills").iterdir())
    assert len(moments) > 60
    assert {path.name.split("-")[1] for path in moments} >= {
        *("_train_step", "append", "line", "look", "saved", "fsync", "replace")
    }
    for moment in [first, last, *random.Random(0).sample(moments, 3)]:
        restore(moment)
        assert exit_code(in_child(RESUME)) == 0, (moment, Path("child.txt").read_text())
        assert result() == undisturbed, moment
        assert [(sorted(entry), entry["step"]) for entry in metrics()] == expected_metrics, moment
        assert not list(Path(RUN).glob(".*.tmp")), moment


@pytest.mark.parametrize("moment", ["look-0", "look-6", "saved-4"])
def test_a_kill_at_a_look_loses_and_repeats_none(
    project: Path, kills: Path, undisturbed: list[bytes], moment: str
) -> None:
    """The kill comes after the look was written, before or after the checkpoint of its step."""
    (left,) = (kills / "kills").glob(f"*-{moment}")
    restore(left)
    assert exit_code(in_child(RESUME)) == 0, Path("child.txt").read_text()
    assert result() == undisturbed
    assert look_steps() == [0, 2, 3, 4, 6, 8, 9, 10, 12]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    project: Path, undisturbed: list[bytes]
) -> None:
    """Kills from outside, at no chosen moment."""
    for file in ("recipe.yaml", "metrics.jsonl"):
        child = in_child(f"{BEGIN} --resume")  # begins where there is nothing to resume
        while not (Path(RUN) / file).exists():
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
    assert exit_code(in_child(f"{BEGIN} --resume")) == 0
    assert result() == undisturbed


def slowly() -> None:
    """Let each step take a moment, so that a signal comes in the middle of the run."""
    step = Trainer._train_step

    def slow(*args: Any) -> Any:
        time.sleep(0.05)
        return step(*args)

    Trainer._train_step = slow


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_and_leave(
    project: Path, undisturbed: list[bytes], sent: int, code: int
) -> None:
    child = in_child(BEGIN, before=slowly)
    while not (Path(RUN) / "last.pt").exists():
        time.sleep(0.002)
    time.sleep(0.12)  # into the second or third step, neither of which has a checkpoint
    os.kill(child, sent)
    assert exit_code(child) == code
    step = torch.load(Path(RUN) / "last.pt")["step"]
    assert 1 <= step <= STEPS
    assert Path("child.txt").read_text() == f"Error: Stopped at step {step} of 12; {REMEDY}\n"
    assert exit_code(in_child(RESUME)) == 0
    assert result() == undisturbed


def test_a_signal_before_the_first_step_can_be_resumed_too(
    project: Path, undisturbed: list[bytes]
) -> None:
    def slow_start() -> None:
        from ddqcli.commands import baseline

        def evaluate(*_: object, **__: object) -> None:
            time.sleep(30)

        baseline.evaluate_all = evaluate

    child = in_child(BEGIN, before=slow_start)
    while not (Path(RUN) / "recipe.yaml").exists():
        time.sleep(0.002)
    time.sleep(0.1)
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 143
    assert Path("child.txt").read_text() == f"Error: Terminated; {REMEDY}\n"
    assert exit_code(in_child(RESUME)) == 0
    assert result() == undisturbed


def test_a_signal_is_not_taken_for_an_error_of_the_code_it_interrupts(project: Path) -> None:
    def stopped_while_compiling() -> None:
        from ddqcli.quant import cpu_launch
        from ddqcli.training import session

        session._COMPILE_FROM = 0
        cpu_launch.library.cache_clear()  # this process may have compiled them
        cpu_launch.subprocess.run = lambda *_, **__: signal.raise_signal(signal.SIGTERM)

    child = in_child(BEGIN, before=stopped_while_compiling)
    assert exit_code(child) == 143
    assert Path("child.txt").read_text() == f"Error: Terminated; {REMEDY}\n"


# ---- resuming


@pytest.fixture
def halfway(kills: Path, project: Path) -> Path:
    """The project with a run that was killed between its last checkpoints."""
    restore(sorted((kills / "kills").glob("*-_train_step-None"))[-2])
    return project


def test_resume_alone_finds_the_newest_unfinished_run_and_its_recipe(
    halfway: Path, undisturbed: list[bytes]
) -> None:
    Path("ddq.yaml").unlink()
    assert exit_code(in_child("finetune --resume")) == 0
    assert result() == undisturbed
    assert "resumed runs/a at step " in Path("child.txt").read_text()


def test_the_same_flags_as_before_are_accepted(project: Path) -> None:
    flags = ["model.pt", "--max-steps", "1", "--set", "train.lr=0.02", "--run-dir", RUN]
    flags += ["--arch", "net.py:build"]
    assert ddq("finetune", *flags).code == 0
    (Path(RUN) / "report.json").unlink()
    assert ddq("finetune", *flags, "--resume").code == 0
    assert ddq("finetune", project / "model.pt", *flags[1:], "--resume").code == 0, (
        "the same file by another path"
    )


@pytest.mark.parametrize(
    ("flags", "differs"),
    [
        (["--set", "train.lr=0.02"], "train.lr: 0.01, now 0.02"),
        (
            ["model.pt", "--epochs", "4", "--act-bits", "4"],
            "activations.bits: 8, now 4; train.epochs: 3, now 4",
        ),
        (["other.pt"], "model.checkpoint: 'model.pt', now 'other.pt'"),
        (["--recipe", "other.yaml"], "train.save_every: 3, now 4"),
    ],
)
def test_another_recipe_is_refused_saying_what_differs(
    halfway: Path, flags: list[str], differs: str
) -> None:
    shutil.copy("model.pt", "other.pt")
    Path("other.yaml").write_text(
        Path("ddq.yaml").read_text().replace("save_every: 3", "save_every: 4")
    )
    answer = ddq("finetune", *flags, "--resume")
    assert answer.code == 2
    assert f"runs/a was begun with another recipe ({differs}); begin a new run." in answer.err


def test_resume_works_from_another_folder(
    halfway: Path, undisturbed: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (halfway / "else").mkdir()
    monkeypatch.chdir(halfway / "else")
    assert exit_code(in_child("finetune --resume --run-dir ../runs/a")) == 0
    assert result("../runs/a")[0] == undisturbed[0]  # the report names the path from here


def test_resume_works_after_the_folder_moved_as_a_whole(
    halfway: Path, undisturbed: list[bytes]
) -> None:
    moved = halfway.rename(halfway.parent / "moved")
    os.chdir(moved)
    assert exit_code(in_child(RESUME)) == 0
    assert result() == undisturbed


def test_resume_with_a_model_begins_where_nothing_was_begun(project: Path) -> None:
    assert ddq("finetune", "model.pt", "--resume", "--run-dir", RUN).code == 0
    assert steps() == [10, 12]


def test_resuming_a_finished_run_makes_its_result_again(finished: Path) -> None:
    before, metrics_before = ddq("report", "--json").data, metrics("runs/done")
    Path("runs/done/report.json").write_text("{")
    Path("runs/done/final.pt").unlink()
    assert ddq("finetune", "--resume", "--run-dir", "runs/done").code == 0
    assert ddq("report", "--json").data == before
    assert metrics("runs/done") == metrics_before


def test_data_that_vanish_while_resuming_leave_the_run_as_it_was(
    halfway: Path, undisturbed: list[bytes]
) -> None:
    Path("images.npz").rename("away.npz")
    assert ddq(*RESUME.split()).code == 2
    Path("away.npz").rename("images.npz")
    assert exit_code(in_child(RESUME)) == 0
    assert result() == undisturbed


# ---- training that goes wrong

LOSS = """
import numpy as np, torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

calls = 0

def make(bad=(), kind="gradient"):
    def loss(output, target):
        global calls
        if output.requires_grad and torch.is_grad_enabled():
            calls += 1
        value = F.cross_entropy(output, target)
        if calls - 5 not in bad:  # one call is a trial, four calibrate
            return value
        if kind == "data":
            x.fill_(torch.nan)
            return value
        return value * torch.nan if kind == "loss" else value + (output[0, 0] * 0).sqrt() * 0

    arrays = np.load("images.npz")
    x = torch.tensor(arrays["x_train"] / 127.5 - 1, dtype=torch.float32)[:, None]
    y = torch.tensor(arrays["y_train"])
    val = TensorDataset(x[:16].clone(), y[:16])
    if kind == "data" and not bad:
        x[5] = torch.nan
    return {"train": TensorDataset(x, y), "val": val, "loss": loss}
"""


def finetune_with_bad_loss(bad: list[int], kind: str, *flags: str) -> Any:
    """`ddq finetune` whose loss goes wrong at these of its training calls, counted from 1."""
    Path("data.py").write_text(LOSS)
    settings = ["--data", "data.py:make", "--set", f"data.kwargs={{bad: {bad}, kind: {kind}}}"]
    return ddq("finetune", "model.pt", "--run-dir", RUN, *settings, *flags)


@pytest.mark.parametrize(
    ("kind", "what"), [("loss", "The loss became nan"), ("gradient", "The gradient of 8.")]
)
def test_training_that_diverges_goes_back_to_the_best_state_with_a_smaller_learning_rate(
    project: Path, kind: str, what: str
) -> None:
    answer = finetune_with_bad_loss([5], kind)
    assert answer.code == 0, answer.err
    note = next(line for line in answer.err.splitlines() if what in line)
    assert note.startswith("warning: ")
    assert "at step 5 of 12" in note
    back = r"; back from step 4 to the best state, of step [0234], continuing with train.lr 0.001$"
    assert re.search(back, note)
    assert steps() == [10, 12]
    assert look_steps() == [0, 2, 3, 4, 6, 8, 9, 10, 12]
    (warning,) = ddq("report", "--json").data["warnings"]
    assert warning == (
        "training diverged once and continued at a tenth of the learning rate; "
        "take a smaller train.lr (now 0.01)"
    )
    assert max(entry["lr"] for entry in metrics() if "lr" in entry) < 0.001


ONE_OUTPUT = """
def build():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))

def regression():
    loss = lambda output, target: (output[:, 0] - target).square().mean()
    metric = lambda output, target: 1 / (1 + (output[:, 0] - target).abs())
    return {**make(), "loss": loss, "metric": metric}
"""


def test_outputs_that_are_no_scores_of_classes_are_distilled_if_asked(project: Path) -> None:
    Path("one.py").write_text(LOSS + ONE_OUTPUT)
    torch.save({"1.weight": torch.randn(1, 64) / 64, "1.bias": torch.zeros(1)}, "one.pt")
    command = ["finetune", "one.pt", "--arch", "one.py:build", "--data", "one.py:regression"]
    command += ["--max-steps", "2"]
    assert ddq(*command).code == 0
    answer = ddq(*command, "--set", "train.distill.weight=0.5", "--run-dir", "half")
    assert answer.code == 0, answer.err
    assert "loss: 50 % distillation from the float model\n" in answer.err


# ---- SDQ, and other teachers


@pytest.mark.parametrize(
    ("settings", "stops"), [("--act-bits 3", (4, 9)), ("--set weights.levels=uniform", (9,))]
)
def test_sdq_meets_the_budget_and_a_resumed_run_ends_with_the_same_bytes(
    project: Path, settings: str, stops: tuple[int, ...]
) -> None:
    """Stopped before and after the freeze; also with learned levels of inputs, as 3 bits have."""
    command = f"finetune model.pt --method sdq --target-bits 3 -q --run-dir a {settings}"
    assert exit_code(in_child(command, before=keeping_moments("a"))) == 0
    steps = sorted(Path("kills").glob("*-_train_step-None"))
    for stop in stops:
        restore(steps[stop], "b")
        assert exit_code(in_child("finetune --resume --run-dir b -q")) == 0
        assert result("b") == result("a")
    report = json.loads(Path("a/report.json").read_text())
    assert report["totals"]["average_bits"] <= 3
    shown = ddq("report", "a", "--html", "report.html")
    assert shown.code == 0, shown.err
    assert all(entry["probabilities"] == {} for entry in metrics("a") if "loss" in entry)


def test_sdq_reports_its_dbps_and_draws_them(project: Path) -> None:
    command = ["finetune", "model.pt", "--method", "sdq", "--target-bits", "3", "--epochs", "8"]
    assert ddq(*command, "--run-dir", "a", "-q").code == 0
    first = next(entry for entry in metrics("a") if "loss" in entry)
    assert first["step"] == 10
    assert set(first["probabilities"]) == {"0.weight", "3.weight", "8.weight"}
    assert all(0 < share < 1 for share in first["probabilities"].values())
    assert ddq("report", "a", "--html", "report.html").code == 0
    assert "DBPs over time" in Path("report.html").read_text()
    assert ddq("export", "a", "-o", "a.safetensors").code == 0
    for source in ("a", "a.safetensors"):
        assert ddq("report", source, "--json").data["run"]["method"] == "sdq"
        assert "\nmethod     sdq\n" in ddq("report", source).out


def test_another_network_with_the_same_outputs_can_teach(project: Path) -> None:
    torch.manual_seed(5)
    wide = [torch.randn(20, 1, 3, 3), *[torch.ones(20)] * 2, torch.zeros(20), torch.ones(20)]
    names = ["0.weight", "1.weight", "1.running_var", "1.running_mean", "1.bias"]
    state = dict(zip(names, wide, strict=True))
    state |= {"3.weight": torch.randn(16, 20, 3, 3), "3.bias": torch.zeros(16)}
    rest = torch.load("model.pt")
    torch.save({k: state.get(k, v) for k, v in rest.items()}, "big.pt")
    command = ["finetune", "model.pt", "--max-steps", "5", "--seed", "1"]
    teacher = [
        "--set",
        "train.teacher.checkpoint=big.pt",
        "--set",
        "train.teacher.arch=net.py:build",
    ]
    losses = []
    for options in ([], [*teacher, "--set", "train.teacher.kwargs.width=20"]):
        answer = ddq(*command, *options, "--run-dir", f"run{len(losses)}")
        assert answer.code == 0, answer.err
        losses.append(
            [e["held_out_loss"] for e in metrics(f"run{len(losses)}") if "held_out_loss" in e]
        )
    assert "distillation from big.pt" in answer.err
    assert min(losses[1]) > max(losses[0])  # random outputs cannot be learned in five steps
    torch.save({k: v + 1 for k, v in torch.load("big.pt").items()}, "big.pt")
    Path("run1/report.json").unlink()
    answer = ddq("finetune", "--resume", "--run-dir", "run1")
    assert answer.code == 2
    assert "The teacher's checkpoint is not the one (SHA-256 " in answer.err


def test_a_teacher_of_other_classes_is_refused(project: Path) -> None:
    Path("net.py").write_text(
        Path("net.py").read_text()
        + """
def five():
    net = build()
    net[8] = nn.Linear(16, 5)
    return net
"""
    )
    state = torch.load("model.pt")
    state |= {"8.weight": torch.zeros(5, 16), "8.bias": torch.zeros(5)}
    torch.save(state, "five.pt")
    teacher = "{checkpoint: five.pt, arch: 'net.py:five'}"
    answer = ddq("finetune", "model.pt", "--set", f"train.teacher={teacher}", "--run-dir", "none")
    assert answer.code == 2
    message = "The teacher five.pt returns outputs of shape [32, 5], and the model of [32, 4]"
    assert message in answer.err
    assert not Path("none").exists()


def test_training_that_diverges_again_delivers_the_best_state(project: Path) -> None:
    # The second try begins with the sixth call.
    answer = finetune_with_bad_loss([5, 6], "loss", "--json")
    assert answer.code == 0, answer.err
    state = torch.load(Path(RUN) / "last.pt")
    assert (state["step"], state["lr_scale"]) == (state["best"]["step"], 0.1)
    end = f"training ends, and the best state, of step {state['step']}, is delivered"
    assert any(
        line.startswith("warning: The loss became nan at step")
        and line.endswith(f", also at a tenth of the learning rate; {end}")
        for line in answer.err.splitlines()
    )
    (warning,) = answer.data["warnings"]
    assert warning.startswith("training diverged twice")
    assert answer.data["course"]["best_step"] == state["step"] <= 4
    assert look_steps()[-1] == state["step"]
    for name, value in torch.load(Path(RUN) / "final.pt")["weights"].items():
        assert value.isfinite().all(), name
    before = Path(RUN, "final.pt").read_bytes()
    Path(RUN, "final.pt").unlink()
    again = ddq("finetune", "--resume", "--run-dir", RUN, "--json").data
    assert again | {"seconds": 0} == answer.data | {"seconds": 0}
    assert Path(RUN, "final.pt").read_bytes() == before


def test_a_learning_rate_far_too_large_names_the_layer_where_it_shows(project: Path) -> None:
    answer = ddq("finetune", "model.pt", "--set", "train.lr=1e30", "--epochs", "12")
    assert answer.code == 0, answer.err
    first, second, last = [line for line in answer.err.splitlines() if "warning: " in line][:3]
    assert re.search(
        r"(first in|of) [0138]\.(weight|bias).* at step [123] of 48"
        r"|at step [123] of 48, first in [0138]",
        first,
    )
    assert second.endswith("training ends, and the best state, of step 0, is delivered")
    assert last.endswith("of step 0, is delivered; take a smaller train.lr (now 1e+30)")


def test_data_that_are_not_finite_are_blamed_and_not_the_learning_rate(project: Path) -> None:
    answer = finetune_with_bad_loss([], "data")
    assert (answer.code, answer.err.splitlines()[-1]) == (
        2,
        "Error: Batch 1 of the training data holds NaN or infinite values; repair the data.",
    )


def test_a_batch_that_is_not_finite_is_blamed_too(project: Path) -> None:
    answer = finetune_with_bad_loss([5], "data")
    assert (answer.code, answer.err.splitlines()[-1]) == (
        1,
        "Error: The batch at step 6 of 12 holds NaN or infinite values; "
        "repair the data and resume.",
    )
    assert "warning" not in answer.err


MOODY = """
class Moody(nn.Sequential):
    def forward(self, x):
        assert not self.training, "no training"
        return super().forward(x)

def moody():
    return Moody(*build())
"""


def test_an_error_of_the_network_in_training_is_one_sentence(project: Path) -> None:
    with open("net.py", "a") as file:
        file.write(MOODY)
    answer = ddq("finetune", "model.pt", "--arch", "net.py:moody")
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == (
        "Error: Training failed: AssertionError: no training; `ddq --debug ...` shows where."
    )


def test_out_of_memory_names_the_remedy(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "_train_step", full)
    answer = ddq("finetune", "model.pt")
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == (
        "Error: Training failed: out of memory; try a smaller --set data.batch_size (now 16)."
    )


def test_inputs_unlike_those_of_training_are_told_early_and_in_the_report(project: Path) -> None:
    answer = ddq("finetune", "model.pt", "--max-steps", "1", "--set", "data.std=[0.05]", "--json")
    lines = answer.err.splitlines()
    (told,) = (n for n, line in enumerate(lines) if "the inputs are not as in training" in line)
    assert "data.mean [0.5], data.std [0.05]" in lines[told]
    assert lines[told - 1].startswith("float accuracy: ")
    assert answer.data["warnings"][0] in lines[told]


def test_a_budget_of_bits_grows_with_the_text_in_the_file(project: Path) -> None:
    """Here the file says more than is reserved for it: long warnings."""
    unlike = ["--set", "data.std=[0.05]"]
    data = ddq("finetune", "model.pt", "--max-steps", "2", *unlike, "--json", "-q").data
    totals = data["totals"]
    assert len("".join(data["warnings"])) > 200
    assert totals["quantized_bytes"] <= totals["weights"] * 4 / 8
    assert totals["bytes"] <= totals["budget_bytes"]
    assert ddq("export", data["run_dir"], "-o", "a.safetensors").code == 0
    assert Path("a.safetensors").stat().st_size == totals["bytes"]


def test_the_start_and_a_missing_budget_are_told_once(project: Path) -> None:
    recipe = Path("ddq.yaml").read_text()
    answer = ddq("finetune", "model.pt", "--max-steps", "4", "--run-dir", RUN)
    first = next(entry for entry in metrics() if "held_out_loss" in entry)
    loss, accuracy = first["held_out_loss"], first["held_out_accuracy"]
    start = f"start: held-out loss {loss:.3f}, held-out accuracy {accuracy:.2f} %"
    lines = answer.err.splitlines()
    assert lines.count(start) == 1
    assert lines.index(start) < next(k for k, line in enumerate(lines) if "step 4/4" in line)
    assert "no budget" not in answer.err
    assert "start: " not in ddq("finetune", "model.pt", "--epochs", "0").err
    Path("ddq.yaml").write_text(recipe.replace("budget: {target_bits: 4}\n", ""))
    flags = ["finetune", "model.pt", "--dry-run", "--max-bits", "6"]
    without = ddq(*flags).err.splitlines()
    note = (
        "no budget is given: weights take up to 6 bits, their maximum; give --target-bits 4 or "
        "--target-size 150kB"
    )
    assert without.count(note) == 1
    assert note not in ddq(*flags, "--target-size", "60%").err.splitlines()
