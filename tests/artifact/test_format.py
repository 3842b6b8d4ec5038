from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from artifact_example import Contents

from ddqcli.artifact import format as ddq
from ddqcli.artifact.format import (
    ActivationTable,
    QuantizedTensor,
    encode_artifact,
    read_artifact,
    write_artifact,
)
from ddqcli.errors import DDQError, UsageError, VerificationError
from ddqcli.inspection.report import embedded_report

ENTRIES = ("quantized", "manifest")
KEPT = ("f32", "f64", "f16", "bf16", "i64", "u8", "bool")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_reads_what_was_written(tmp_path: Path, contents: Contents) -> None:
    sizes = write_artifact(tmp_path / "model.ddq", *contents.arguments())
    found = read_artifact(tmp_path / "model.ddq")
    assert (found.aliases, found.meta, found.sizes) == (contents.aliases, contents.meta, sizes)
    assert found.floats.keys() == contents.floats.keys()
    assert all(same_bits(found.floats[name], array) for name, array in contents.floats.items())
    assert len(found.quantized) == len(contents.quantized)
    for wrote in contents.quantized:
        read = found.quantized[wrote.name]
        assert (read.name, read.shape, read.axis, read.bits) == (
            wrote.name,
            wrote.shape,
            wrote.axis,
            wrote.bits,
        )
        assert same_bits(read.indices, wrote.indices)
        assert same_bits(read.scale, wrote.scale)
        assert same_bits(read.zero_point, wrote.zero_point)
        assert all(same_bits(a, b) for a, b in zip(read.levels, wrote.levels, strict=True))
    for table in contents.activations:
        read_table = found.activations[table.name]
        assert (read_table.scale, read_table.zero_point) == (table.scale, table.zero_point)
        assert same_bits(read_table.levels, table.levels)


def test_values_equal_float64_element_by_element(contents: Contents) -> None:
    for tensor in contents.quantized:
        values, integers = tensor.dequantize(), tensor.integers()
        assert values.shape == integers.shape == tensor.shape
        for at in np.ndindex(tensor.shape):
            group = 0 if tensor.axis is None else at[tensor.axis]
            level = int(tensor.levels[group][tensor.indices.reshape(tensor.shape)[at]])
            assert integers[at] == level
            assert float(values[at]) == (level - int(tensor.zero_point[group])) * float(
                tensor.scale[group]
            )


def test_int8_with_zero_point_less_128_is_the_same_tensor(contents: Contents) -> None:
    tensor = contents.quantized[0]
    int8 = (tensor.integers().astype(np.int16) - 128).astype(np.int8)
    zero_point = np.int16(tensor.zero_point[0]) - 128
    assert same_bits((int8 - zero_point).astype(np.float32) * tensor.scale[0], tensor.dequantize())


def test_activation_values() -> None:
    table = ActivationTable("fc", np.array([0, 9, 9, 200], np.uint8), 0.5, 9)
    assert table.bits == 2
    assert table.values().tolist() == [-4.5, 0, 0, 95.5]


def test_sizes_are_the_real_bytes(tmp_path: Path, contents: Contents) -> None:
    sizes = write_artifact(tmp_path / "model.ddq", *contents.arguments())
    with safetensors.safe_open(tmp_path / "model.ddq", "pt") as file:
        real = {name: file.get_tensor(name).nbytes for name in (*ENTRIES, *KEPT)}
    bits = [s for tensor in contents.quantized for s in tensor.bits] + [
        table.bits for table in contents.activations
    ]
    assert sizes.gates == len(bits)
    assert sizes.scales == 5 * len(bits)
    assert sizes.levels == sum(2**s for s in bits if s < 8)
    assert sizes.indices + sizes.levels + sizes.scales + sizes.gates == real.pop("quantized")
    assert sizes.manifest == real.pop("manifest")
    assert sizes.floats == sum(real.values())
    assert sizes.file == (tmp_path / "model.ddq").stat().st_size
    assert (
        sum(sizes.tensors.values()) == sizes.payload == sizes.file - sizes.manifest - sizes.header
    )
    by_hand = {
        "conv.weight": 54 + 16 + 6,
        "fc.bias": 3 + 6,
        "conv (input)": 6,
        "fc (input)": 4 + 6,
        "bn.num_batches_tracked": 8,
    }
    by_hand["depthwise.weight"] = (9 * (3 + 1 + 8 + 5 + 2) + 7) // 8 + (8 + 2 + 32 + 4) + 5 * 6
    assert by_hand.items() <= sizes.tensors.items()


@pytest.mark.parametrize(
    ("numel", "bits", "expected"),
    [
        ([432], [4], 216 + 16 + 6),
        ([9, 9, 9], [3, 1, 8], 14 + 8 + 2 + 18),
        ([0], [8], 6),
        ([], [], 0),
        ([3], [1], 9),
    ],
)
def test_tensor_bytes(numel: list[int], bits: list[int], expected: int) -> None:
    assert ddq.tensor_bytes(numel, bits) == expected


def test_is_a_safetensors_file(tmp_path: Path, contents: Contents) -> None:
    floats = {
        name: array for name, array in contents.floats.items() if name != "brain"
    }  # numpy reads no bfloat16
    path = tmp_path / "model.ddq"
    write_artifact(
        path, contents.quantized, contents.activations, floats, contents.aliases, contents.meta
    )
    entries = safetensors.numpy.load_file(path)
    assert entries.keys() == {*ENTRIES, *KEPT} - {"bf16"}
    assert entries["i64"].tolist() == [1234567890123]
    assert entries["quantized"][0] == 255  # the gates of the first name, "conv (input)"
    assert safetensors.numpy.load(safetensors.numpy.save(entries)).keys() == entries.keys()


def test_bfloat16_is_torchs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([[1.5, -3e38], [0.1, float("nan")]], dtype=torch.bfloat16)
    floats = {"brain": tensor.view(torch.uint16).numpy().view(ddq.BFLOAT16)}
    write_artifact(tmp_path / "model.ddq", [], [], floats, {}, {})
    with safetensors.safe_open(tmp_path / "model.ddq", "pt") as file:
        read = file.get_tensor("bf16")
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.view(torch.uint16), tensor.reshape(-1).view(torch.uint16))
    back = torch.from_numpy(
        read_artifact(tmp_path / "model.ddq").floats["brain"].view(np.uint16)
    ).view(torch.bfloat16)
    assert torch.equal(back.view(torch.uint16), tensor.view(torch.uint16))


def test_an_empty_model_is_a_file_too(tmp_path: Path) -> None:
    write_artifact(tmp_path / "model.ddq", [], [], {}, {}, {})
    assert read_artifact(tmp_path / "model.ddq").sizes.payload == 0
    assert safetensors.numpy.load_file(tmp_path / "model.ddq")["quantized"].size == 0


SCRIPT = """
import sys; sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from artifact_example import example
from ddqcli.artifact.format import write_artifact
step = int(sys.argv[3])
turned = (a[::step] if isinstance(a, list) else dict(list(a.items())[::step]) for a in example().arguments())
write_artifact(Path(sys.argv[4]), *turned)
"""


def test_same_bytes_in_any_process_and_order(tmp_path: Path, contents: Contents) -> None:
    expected, _ = encode_artifact(*contents.arguments())
    root, here = Path(ddq.__file__).parents[2], Path(__file__).parent
    for seed, step in (("0", 1), ("1", -1), ("4294967295", -1)):
        path = tmp_path / f"{seed}.ddq"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-c", SCRIPT, here, root, str(step), path], env=environment, check=True
        )
        assert path.read_bytes() == expected


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "model.ddq"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(DDQError, match=r"Cannot write .*model.ddq: No space left") as raised:
            write_artifact(path, *contents.arguments())
    assert raised.value.exit_code == 1
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]
    write_artifact(path, *contents.arguments())
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("place", ["missing/model.ddq", "file/model.ddq", "folder"])
def test_a_path_that_cannot_be_written_is_wrong_use(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="Cannot write"):
        write_artifact(tmp_path / place, [], [], {}, {}, {})


def test_exit_codes_of_faulty_files(file: Path) -> None:
    raw = file.read_bytes()
    with pytest.raises(UsageError, match="Cannot open"):
        read_artifact(file.with_name("missing"))
    file.write_bytes(b"PK" + bytes(500))
    with pytest.raises(UsageError, match="is not a ddq file"):
        read_artifact(file)
    file.write_bytes(raw[:-1])
    for read in (read_artifact, ddq.decode_model):
        with pytest.raises(VerificationError, match="damaged or incomplete"):
            read(file)


def resnet20(bits: int) -> tuple[list[QuantizedTensor], dict[str, np.ndarray]]:
    """Shapes and names of a CIFAR ResNet-20; random values of the right kind."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (16, 3, 3, 3)}
    norms, before = {"bn1": 16}, 16
    for stage, width in enumerate((16, 32, 64), 1):
        for block in (f"layer{stage}.{i}" for i in range(3)):
            for k in (1, 2):
                shapes[f"{block}.conv{k}.weight"], norms[f"{block}.bn{k}"] = (
                    (width, before, 3, 3),
                    width,
                )
                before = width
    random = np.random.default_rng(0)

    def tensor(name: str, shape: tuple[int, ...], bits: int) -> QuantizedTensor:
        levels = np.sort(random.choice(256, 2**bits, replace=False)).astype(np.uint8)
        indices = random.integers(0, 2**bits, int(np.prod(shape)), dtype=np.uint8)
        scale = np.array([random.integers(2048, 4096) * 2.0**-18], np.float32)
        return QuantizedTensor(
            name, shape, None, indices, (levels,), scale, np.array([128], np.uint8)
        )

    shapes["fc.weight"] = (10, 64)
    floats = {f"{norm}.num_batches_tracked": np.array(random.integers(1 << 20)) for norm in norms}
    for norm, width in norms.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            floats[f"{norm}.{part}"] = random.random(width, np.float32)
    weights = [tensor(name, shape, bits) for name, shape in shapes.items()]
    return [*weights, tensor("fc.bias", (10,), 8)], floats


def test_resnet20_is_at_most_one_percent_above_arithmetic() -> None:
    """With quantized inputs, and all that `ddq export` puts into the file of a run at 4/8."""
    quantized, floats = resnet20(4)
    weights = sum(tensor.indices.size for tensor in quantized)
    assert (len(quantized), len(floats), weights) == (21, 95, 268_346)
    random, layers = (
        np.random.default_rng(1),
        [t.name.removesuffix(".weight") for t in quantized if "weight" in t.name],
    )
    inputs = [
        ActivationTable(
            f"{name} (input)",
            np.arange(256, dtype=np.uint8),
            random.integers(2048, 4096) * 2.0**-18,
            0,
        )
        for name in layers
    ]
    report = {
        "layers": [
            {"name": t.name, "kind": "Conv2d" if "conv" in t.name else "Linear", "error": random.random() / 100}
            for t in quantized
        ],
        "activations": [{"name": name, "levels": "uniform"} for name in layers],
        "totals": {"budget_bytes": 145_453, "float_bytes": 1_084_544},
        "accuracy": {"float": 91.8342, "quantized": 91.2719, "drop": 0.5623},
        "source": {
            "path": "/models/resnet20_cifar10.pt", "sha256": random.bytes(32).hex(), "ddq": "0.1.0",
            "arch": "/models/cifar_nets.py:resnet20",
        },
        "run": {"steps": 782, "seed": 0},
        "warnings": [],
    }  # fmt: skip
    recipe = {
        "name": "resnet20_w4a8", "model": {"checkpoint": "resnet20_cifar10.pt", "arch": "cifar_nets.py:resnet20"},
        "data": {"source": "cifar10"}, "activations": {"bits": 8}, "budget": {"target_bits": 4.0}, "train": {"epochs": 2},
    }  # fmt: skip
    raw, sizes = encode_artifact(
        quantized, inputs, floats, {}, {"recipe": recipe, "report": embedded_report(report)}
    )
    exact = (
        268_336 * 4 // 8
        + 20 * (16 + 6)
        + (10 + 6)
        + 20 * 6
        + sum(array.nbytes for array in floats.values())
    )
    assert sizes.payload == exact
    beside = (
        len(raw) - exact + 20 * 6
    )  # whatever is neither weights, which are held to the target, nor kept
    assert beside <= 0.01 * (4 * weights / 8 + sizes.floats)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"axis": 4}, "no axis 4"),
        ({"axis": 0}, "4 groups, and 1 level vectors"),
        ({"shape": (4, 3, 3, 4)}, "has indices"),
        ({"indices": np.full(108, 16, np.uint8)}, "index 16 where there are 16 levels"),
        ({"indices": np.zeros(108, np.int64)}, "has indices int64"),
        ({"levels": (np.arange(16, dtype=np.uint8)[::-1],)}, "do not ascend"),
        ({"levels": (np.arange(15, dtype=np.uint8),)}, "level vector of shape"),
        ({"levels": (np.zeros(256, np.uint8),)}, "256 that are not 0 to 255"),
        ({"levels": (np.arange(16.0),)}, "uint8 levels"),
        ({"scale": np.array([0.1], np.float32)}, "12 significant bits"),
        ({"scale": np.array([4097 * 2.0**-20], np.float32)}, "12 significant bits"),
        ({"scale": np.array([0], np.float32)}, "12 significant bits"),
        ({"scale": np.array([-0.5], np.float32)}, "12 significant bits"),
        ({"scale": np.array([np.nan], np.float32)}, "12 significant bits"),
        ({"scale": np.array([2.0**-130], np.float32)}, "12 significant bits"),
        ({"scale": np.array([2.0**120], np.float32)}, "12 significant bits"),
        ({"scale": np.array([0.5])}, "float32 scales"),
        ({"zero_point": np.array([1], np.int32)}, "uint8 levels and zero points"),
    ],
)
def test_a_tensor_that_does_not_fit_together_is_refused(
    contents: Contents, change: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        replace(contents.quantized[0], **change)


def test_every_scale_of_12_bits_is_exact_at_every_level() -> None:
    difference = np.arange(-255, 256, dtype=np.float32)
    for mantissa in range(2048, 4096):
        scale = np.float32(mantissa * 2.0**-20)
        assert np.array_equal(
            (difference * scale).astype(np.float64), difference.astype(np.float64) * float(scale)
        )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"aliases": {"fc.weight": "conv.weight"}}, "fc.weight: more than one"),
        ({"aliases": {"x": "y"}}, "y: an alias points here"),
        ({"aliases": {"x": "tied", "tied": "fc.weight"}}, "tied: an alias points here"),
        (
            {"floats": {"conv.weight": np.zeros(1, np.float32)}, "aliases": {}},
            "conv.weight: more than one",
        ),
        ({"floats": {"c": np.zeros(1, np.complex64)}, "aliases": {}}, "c has dtype complex64"),
        ({"meta": {"accuracy": float("nan")}}, "JSON"),
    ],
)
def test_contents_that_cannot_be_a_file_are_refused(
    contents: Contents, change: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        encode_artifact(*replace(contents, **change).arguments())
