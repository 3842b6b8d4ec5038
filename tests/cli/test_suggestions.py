"""A wrong option is answered with the right one."""

from __future__ import annotations

import pytest
from tiny_project import ddq

MEANT = {
    "finetune --learning-rate": "--lr",
    "finetune --learning_rate": "--lr",
    "finetune --lrate": "--lr",
    "finetune --epoch": "--epochs",
    "finetune --bs": "--batch-size",
    "finetune --batchsize": "--batch-size",
    "finetune --num-workers": "--workers",
    "finetune --gpu": "--device",
    "finetune --steps": "--max-steps",
    "finetune --bits": "--target-bits, --max-bits, --min-bits or --act-bits",
    "finetune --size": "--target-size or --batch-size",
    "finetune --sed": "--seed",
    "finetune --momentum": "--set train.momentum=...",
    "finetune --weight-decay": "--set train.weight_decay=...",
    "finetune --batch-norm": "--set train.batch_norm=...",
    "finetune --distill": (
        "--set train.distill.weight=..., --set train.distill.temperature=... or "
        "--set train.distill.layers=..."
    ),
    "export --output": "--out",
    "report --maxsize": "--max-size",
    "report --drop": "--max-drop",
    "inspect --outdir": "--out",
}


@pytest.mark.parametrize(("command", "meant"), MEANT.items(), ids=MEANT)
def test_a_wrong_option_is_answered_with_the_right_one(command: str, meant: str) -> None:
    name, wrong = command.split()
    answer = ddq(*command.split(), "2")
    assert answer.code == 2
    assert answer.err == (
        f"Error: No such option: {wrong}; did you mean {meant}? "
        f"`ddq {name} --help` lists the options.\n"
    )


@pytest.mark.parametrize("command", ["finetune --xyz", "finetune -z", "report --momentum"])
def test_what_means_nothing_is_not_guessed_at(command: str) -> None:
    name, wrong = command.split()
    assert ddq(name, wrong).err == (
        f"Error: No such option: {wrong}. `ddq {name} --help` lists the options.\n"
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "export --format safetensor",
            "Invalid value for '--format': 'safetensor' is not one of 'safetensors', 'onnx', "
            "'tflite', 'pte', 'coreml', 'c'; did you mean safetensors?",
        ),
        ("finetune --epochs two", "Invalid value for '--epochs': 'two' is not a valid integer."),
        ("finetune --lr fast", "Invalid value for '--lr': 'fast' is not a valid number."),
    ],
)
def test_a_wrong_value_is_named_in_plain_words(command: str, message: str) -> None:
    answer = ddq(*command.split())
    assert answer.err.startswith(f"Error: {message} `ddq ")


def test_a_wrong_value_of_the_recipe_is_answered_with_a_likely_one() -> None:
    assert (
        "input should be 'ddq' or 'sdq'; did you mean sdq?"
        in ddq("finetune", "--method", "sdqq").err
    )
