"""`ddq export`: what it writes is what was trained, or nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_project import ddq, images

import ddqcli
from ddqcli.artifact.decoder import decode
from ddqcli.runs import encode_run
from ddqcli.runs.run import FINAL, Run

RUN = Path("runs/done")


def test_the_file_holds_bit_for_bit_what_was_trained(finished: Path) -> None:
    data = ddq("export", "--json").data
    path = Path(data["path"])
    assert path == RUN / "model.safetensors"
    tensors, _ = decode(str(path))
    frozen = Run(RUN).load(FINAL)
    expected = {**frozen["trained"], **frozen["floats"], **frozen["constants"]}
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(tensors[name], value.numpy()), name
    assert data["sizes"]["file"] == path.stat().st_size
    assert data["sizes"]["file"] == ddq("report", "--json").data["totals"]["bytes"]
    assert data["verified"] == {
        "tensors": len(expected),
        "values": sum(v.numel() for v in expected.values()),
    }


@pytest.mark.parametrize(
    ("form", "warnings", "words"),
    [
        ("safetensors", (), ""),
        ("safetensors", ("a",), "1 warning;"),
        ("c", ("a", "b"), "2 warnings;"),
    ],
)
def test_the_number_of_warnings_is_repeated(
    finished: Path, form: str, warnings: tuple[str, ...], words: str
) -> None:
    run = Run(RUN)
    run.write_report(run.report().model_copy(update={"warnings": warnings}))
    lines = ddq("export", RUN, "--format", form).out.splitlines()
    told = [line for line in lines if line.startswith("warning ")]
    line = f"warning    the run ended with {words} `ddq report {RUN}` shows them"
    assert told == [line] * bool(warnings)
    assert ddq("export", RUN, "--format", form, "--json").data["warnings"] == list(warnings)


@pytest.mark.parametrize(
    ("levels", "granularity"),
    [
        ("learned", "layer"),
        ("learned", "channel"),
        ("uniform", "channel"),
        ("power_of_two", "layer"),
    ],
)
def test_every_kind_of_levels_can_be_exported_at_its_most_bits(
    project: Path, levels: str, granularity: str
) -> None:
    chosen = [
        "--set",
        f"weights.levels={levels}",
        "--set",
        f"weights.granularity={granularity}",
        "--target-size",
        "100%",
    ]
    report = ddq("finetune", "model.pt", *chosen, "--max-steps", "2", "--json", "-q").data
    most = {row["bits"] for row in report["layers"] if row["kind"] != "bias"}
    assert most == ({4} if levels == "power_of_two" else {8})
    assert ddq("export", "--json").data["sizes"]["file"] == report["totals"]["bytes"]


@pytest.mark.parametrize(("granularity", "bits"), [("layer", 3), ("channel", 3), ("layer", 8)])
def test_weights_that_are_zero_are_exported(project: Path, granularity: str, bits: int) -> None:
    state = torch.load("model.pt")
    for value in state.values():
        if value.ndim > 1:
            value[: len(value) // 2] = 0
    torch.save(state, "model.pt")
    chosen = ["--set", f"weights.granularity={granularity}", "--max-steps", "2", "-q"]
    assert ddq("finetune", "model.pt", "--target-bits", bits, *chosen).code == 0
    assert ddq("export").code == 0


@pytest.mark.parametrize("target", ["2.3kB", "2500", "50%"])
def test_a_target_in_bytes_is_the_size_of_the_file(project: Path, target: str) -> None:
    chosen = ["--target-size", target, "--epochs", "0", "--set", "weights.max_bits=8"]
    totals = ddq("finetune", "model.pt", *chosen, "--json", "-q").data["totals"]
    data = ddq("export", "--json").data
    nbytes = Path(data["path"]).stat().st_size
    assert nbytes == totals["bytes"] == data["sizes"]["file"]
    limit = totals["budget_bytes"]
    assert 0.9 * limit < nbytes <= limit
    assert ddq("report", "--max-size", f"{nbytes}").code == 0
    assert ddq("report", "--max-size", f"{nbytes - 1}").code == 3
    assert ddq("report", data["path"], "--json").data["totals"]["bytes"] == nbytes


def test_the_accuracy_of_the_file_is_the_reported_one(finished: Path) -> None:
    assert ddq("export").code == 0
    scope: dict = {}
    exec(Path("net.py").read_text(), scope)
    model = ddqcli.load(RUN / "model.safetensors", scope["build"]())
    held_out = images(32, "x", "y")
    x = torch.tensor((held_out["x"] / 255 - 0.5) / 0.5, dtype=torch.float32)[:, None]
    with torch.no_grad():
        hits = (model(x).argmax(1).numpy() == held_out["y"]).mean()
    assert 100 * hits == pytest.approx(ddq("report", "--json").data["accuracy"]["quantized"])


def test_the_same_run_gives_the_same_bytes_wherever_they_go(finished: Path) -> None:
    assert ddq("export").code == ddq("export", RUN, "-o", "a b.safetensors").code == 0
    assert Path("a b.safetensors").read_bytes() == (RUN / "model.safetensors").read_bytes()


def test_a_file_that_differs_from_what_was_trained_never_gets_its_name(finished: Path) -> None:
    run, name = Run(RUN), "0.weight"
    assert ddq("export").code == 0
    before = (RUN / "model.safetensors").read_bytes()
    frozen = run.load(FINAL)
    frozen["trained"][name].view(-1)[3] += 1e-6
    run.save(FINAL, frozen)
    answer = ddq("export", "--json")
    assert answer.code == 4
    fault = f"{RUN}/model.safetensors differs from what was trained in {name}"
    assert answer.err == f"Error: {fault}; it was not written.\n"
    assert (RUN / "model.safetensors").read_bytes() == before
    assert not [path for path in os.listdir(RUN) if path.endswith(".tmp")]


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        *((command, None) for command in ("export", "export --format c", f"inspect {RUN}")),
        ("export", {"quantized": 1}),
        ("export --format c", {"quantized": [{"name": "0.weight"}]}),
        ("export", {"floats": {"1.weight": "x"}}),
        ("export", {"probe": {}}),
        ("export", {"floats": {7: torch.zeros(1)}}),
        ("export", {"aliases": {"x": "gone"}}),
        ("export", {"constants": {"0.weight": torch.zeros(1)}}),
        (f"inspect {RUN}", {"weights": None}),
    ],
)
def test_a_final_model_of_other_content_is_damaged(
    finished: Path, command: str, changes: dict[str, object] | None
) -> None:
    checkpoint = torch.load("model.pt", weights_only=True)
    torch.save(Run(RUN).load(FINAL) | changes if changes else checkpoint, RUN / FINAL)
    answer = ddq(*command.split())
    assert answer.code == 1
    assert answer.err.startswith(f"Error: {RUN}/final.pt is ")


@pytest.mark.parametrize(
    "changed", [lambda a: a.reshape(2, -1), lambda a: a.astype(np.float64)], ids=["shape", "dtype"]
)
def test_shapes_and_dtypes_are_compared_too(
    finished: Path, changed: Callable[[np.ndarray], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = encode_run.encode_artifact

    def wrong(
        quantized: object, activations: object, floats: dict[str, np.ndarray], *rest: object
    ) -> object:
        return encode(
            quantized,
            activations,
            {**floats, "1.weight": changed(floats["1.weight"])},
            *rest,
        )

    monkeypatch.setattr(encode_run, "encode_artifact", wrong)
    answer = ddq("export")
    assert answer.code == 4
    assert "differs from what was trained in 1.weight" in answer.err


def test_a_file_that_cannot_be_decoded_never_gets_its_name(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddqcli.artifact.verify._FINGERPRINTS", "raise SystemExit('no numpy')")
    answer = ddq("export")
    assert answer.code == 4
    assert "model.safetensors cannot be decoded: no numpy; it was not written." in answer.err
    assert not (RUN / "model.safetensors").exists()
