from __future__ import annotations

import ast
import bz2
import hashlib
import json
import math
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_example import Contents, quantized

from ddqcli.artifact import decoder
from ddqcli.artifact.format import encode_artifact, read_artifact
from ddqcli.errors import UsageError, VerificationError

GOLDEN = Path(__file__).parent / "golden.ddq"
GOLDEN_SHA256 = "444d4e57d5e3fb252783ee577eef38d1f4da0432a97c1bff201cab0cc9753ca8"


def entries_of(raw: bytes) -> tuple[dict[str, bytes], Any]:
    """The entries' bytes and the manifest, by nothing but FORMAT.md."""
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    entries = {n: raw[8 + length + e["data_offsets"][0] : 8 + length + e["data_offsets"][1]] for n, e in header.items()}
    return entries, json.loads(bz2.decompress(entries.pop("manifest")))


def oracle(raw: bytes) -> dict[str, list[float]]:
    """Quantized tensors, flattened, one bit after another, in float64."""
    entries, manifest = entries_of(raw)
    scales = struct.unpack(f"<{len(entries['scales']) // 4}f", entries["scales"])
    group = level_at = byte_at = 0
    tensors = {}
    for name in sorted(manifest["quantized"]):
        shape, axis = manifest["quantized"][name], manifest["axes"].get(name)
        positions = list(np.ndindex(*shape))
        values, bit_at = {}, byte_at * 8
        for g in range(1 if axis is None else shape[axis]):
            bits = bin(entries["gates"][group]).count("1")
            levels = range(256) if bits == 8 else entries["levels"][level_at : level_at + 2**bits]
            level_at += 0 if bits == 8 else 2**bits
            for at in (p for p in positions if axis is None or p[axis] == g):
                index = sum((entries["indices"][(bit_at + i) // 8] >> (bit_at + i) % 8 & 1) << i for i in range(bits))
                values[at] = (levels[index] - entries["zero_points"][group]) * scales[group]
                bit_at += bits
            group += 1
        byte_at = -(-bit_at // 8)
        tensors[name] = [values[at] for at in positions]
    return tensors


def signed(raw: bytes) -> bytes:
    """`raw` with a digest that fits, as someone who means to mislead would make it."""
    blank = raw[:50] + b"0" * 64 + raw[114:]
    return raw[:50] + hashlib.sha256(blank).hexdigest().encode() + raw[114:]


def test_decodes_as_the_oracle_does(file: Path, contents: Contents) -> None:
    tensors, manifest = decoder.decode(file)
    expected = oracle(file.read_bytes())
    assert expected.keys() == {tensor.name for tensor in contents.quantized}
    for tensor in contents.quantized:
        found = tensors[tensor.name]
        assert found.dtype == np.float32
        assert found.shape == tensor.shape
        assert found.reshape(-1).tolist() == expected[tensor.name]
        assert found.tobytes() == tensor.dequantize().tobytes()
    for name, array in contents.floats.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape)
        assert tensors[name].tobytes() == array.tobytes()
    assert tensors["tied.weight"] is tensors["fc.weight"]
    assert tensors["tied.count"] == 1234567890123
    assert tensors.keys() == {*expected, *contents.floats, *contents.aliases}
    assert manifest["meta"] == contents.meta
    assert manifest["activations"]["fc"].tolist() == [-4.5, 0, 0, 95.5]
    assert manifest["activations"]["conv"].tolist() == [level * 4095 * 2.0**-20 for level in range(256)]


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_axis(tmp_path: Path, bits: int, axis: int | None) -> None:
    tensor = quantized("w", (6, 7, 3), axis, [bits] * (1 if axis is None else (6, 7)[axis]), bits)
    path = tmp_path / "model.ddq"
    path.write_bytes(encode_artifact([tensor], [], {}, {}, {})[0])
    tensors, _ = decoder.decode(path)
    assert tensors["w"].reshape(-1).tolist() == oracle(path.read_bytes())["w"]


def test_golden_file_keeps_its_meaning(contents: Contents) -> None:
    raw = GOLDEN.read_bytes()
    assert hashlib.sha256(raw).hexdigest() == GOLDEN_SHA256
    assert encode_artifact(*contents.arguments())[0] == raw  # the writer has not changed either
    tensors, manifest = decoder.decode(GOLDEN)
    assert {name: tensors[name].reshape(-1).tolist() for name in manifest["quantized"]} == oracle(raw)
    first = {name: (tensor.reshape(-1)[:4].astype(np.float64) * 2**18).tolist() for name, tensor in tensors.items()}
    assert first["conv.weight"] == [-311448, -362673, -129087, 40980]
    assert first["depthwise.weight"] == [-256125, -432339, -32784, -47127]
    assert first["up.weight"] == [-22539, -24588, -371231, 75887]
    assert first["fc.weight"] == first["tied.weight"] == [-45078, -45078, 57372, 57372]
    assert first["fc.bias"] == [22539, 20490, 127038]
    assert tensors["double"].tolist() == [0.1]
    assert tensors["brain"].view(np.uint16).tolist() == [[0x3F80], [0xC000], [0x7FC1]]
    assert manifest["meta"] == {"accuracy": 0.9165, "ddq": "0.1.0", "note": "grüße"}


def test_alone_without_torch_or_ddqcli(tmp_path: Path, file: Path) -> None:
    shutil.copy(decoder.__file__, tmp_path / "stranger.py")
    script = (
        "import sys, stranger; tensors, manifest = stranger.decode(sys.argv[1]);"
        "assert not {'torch', 'ddqcli', 'safetensors'} & {m.partition('.')[0] for m in sys.modules};"
        "sys.stdout.write(repr(float(abs(tensors['conv.weight']).sum())))"
    )
    run = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {script}", str(file)]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert float(printed) == float(abs(decoder.decode(file)[0]["conv.weight"]).sum())
    tree = ast.parse(Path(decoder.__file__).read_text(encoding="utf-8"))
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"numpy"}


def test_no_truncation_goes_unnoticed(file: Path) -> None:
    raw = file.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    offsets = [e["data_offsets"] for e in json.loads(raw[8:header]).values() if "data_offsets" in e]
    borders = {header + offset for pair in offsets for offset in pair}
    cuts = {*range(200), header - 1, header, header + 1, *borders, *(b - 1 for b in borders), *(b + 1 for b in borders)}
    for cut in sorted(cut for cut in cuts if cut < len(raw)):
        file.write_bytes(raw[:cut])
        with pytest.raises(decoder.ArtifactError):
            decoder.decode(file)
        with pytest.raises((UsageError, VerificationError)):
            read_artifact(file)
    file.write_bytes(raw + b"\0")
    with pytest.raises(decoder.ArtifactError):
        decoder.decode(file)


def test_no_flipped_bit_goes_unnoticed(file: Path) -> None:
    raw = file.read_bytes()
    draw = random.Random(0)
    for bit in draw.sample(range(len(raw) * 8), 1000):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(decoder.ArtifactError):
            decoder.decode(file)
        with pytest.raises((UsageError, VerificationError)):
            read_artifact(file)


def test_a_file_made_to_mislead_never_raises_anything_else(file: Path) -> None:
    raw = file.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    draw, faults = random.Random(1), []
    for _ in range(1000):
        damaged = bytearray(raw)
        damaged[draw.choice([*range(8), *range(114, header)])] = draw.randrange(256)
        file.write_bytes(signed(damaged))
        try:
            decoder.decode(file)
        except decoder.ArtifactError as error:
            faults.append(str(error))
    assert len(faults) > 900
    assert not any("SHA-256" in fault for fault in faults)


def remade(raw: bytes, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> bytes:
    """The file with its manifest and entries changed, and everything about it in order again."""
    entries, manifest = entries_of(raw)
    change(manifest, entries)
    entries["manifest"] = bz2.compress(json.dumps(manifest).encode())
    (length,) = struct.unpack_from("<Q", raw)
    header, data = json.loads(raw[8 : 8 + length]), b""
    for name, entry in entries.items():
        dtype = header[name]["dtype"]
        size = 4 if dtype == "F32" else 8 if dtype in ("I64", "F64") else 2 if "F16" in dtype else 1
        header[name] = {
            "dtype": dtype,
            "shape": [len(entry) // size],
            "data_offsets": [len(data), len(data) + len(entry)],
        }
        data += entry
    text = json.dumps(header, separators=(",", ":")).encode()
    return signed(struct.pack("<Q", len(text)) + text + data)


def with_gates(gates: int) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    return lambda _, entries: entries.update(gates=bytes([gates]) + entries["gates"][1:])


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest, _: manifest["quantized"].update({"conv.weight": [4, 3, 3, 4]}),
        lambda manifest, _: manifest["quantized"].update({"conv.weight": [-4, -3, 3, 3]}),
        lambda manifest, _: manifest["quantized"].update({"conv.weight": [10**18, 10**18]}),
        lambda manifest, _: manifest["quantized"].update({"conv.weight": "4333"}),
        lambda manifest, _: manifest["quantized"].update({"conv.weight": [4, 3, 9.0]}),
        lambda manifest, _: manifest["quantized"].update({"more": [1]}),
        lambda manifest, _: manifest["quantized"].pop("conv.weight"),
        lambda manifest, _: manifest["axes"].update({"conv.weight": 0}),
        lambda manifest, _: manifest["axes"].update({"depthwise.weight": -4}),
        lambda manifest, _: manifest["axes"].update({"depthwise.weight": "0"}),
        lambda manifest, _: manifest["activations"].pop(),
        lambda manifest, _: manifest["aliases"].update({"x": "y"}),
        lambda manifest, _: manifest["kept"]["float32"].update({"bn.weight": [5]}),
        lambda manifest, _: manifest["kept"].pop("int64"),
        lambda manifest, _: (manifest["aliases"].clear(), manifest["kept"].update(int64={"bn.weight": []})),
        lambda manifest, _: manifest["kept"].update({"int8": {"x": [1]}}),
        lambda manifest, _: manifest.pop("aliases"),
        with_gates(0),
        with_gates(0b0111),
        with_gates(0b1101),
        lambda _, entries: entries.update(indices=entries["indices"] + b"\0"),
        lambda _, entries: entries.pop("levels"),
    ],
)
def test_a_manifest_that_contradicts_the_entries_is_refused(file: Path, change: Any) -> None:
    raw = file.read_bytes()
    file.write_bytes(remade(raw, lambda *_: None))
    assert decoder.decode(file)[0].keys() == decoder.decode(GOLDEN)[0].keys()
    file.write_bytes(remade(raw, change))
    with pytest.raises(decoder.ArtifactError, match="contradicts itself"):
        decoder.decode(file)
    with pytest.raises(VerificationError):
        read_artifact(file)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("scales", struct.pack("<f", 0.1)), ("levels", b"\xff"), ("scales", struct.pack("<f", math.nan))],
)
def test_tables_outside_the_format_are_refused(file: Path, entry: str, value: bytes) -> None:
    change = lambda _, entries: entries.update({entry: value + entries[entry][len(value) :]})  # noqa: E731
    file.write_bytes(remade(file.read_bytes(), change))
    with pytest.raises(VerificationError, match="contradicts itself"):
        read_artifact(file)


@pytest.mark.parametrize(
    "change",
    [
        (b'"shape":[3]', b'"shape":[2]'),
        (b"[0,8]", b"[0,9]"),
        (b'"gates":{"data_offsets":[', b'"gates":{"data_offsets":[1'),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(file: Path, change: tuple[bytes, bytes]) -> None:
    raw = file.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = raw[8 : 8 + length].replace(*change)
    assert header != raw[8 : 8 + length]
    file.write_bytes(signed(struct.pack("<Q", len(header)) + header + raw[8 + length :]))
    with pytest.raises(decoder.ArtifactError, match="contradicts itself"):
        decoder.decode(file)
    file.write_bytes(signed(raw + b"\0"))
    with pytest.raises(decoder.ArtifactError, match="do not fill the file"):
        decoder.decode(file)


def test_another_version_is_named(file: Path) -> None:
    file.write_bytes(signed(file.read_bytes().replace(b'"version":"1"', b'"version":"2"')))
    with pytest.raises(UsageError, match="version 2; this reader knows version 1"):
        read_artifact(file)
