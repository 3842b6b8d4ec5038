"""`ddq export --format tflite` and `pte`: verified files; bad combinations are refused at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_project import ddq
from torch import Tensor

from ddqcli.commands import export_int8
from ddqcli.errors import UsageError
from ddqcli.pt2e.integers import Symmetric

FORMATS = pytest.mark.parametrize("file_format", ["tflite", "pte"])


def require(file_format: str) -> None:
    try:
        export_int8.RUNTIMES[file_format].require()
    except UsageError as error:
        pytest.skip(str(error))


@FORMATS
def test_a_verified_file_is_written_the_same_each_time(file_format: str, finished: Path) -> None:
    require(file_format)
    path = Path(f"runs/done/model.{file_format}")
    answer = ddq("export", "--format", file_format, "-q")
    assert (answer.code, answer.err) == (0, "")
    assert "stored     one byte a weight" in answer.out
    assert "takes      one sample a call" in answer.out
    assert "steps      outputs differ from torch's int8 graph by at most " in answer.out
    raw = path.read_bytes()
    data = ddq("export", "--format", file_format, "--json").data
    assert path.read_bytes() == raw
    values = 72 + 8 * 16 * 9 + 64
    assert data["sizes"] == {"file": len(raw), "weights": values}
    assert data["verified"] == {"tensors": 3, "values": values}
    assert data["steps"] <= 1.001
    assert abs(data["compared"]["accuracy"] - data["compared"]["torch_accuracy"]) < 10
    assert data["float_weights"] == []


@FORMATS
def test_a_file_with_other_integers_is_exit_code_4_and_not_written(
    file_format: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(file_format)
    of = Symmetric.of
    calls: list[Symmetric] = []

    def changed(kernel: object, input_scale: float) -> Symmetric:
        value = of(kernel, input_scale)  # type: ignore[arg-type]
        calls.append(value)
        return value

    monkeypatch.setattr(Symmetric, "of", changed)
    runtime = export_int8.RUNTIMES[file_format]

    def convert(model: object) -> bytes:
        raw = runtime.convert(model)  # type: ignore[arg-type]
        calls[1].integers[0, 0] ^= 1  # what was trained is now another
        return raw

    monkeypatch.setitem(export_int8.RUNTIMES, file_format, replace(runtime, convert=convert))
    answer = ddq("export", "--format", file_format)
    assert answer.code == 4
    assert "lacks the trained integers of 3.weight." in answer.err
    assert not Path(f"runs/done/model.{file_format}").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "tflite", "--half"), "--half applies to safetensors and coreml; tflite "),
        (("--format", "pte", "--bench"), "--bench and --openvino run an ONNX file"),
        (("--check", "m.pte"), "is verified when it is written; export it again"),
        (("--format", "tflite", "-o", "m.pte"), "is named like a file of --format pte"),
    ],
)
def test_bad_combinations_are_refused_at_once(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = ddq("export", *options)
    assert answer.code == 2
    assert message in answer.err


@pytest.mark.parametrize(
    ("file_format", "message"),
    [
        ("tflite", "LiteRT needs litert-torch, ai-edge-litert; run pip install 'ddqcli[litert]'."),
        ("pte", "ExecuTorch needs the package executorch; run pip install 'ddqcli[executorch]'."),
    ],
)
def test_without_the_package_the_extra_is_named(
    file_format: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    answer = ddq("export", "--format", file_format)
    assert answer.code == 2
    assert message in answer.err


@FORMATS
@pytest.mark.parametrize("data_are_there", [True, False])
def test_grids_cover_held_out_training_samples_or_what_the_run_holds(
    file_format: str, data_are_there: bool, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    covered: list[bytes] = []

    def make_int8(model: object, weights: object, samples: list[tuple[Tensor]], name: str) -> None:
        covered.extend(x.numpy().tobytes() for (x,) in samples)
        raise UsageError("enough")

    runtime = replace(export_int8.RUNTIMES[file_format], require=lambda: None)
    monkeypatch.setitem(export_int8.RUNTIMES, file_format, runtime)
    monkeypatch.setattr(export_int8, "make_int8", make_int8)
    with np.load("images.npz") as arrays:
        train, evaluation = (
            {((x / np.float32(255) - 0.5) / 0.5).astype(np.float32).tobytes() for x in arrays[name]}
            for name in ("x_train", "x_test")
        )
    if not data_are_there:
        Path("images.npz").unlink()
    assert ddq("export", "--format", file_format).code == 2
    assert len(covered) == (10 if data_are_there else 8)  # held out of 80; outputs in the run
    assert set(covered) <= (train if data_are_there else evaluation)
