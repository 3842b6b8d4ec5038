"""Bad input gives one message and an exit code, runs no code from it and leaves no files behind."""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_project import RECIPE, ddq, images, make_project

Change = Callable[[], Any]


def truncated(path: str, keep: float = 0.6) -> Change:
    return lambda: Path(path).write_bytes(
        Path(path).read_bytes()[: int(keep * Path(path).stat().st_size)]
    )


def flipped(path: str, at: float = 0.5) -> Change:
    """Flip one bit of the file at a share `at` of its length."""

    def change() -> None:
        content = bytearray(Path(path).read_bytes())
        content[int(at * len(content))] ^= 16
        Path(path).write_bytes(content)

    return change


def flipped_in_a_tensor(path: str) -> Change:
    """Flip one bit of the largest tensor of a training state."""

    def change() -> None:
        content = bytearray(Path(path).read_bytes())
        with zipfile.ZipFile(path) as archive:
            largest = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
        content[content.index(largest) + len(largest) // 2] ^= 16
        Path(path).write_bytes(content)

    return change


def holding(path: str, content: bytes | str) -> Change:
    return lambda: Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def gone(path: str) -> Change:
    return lambda: Path(path).unlink()


def replaced(path: str, old: str, new: str) -> Change:
    return lambda: Path(path).write_text(Path(path).read_text().replace(old, new, 1))


def nothing() -> None:
    pass


# ---- the command line

FLAGS = {
    "unknown option": ("finetune model.pt --epoch 2", "No such option: --epoch"),
    "unknown command": ("finetun model.pt", "Did you mean 'finetune'?"),
    "an argument too many": ("finetune model.pt more.pt", "unexpected extra argument"),
    "an option without its value": ("finetune model.pt --epochs", "--epochs"),
    "no number": ("finetune model.pt --epochs two", "Invalid value for '--epochs'"),
    "budget of 0 bits": (
        "finetune model.pt --target-bits 0",
        "budget.target_bits = 0.0: input should be gr",
    ),
    "negative budget": (
        "finetune model.pt --target-bits -4",
        "budget.target_bits = -4.0: input should be gr",
    ),
    "budget above 32 bits": ("finetune model.pt --target-bits 33", "less than or equal to 32"),
    "budget above what weights may have": (
        "finetune model.pt --target-bits 5 --max-bits 4",
        "no weight may take more than 4",
    ),
    "budget of NaN bits": ("finetune model.pt --target-bits nan", "budget.target_bits = nan"),
    "size of 0": ("finetune model.pt --target-size 0kB", "'0kB' is less than one byte"),
    "size of 400 digits": (
        f"finetune model.pt --target-size {'9' * 400}",
        "is more than a file can have",
    ),
    "two names of one size": (
        "finetune model.pt --target-size 2kB,2000",
        "2kB and 2000 are the same: 2,000 b",
    ),
    "a target by flag and one by --set": (
        "finetune model.pt --target-size 2kB --set budget.target_bits=4",
        "are both given; give one",
    ),
    "a field by flag and by --set": (
        "finetune model.pt --target-bits 3 --set budget.target_bits=5",
        "budget.target_bits is given twice",
    ),
    "a section and a field of it": (
        "finetune model.pt --set 'budget={target_bits: 4}' --target-bits 3",
        "budget.target_bits and budget are both given",
    ),
    "share beyond all files": (
        f"finetune model.pt --target-size {'9' * 19 + '%'}",
        "is more than a file can have",
    ),
    "share below a byte": (
        "finetune model.pt --target-size 0.00001%",
        "is less than one byte, of a float model",
    ),
    "negative size": ("finetune model.pt --target-size=-5kB", "'-5kB' is not a size; write 150kB"),
    "unknown unit": ("finetune model.pt --target-size '5 bananas'", "is not a size; write 150kB"),
    "both targets": (
        "finetune model.pt --target-bits 4 --target-size 2kB",
        "are both given; give one",
    ),
    "budget out of reach": (
        "finetune model.pt --target-bits 0.5",
        "The budget of 0.5 bits a weight (",
    ),
    "size out of reach": ("finetune model.pt --target-size 500", "the smallest reachable size is"),
    "0 bits": ("finetune model.pt --max-bits 0", "weights.max_bits = 0: input should be greater"),
    "9 bits": ("finetune model.pt --max-bits 9", "weights.max_bits = 9: input should be less"),
    "min above max": (
        "finetune model.pt --max-bits 3 --min-bits 5",
        "min_bits 5 is above max_bits 3",
    ),
    "negative epochs": ("finetune model.pt --epochs -1", "train.epochs = -1"),
    "set without =": ("finetune model.pt --set train.lr", "write it as --set train.lr=0.02"),
    "set of no field": (
        "finetune model.pt --set train.lrr=1",
        "train.lrr: unknown field; did you mean train.lr?",
    ),
    "set of a section": (
        "finetune model.pt --set train=5",
        "train = 5: is a section; known in it: epochs",
    ),
    "set of no YAML": ("finetune model.pt --set 'data.mean=[0.5'", "the value is not YAML"),
    "no such recipe": (
        "finetune model.pt --recipe my.yaml",
        "my.yaml cannot be read: No such file",
    ),
    "a folder as recipe": ("finetune model.pt --recipe .", "cannot be read: it is no regular file"),
    "no such checkpoint": ("finetune gone.pt", "There is no checkpoint gone.pt"),
    "a folder as checkpoint": ("finetune .", "is a folder; name the checkpoint file in it"),
    "unknown torchvision network": ("finetune model.pt --arch resnet81", "did you mean resnet18"),
    "no such module": ("finetune model.pt --arch nets.tiny:build", "There is no module nets"),
    "a file without its function": (
        "finetune model.pt --arch net.py",
        "net.py names a file, and no function in it; write net.py:",
    ),
    "data of a file without its function": (
        "finetune model.pt --data net.py",
        "net.py names a file, and no function in it; write net.py:",
    ),
    "no such file": ("finetune model.pt --arch nets.py:build", "There is no file nets.py"),
    "no such factory": (
        "finetune model.pt --arch net.py:built",
        "built is not there in net.py; it has build",
    ),
    "factory's keywords": (
        "finetune model.pt --set model.kwargs.depth=3",
        "unexpected keyword argument 'depth'",
    ),
    "wrong shapes": (
        "finetune model.pt --set model.kwargs.width=9",
        "[8, 1, 3, 3] instead of [9, 1, 3, 3]",
    ),
    "override of nothing": (
        "finetune model.pt --set 'overrides=[{match: x*, bits: 4}]'",
        "x*",
    ),
    "no such data": ("finetune model.pt --data gone", "The data gone do not exist"),
    "no such npz": ("finetune model.pt --data gone.npz", "gone.npz does not exist"),
    "no such data set": ("finetune model.pt --data CIFAR11:data/x", "did you mean CIFAR10"),
    "data set not there": (
        "finetune model.pt --data CIFAR10:data/x",
        "does not hold torchvision's CIFAR10",
    ),
    "no such data factory": ("finetune model.pt --data net.py:data", "data is not there in net.py"),
    "no CUDA device": ("finetune model.pt --set train.device=gpu", "train.device = 'gpu'"),
    "run folder is a file": (
        "finetune model.pt --run-dir net.py",
        "net.py cannot be made: File exists",
    ),
    "run folder in a file": (
        "finetune model.pt --run-dir net.py/run",
        "cannot be made: Not a directory",
    ),
    "nothing to resume": ("finetune --resume", "There is no unfinished run under"),
    "resume where no run is": (
        "finetune --resume --run-dir here",
        "in here: recipe.yaml is missing",
    ),
    "report without a run": ("report", "There is no run under"),
    "report of nothing": ("report gone", "gone is no run folder"),
    "report of no run": ("report .", "holds no finished run: report.json is missing"),
    "report of a checkpoint": ("report model.pt", "not a ddq file; `ddq inspect model.pt` shows"),
    "report of a text": ("report net.py", "net.py"),
    "report in two formats": ("report --csv --md", "exclude each other"),
    "export without a run": ("export", "There is no run under"),
    "export of nothing": ("export gone", "gone is no run folder"),
    "inspect of nothing": ("inspect gone.pt", "gone.pt"),
    "inspect of a text": ("inspect net.py", "net.py"),
}


@pytest.mark.parametrize(("command", "message"), FLAGS.values(), ids=FLAGS)
def test_wrong_usage_gives_one_message_and_exit_code_2(
    project: Path, command: str, message: str
) -> None:
    check_refusal(command, message, 2)


# ---- recipes

RECIPES: dict[str, tuple[bytes | str, str]] = {
    "a list": ("- epochs: 3\n", "holds a list where sections such as train: are expected"),
    "a word": ("resnet18", "holds a str where sections"),
    "no YAML": ("train: {epochs: 3", "not YAML: while parsing a flow mapping"),
    "tabs": ("train:\n\tepochs: 3", "not YAML: while scanning"),
    "bytes": (b"\x93NUMPY\x01\x00v\x00", "byte 0: not UTF-8 text"),
    "UTF-16": ("train: {epochs: 3}".encode("utf-16"), "not UTF-8 text"),
    "zeros": (bytes(64), "not YAML: "),
    "python objects": (
        "name: !!python/object/apply:os.mkdir [pwned]",
        "could not determine a constructor",
    ),
    "a key twice": ("train: {epochs: 3, lr: 0.1, epochs: 4}", "epochs is given twice"),
    "a section twice": ("train: {epochs: 3}\ntrain: {lr: 1}", "train is given twice"),
    "nested without end": ("[" * 1000, "nested too deeply"),
    "aliases without end": ("a: &a [&b [*a]]", "holds more than 100,000 values"),
    "an exploding alias": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n"
            for p, c in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "holds more than 100,000 values",
    ),
    "an unknown section": (
        RECIPE + "training: {epochs: 3}",
        "training: unknown field; did you mean train?",
    ),
    "a number as section": (
        RECIPE.replace("activations: {bits: 8}", "activations: 8"),
        "activations = 8: is a section",
    ),
    "an override of nothing": (
        RECIPE + "overrides: [{bits: 4}]",
        "overrides.0: says nothing about which layers",
    ),
    "mean without std": (RECIPE.replace("std: [0.5]", "std: []"), "mean has 1 values and std 0"),
    "std of 0": (
        RECIPE.replace("std: [0.5]", "std: [0]"),
        "data.std.0 = 0: input should be greater than 0",
    ),
    "infinite mean": (
        RECIPE.replace("mean: [0.5]", "mean: [.inf]"),
        "data.mean.0 = inf: input should be a finite",
    ),
    "a date as keyword": (
        RECIPE.replace("arch:", "kwargs: {when: 2026-01-31}, arch:"),
        "is a date; quote it",
    ),
    "no date": ("name: 2026-99-99", "not YAML"),
    "infinite keyword": (
        RECIPE.replace("arch:", "kwargs: {width: .inf}, arch:"),
        "inf is not finite",
    ),
    "a number as name of a keyword": (
        RECIPE.replace("arch:", "kwargs: {1: 2}, arch:"),
        "model.kwargs.1.[key] = 1: input should be a valid string",
    ),
    "true for a number": (
        RECIPE.replace("activations: {bits: 8}", "activations: {bits: true}"),
        "activations.bits = True: true",
    ),
    "no look at the gates": (
        RECIPE + "gates: {looks: 0}",
        "gates.looks = 0: input should be greater than or equal to 1",
    ),
    "pickles from a recipe found": (
        RECIPE.replace("arch:", "pickle: true, arch:"),
        "ddq.yaml has model.pickle: true",
    ),
    "a rule of the other method": (
        RECIPE + "method: sdq\ngates: {rule: paper}",
        "gates.rule=paper is a rule of method ddq, and method is sdq",
    ),
    "an unknown method": (RECIPE + "method: hawq", "method = 'hawq': "),
    "a teacher without a checkpoint": (
        RECIPE.replace("epochs: 3", "epochs: 3, teacher: {arch: 'net.py:build'}"),
        "train.teacher: arch or kwargs are given without a checkpoint of the teacher",
    ),
    "a teacher that nobody hears": (
        RECIPE.replace(
            "epochs: 3", "epochs: 3, teacher: {checkpoint: model.pt}, distill: {weight: 0}"
        ),
        "train.teacher is given, and train.distill.weight=0 trains without it",
    ),
    "a teacher that is not there": (
        RECIPE.replace("epochs: 3", "epochs: 3, teacher: {checkpoint: big.pt}"),
        "big.pt",
    ),
    "no model": ("data: {source: images.npz}", "say how to build it with --arch"),
}


@pytest.mark.parametrize(("content", "message"), RECIPES.values(), ids=RECIPES)
def test_an_invalid_recipe_gives_one_message_and_exit_code_2(
    project: Path, content: bytes | str, message: str
) -> None:
    holding("ddq.yaml", content)()
    check_refusal("finetune model.pt", message, 2)


def test_a_flag_or_a_named_recipe_allows_pickles(project: Path) -> None:
    holding("ddq.yaml", RECIPE.replace("arch:", "pickle: true, arch:"))()
    assert ddq("finetune", "--dry-run", "--allow-pickle").code == 0
    assert ddq("finetune", "--dry-run", "--set", "model.pickle=true").code == 0
    assert ddq("finetune", "--dry-run", "--set", "model.pickle=false").code == 0
    assert ddq("finetune", "--dry-run", "--recipe", "ddq.yaml").code == 0
    assert (
        ddq("finetune", "--recipe", "ddq.yaml", "--run-dir", "runs/a", "--max-steps", "0").code == 0
    )
    assert ddq("finetune", "--resume", "--run-dir", "runs/a").code == 0, "made by this user"


# ---- checkpoints


def saved(content: Any, **options: Any) -> Change:
    return lambda: torch.save(content() if callable(content) else content, "model.pt", **options)


def weights(**changed: Any) -> dict[str, Any]:
    """Return the state dict with some tensors changed; `8_bias` stands for `8.bias`."""
    state = torch.load("model.pt", weights_only=True)
    for name, change in changed.items():
        state[name.replace("_", ".", 1)] = change(state[name.replace("_", ".", 1)])
    return state


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def compressed() -> None:
    """Make model.pt a zip bomb: its records compressed, one of them 64 MiB of zeros."""
    with zipfile.ZipFile("model.pt") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile("model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, bytes(2**26) if name.endswith("data/0") else content)


def safetensors(header: bytes, size: int | None = None, data: bytes = b"") -> Change:
    length = len(header) if size is None else size
    return holding("model.safetensors", length.to_bytes(8, "little") + header + data)


HUGE = b'{"w":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'

CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "empty": (holding("model.pt", b""), "it is empty"),
    "a text": (
        holding("model.pt", "hello, this is no model"),
        "is not a checkpoint: it begins with b'hello",
    ),
    "cut short": (truncated("model.pt"), "it is cut short or damaged"),
    "cut to its head": (truncated("model.pt", 0.01), "it is cut short or damaged"),
    "a flipped bit in a weight": (flipped("model.pt", 0.35), "damaged"),
    "a flipped bit in the pickle": (flipped("model.pt", 0.05), "damaged"),
    "another zip": (
        lambda: zipfile.ZipFile("model.pt", "w").writestr("a.txt", "a"),
        "another kind of zip file",
    ),
    "a zip bomb": (compressed, "is compressed"),
    "a malicious pickle": (saved({"0.weight": Malicious()}), "unpickling can run any code"),
    "a malicious old pickle": (
        lambda: Path("model.pt").write_bytes(pickle.dumps(Malicious())),
        "model.pt",
    ),
    "a pickled module": (
        saved(lambda: torch.nn.Linear(2, 2)),
        "save its state_dict() instead, or give --allow-pickle",
    ),
    "a list": (saved([1, 2]), "holds no weights"),
    "no tensors": (saved({"epoch": 3}), "holds no weights: its keys are 'epoch'"),
    "a lost key": (
        saved(lambda: {n: t for n, t in weights().items() if n != "3.bias"}),
        "it lacks 1 tensors (3.bias)",
    ),
    "an unknown key": (
        saved(lambda: {**weights(), "3.x": torch.ones(1)}),
        "it has unknown 1 tensors (3.x)",
    ),
    "another shape": (
        saved(lambda: weights(**{"8_weight": lambda w: w[:, :3]})),
        "[4, 3] instead of [4, 16]",
    ),
    "NaN": (
        saved(lambda: weights(**{"0_weight": lambda w: w * torch.nan})),
        "0.weight holds 72 NaN or infinite",
    ),
    "infinity": (
        saved(lambda: weights(**{"8_bias": lambda b: b / 0})),
        "8.bias holds 4 NaN or infinite",
    ),
    "sparse": (
        saved(lambda: weights(**{"8_weight": lambda w: w.to_sparse()})),
        "8.weight is sparse",
    ),
    "a safetensors header beyond the file": (
        safetensors(b"{}", 2**40),
        "it is no whole safetensors file",
    ),
    "a safetensors header that claims too much": (
        safetensors(HUGE),
        "it is no whole safetensors file",
    ),
    "no JSON in safetensors": (safetensors(b"{{{{{{{{"), "it is no whole safetensors file"),
    "empty safetensors": (safetensors(b"{}"), "holds no weights"),
}


@pytest.mark.parametrize(("change", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_an_invalid_checkpoint_is_refused_and_runs_no_code(
    project: Path, change: Change, message: str
) -> None:
    change()
    name = "model.safetensors" if Path("model.safetensors").exists() else "model.pt"
    check_refusal(f"finetune {name}", message, 2)


# ---- data


def arrays(**changed: Any) -> Change:
    """Change some arrays of images.npz."""

    def change() -> None:
        whole = {**images(80, "x_train", "y_train"), **images(32, "x_test", "y_test")}
        whole.update({name: array(whole[name]) for name, array in changed.items()})
        np.savez(
            "images.npz", **{name: array for name, array in whole.items() if array is not None}
        )

    return change


def bomb() -> None:
    """Make images.npz claim 2^40 images of 8x8 in a few bytes."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 8, 8), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile("images.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(
                f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
            )


def folders(*files: str) -> Change:
    """Make images.npz a folder with these PNG and invalid files; a name ending in / is a folder."""

    def change() -> None:
        from PIL import Image

        Path("images.npz").unlink()
        for name in files:
            path = Path("images.npz") / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if name.endswith(".png"):
                Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
            elif not name.endswith("/"):
                path.write_bytes(b"no image")

    return change


def factory(code: str) -> Change:
    def change() -> None:
        Path("data.py").write_text(
            "import torch\nfrom torch.utils.data import TensorDataset\n" + code
        )
        replaced("ddq.yaml", "images.npz", "data.py:make")()

    return change


SET = "TensorDataset(torch.rand(32, 1, 8, 8), torch.arange(32) % 4)"
RGB, MANY = SET.replace("1, 8", "3, 8"), SET.replace("% 4", "")
MAKE = "def make(): return dict(train={}, val={})"

DATA: dict[str, tuple[Change, str]] = {
    "a vanished file": (gone("images.npz"), "images.npz does not exist"),
    "cut short": (truncated("images.npz"), "images.npz cannot be read"),
    "a flipped bit": (flipped("images.npz", 0.2), "images.npz cannot be read"),
    "no arrays": (
        lambda: np.savez("images.npz", a=np.ones(3)),
        "x_train/y_train or train_images/train_labels is expected",
    ),
    "a bomb": (bomb, "images.npz cannot be read"),
    "pickled objects": (
        arrays(x_train=lambda x: np.array([Malicious()] * 80)),
        "without pickled objects",
    ),
    "no images": (
        arrays(x_train=lambda x: x[:0], y_train=lambda y: y[:0]),
        "x_train holds no images",
    ),
    "fewer labels": (arrays(y_train=lambda y: y[:-1]), "but y_train holds 79 labels"),
    "a single class": (arrays(y_train=lambda y: y * 0), "y_train holds a single class"),
    "a label below 0": (arrays(y_train=lambda y: y - 1), "holds the label -1; labels count from 0"),
    "a label beyond the model": (
        arrays(y_train=lambda y: y + 3),
        "The model gives 4 scores but the data have 7 classes",
    ),
    "a label unknown to training": (
        arrays(y_test=lambda y: y + 3),
        "y_test holds the label 6, y_train none above 3",
    ),
    "broken labels": (arrays(y_train=lambda y: y / 2), "whole numbers [N] are expected"),
    "NaN": (arrays(x_train=lambda x: x[:, None] * np.float32("nan")), "values that are not finite"),
    "images of another depth": (arrays(x_train=lambda x: x[..., None].repeat(3, 3)), "mean"),
    "an empty folder": (folders("readme.txt"), "it must hold train/ and val/ (or test/)"),
    "no test images": (
        folders("train/a/1.png", "train/b/1.png"),
        "it must hold train/ and val/ (or test/)",
    ),
    "a folder of one class": (folders("train/a/1.png", "test/a/1.png"), "holds a single class, a"),
    "an empty class": (
        folders("train/a/1.png", "train/b/", "test/a/1.png", "test/b/1.png"),
        "holds no images of b",
    ),
    "other classes": (
        folders("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"),
        "differ in their classes",
    ),
    "an unreadable image": (
        folders(*(f"{s}/{c}/1.png" for s in ("train", "test") for c in "abcd"), "train/a/2.jpg"),
        "2.jpg",
    ),
    "a factory that raises": (
        factory("def make(): raise OSError('no disk')"),
        "failed: OSError: no disk",
    ),
    "a factory that exits": (factory("def make(): raise SystemExit(0)"), "failed: SystemExit"),
    "a factory that returns nothing": (
        factory("def make(): pass"),
        "returned a NoneType; train and val missing",
    ),
    "a file with a syntax error": (factory("def make(:"), "raised SyntaxError"),
    "a factory without evaluation": (
        factory(f"def make(): return {{'train': {SET}}}"),
        "val missing",
    ),
    "a factory of other images": (
        factory(MAKE.format(RGB, RGB)),
        "The model cannot run on these data",
    ),
    "a factory whose labels are too high": (
        factory(MAKE.format(MANY, SET)),
        "A label lies beyond the model's 4 scores",
    ),
    "a factory of empty sets": (factory(MAKE.format([], SET)), "holds no samples"),
}


@pytest.mark.parametrize(("change", "message"), DATA.values(), ids=DATA)
def test_invalid_data_are_refused_before_training(
    project: Path, change: Change, message: str
) -> None:
    change()
    check_refusal("finetune model.pt", message, 2)


# ---- run folders and exported files

RUN, FILE = "runs/done", "small.safetensors"
RESUME = f"finetune --resume --run-dir {RUN}"


def other_format() -> None:
    torch.save(torch.load(f"{RUN}/last.pt") | {"format": 0}, f"{RUN}/last.pt")


RUNS: dict[str, tuple[Change, str, str, int]] = {
    "a report cut short": (
        truncated(f"{RUN}/report.json"),
        "report",
        "report.json is damaged; `ddq finetune --resume",
        1,
    ),
    "a digit of a report flipped": (
        flipped(f"{RUN}/report.json", 0.5),
        "report",
        "report.json is damaged",
        1,
    ),
    "a report of another kind": (
        holding(f"{RUN}/report.json", "[1]"),
        f"report {RUN}",
        "report.json is damaged",
        1,
    ),
    "a final state cut short": (truncated(f"{RUN}/final.pt"), "export", "final.pt is damaged", 1),
    "a flipped bit of a final state": (
        flipped(f"{RUN}/final.pt", 0.4),
        "export",
        "final.pt is damaged",
        1,
    ),
    "no final state": (gone(f"{RUN}/final.pt"), f"export {RUN}", "holds no final.pt", 2),
    "a malicious final state": (
        lambda: torch.save({"a": Malicious()}, f"{RUN}/final.pt"),
        "export",
        "final.pt is damaged",
        1,
    ),
    "a training state cut short": (truncated(f"{RUN}/last.pt"), RESUME, "last.pt is damaged", 1),
    "a flipped bit of a training state": (
        flipped_in_a_tensor(f"{RUN}/last.pt"),
        RESUME,
        "last.pt is damaged",
        1,
    ),
    "a training state of another kind": (
        lambda: torch.save([1], f"{RUN}/last.pt"),
        RESUME,
        "last.pt is damaged",
        1,
    ),
    "a training state of another ddq": (
        other_format,
        RESUME,
        "This version of ddq is not the one (training states of",
        2,
    ),
    "a recipe cut short": (truncated(f"{RUN}/recipe.yaml", 0.995), RESUME, "recipe.yaml", 2),
    "an edited recipe": (
        replaced(f"{RUN}/recipe.yaml", "lr: 0.01", "lr: 0.1"),
        RESUME,
        "lr: 0.01, now lr: 0.1",
        2,
    ),
    "a recipe of bytes": (
        holding(f"{RUN}/recipe.yaml", b"\xff\xfe"),
        "export",
        "not UTF-8 text",
        2,
    ),
    "no recipe": (gone(f"{RUN}/recipe.yaml"), RESUME, "recipe.yaml is missing", 2),
    "no checkpoint any more": (gone("model.pt"), RESUME, "There is no checkpoint model.pt", 2),
    "no data any more": (gone("images.npz"), RESUME, "images.npz does not exist", 2),
    "another checkpoint": (
        saved(lambda: weights(**{"8_bias": lambda b: b + 1})),
        RESUME,
        "The checkpoint is not the one",
        2,
    ),
    "other data": (
        arrays(x_train=lambda x: x[:40], y_train=lambda y: y[:40]),
        RESUME,
        "The data are not the ones (6 steps",
        2,
    ),
    "as many other images": (
        arrays(x_train=lambda x: x ^ (x == 0)),
        RESUME,
        "The data, though as many, are not the ones",
        2,
    ),
    "as many other labels": (
        arrays(y_test=lambda y: y[::-1]),
        RESUME,
        "The data, though as many, are not the ones",
        2,
    ),
    "a file cut short": (truncated(FILE), f"report {FILE}", FILE, 4),
    "a file cut to its head": (truncated(FILE, 0.003), f"report {FILE}", FILE, 2),
    "a flipped bit of a file": (flipped(FILE, 0.6), f"report {FILE}", FILE, 4),
    "a flipped bit of a file's header": (flipped(FILE, 0.1), f"report {FILE}", FILE, 4),
    "a file that claims too much": (
        holding(FILE, (2**50).to_bytes(8, "little") + b"{}"),
        f"report {FILE}",
        FILE,
        2,
    ),
    "an empty file": (holding(FILE, b""), f"report {FILE}", FILE, 2),
    "export into no folder": (
        nothing,
        "export -o gone/x.safetensors",
        "cannot be written: No such file",
        2,
    ),
    "export onto a folder": (nothing, "export -o runs", "cannot be written: Is a directory", 2),
    "a size that is none": (nothing, "report --max-size big", "'big' is not a size", 2),
    "a run that is there": (
        nothing,
        f"finetune model.pt --run-dir {RUN}",
        "already holds a run",
        2,
    ),
}


@pytest.fixture
def exported(finished: Path, exported_file: Path) -> Path:
    """A copy of the project with its finished run and the file exported from it."""
    shutil.copy(exported_file, FILE)
    return finished


@pytest.mark.parametrize(("change", "command", "message", "code"), RUNS.values(), ids=RUNS)
def test_a_damaged_run_folder_or_file_gives_one_message(
    exported: Path, change: Change, command: str, message: str, code: int
) -> None:
    change()
    check_refusal(command, message, code)


# ---- paths


def test_paths_with_spaces_and_other_scripts_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_project(tmp_path / "mé 模型 (1) %s {x} [b]"))
    Path("model.pt").rename("mein Modell ü.pt")
    run = "runs/a run [red]ü"
    assert ddq("finetune", "mein Modell ü.pt", "--run-dir", run).code == 0
    assert ddq("export", run, "-o", "out ü [1].safetensors").code == 0
    answer = ddq("report", "out ü [1].safetensors")
    assert answer.code == 0
    assert "0.weight" in answer.out


@pytest.mark.parametrize("closed", ["model.pt", "images.npz", "ddq.yaml", "net.py"])
def test_a_file_without_read_permission_gives_one_message(
    closed: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with unprivileged(tmp_path_factory) as folder:
        make_project(folder)
        (folder / closed).chmod(0)
        os.chdir(folder)
        check_refusal("finetune model.pt", "Permission denied", 2)


def test_a_folder_without_write_permission_gives_one_message(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with unprivileged(tmp_path_factory) as folder:
        make_project(folder)
        os.chdir(folder)
        folder.chmod(0o555)
        check_refusal("finetune model.pt", "The run folder runs", 2)
        folder.chmod(0o755)


@contextmanager
def unprivileged(factory: pytest.TempPathFactory) -> Any:
    """Yield a folder of a user without root's permissions, and run as that user."""
    folder, home, root = factory.mktemp("user"), Path.cwd(), os.geteuid() == 0
    opened = [p for p in folder.parents if root and not p.stat().st_mode & 1]
    modes = [p.stat().st_mode for p in opened]
    try:
        for path in opened:
            path.chmod(path.stat().st_mode | 0o011)
        if root:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        os.chdir(home)
        for path, mode in zip(opened, modes, strict=True):
            path.chmod(mode)


def check_refusal(command: str, message: str, code: int) -> None:
    """Check exit code, one message on stderr and in the envelope, no traceback, no file changed."""
    before = listing()
    answer = ddq(*shlex.split(command), "--json")
    assert answer.code == code, answer.err
    assert message in answer.err
    errors = [part for part in answer.err.splitlines() if part.startswith("Error: ")]
    assert len(errors) == 1, answer.err
    assert "Traceback" not in answer.err
    assert answer.envelope["status"] == "error"
    assert answer.envelope["exit_code"] == code
    assert [f"Error: {error}" for error in answer.envelope["errors"]] == [
        answer.err[answer.err.index("Error: ") :].rstrip()
    ]
    assert listing() == before


def listing() -> dict[str, bytes | None]:
    """Return every file with its content (None if unreadable), without locks and caches."""
    contents: dict[str, bytes | None] = {}
    for path in sorted(Path().rglob("*")):
        if "__pycache__" not in path.parts and path.name != ".lock":
            contents[str(path)] = None
            with suppress(OSError):
                contents[str(path)] = path.read_bytes()
    return contents
