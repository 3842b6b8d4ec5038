"""The decoder, against an oracle written from FORMAT.md alone, and on damaged and forged files."""

from __future__ import annotations

import ast
import bz2
import contextlib
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
from forgeries import with_manifest

from ddqcli.artifact import decoder
from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.read import read_artifact
from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.errors import UsageError, VerificationError

GOLDEN = Path(__file__).parent / "golden.ddq"
GOLDEN_SHA256 = "945caa9edd072d6e75abe80e9a7021102abbedf364f9ed4d994d31fc72a9c269"


def entries_of(raw: bytes) -> tuple[dict[str, bytes], Any]:
    """Return the entries' bytes and the manifest, by nothing but FORMAT.md."""
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    entries = {
        n: raw[8 + length + e["data_offsets"][0] : 8 + length + e["data_offsets"][1]]
        for n, e in header.items()
    }
    return entries, json.loads(bz2.decompress(entries.pop("manifest")))


def leaves_of(tree: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the manifest's lists by name, names ascending."""
    found: dict[str, list[Any]] = {}
    for part, below in tree.items():
        rest = (
            {"": below}
            if isinstance(below, list)
            else {f".{name}": leaf for name, leaf in leaves_of(below).items()}
        )
        found |= {part + end: leaf for end, leaf in rest.items()}
    return dict(sorted(found.items()))


def oracle(raw: bytes) -> dict[str, list[float]]:
    """Return values of quantized tensors and of activations' levels: bit by bit, in float64."""
    entries, manifest = entries_of(raw)
    stream, tensors = iter(entries["quantized"]), {}
    for name, (what, *shape) in leaves_of(manifest["tensors"]).items():
        if isinstance(what, str) and what != "levels":
            continue
        groups = 1 if what in (None, "levels") else shape[what]
        bits = [bin(next(stream)).count("1") for _ in range(groups)]
        zero_points = [next(stream) for _ in range(groups)]
        scales = struct.unpack(f"<{groups}f", bytes(next(stream) for _ in range(4 * groups)))
        levels = [range(256) if s == 8 else [next(stream) for _ in range(2**s)] for s in bits]
        if what == "levels":
            tensors[name] = [(level - zero_points[0]) * scales[0] for level in levels[0]]
            continue
        positions = list(np.ndindex(*shape))
        values, byte, used = {}, 0, 8
        for g in range(groups):
            for at in (p for p in positions if what is None or p[what] == g):
                index = 0
                for i in range(bits[g]):
                    if used == 8:
                        byte, used = next(stream), 0
                    index += (byte >> used & 1) << i
                    used += 1
                values[at] = (levels[g][index] - zero_points[g]) * scales[g]
        tensors[name] = [values[at] for at in positions]
    assert next(stream, None) is None
    return tensors


def signed(raw: bytes) -> bytes:
    """Return `raw` with a digest that fits, as a forger would."""
    blank = raw[:50] + b"0" * 64 + raw[114:]
    return raw[:50] + hashlib.sha256(blank).hexdigest().encode() + raw[114:]


def test_decoder_agrees_with_the_oracle(file: Path, contents: Contents) -> None:
    tensors, info = decoder.decode(file)
    expected = oracle(file.read_bytes())
    assert expected.keys() == {table.name for table in (*contents.quantized, *contents.activations)}
    for tensor in contents.quantized:
        found = tensors[tensor.name]
        assert found.dtype == np.float32
        assert found.shape == tensor.shape
        assert found.reshape(-1).tolist() == expected[tensor.name]
        assert found.tobytes() == tensor.dequantize().tobytes()
    for table in contents.activations:
        assert info["activations"][table.name].tolist() == expected[table.name]
        assert info["activations"][table.name].tobytes() == table.values().tobytes()
    for name, array in contents.floats.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape)
        assert tensors[name].tobytes() == array.tobytes()
    assert tensors["tied.weight"] is tensors["fc.weight"]
    assert tensors["tied.count"] == 1234567890123
    assert tensors.keys() == {
        *(t.name for t in contents.quantized),
        *contents.floats,
        *contents.aliases,
    }
    assert info["meta"] == contents.meta
    assert info["activations"]["fc (input)"].tolist() == [-4.5, 0, 0, 95.5]


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_in_every_length(tmp_path: Path, bits: int) -> None:
    """Lengths around rows and chunks of the decoder, in groups of even and odd size."""
    random, path = np.random.default_rng(bits), tmp_path / "model.ddq"
    row, chunk = decoder.ROW, decoder.CHUNK
    shapes = [
        (n,)
        for n in (
            0,
            1,
            7,
            8,
            9,
            row - 1,
            row,
            row + 1,
            8 * row + 3,
            chunk - 1,
            chunk,
            2 * chunk + 13,
        )
    ]
    shapes += [(3, row + 1), (17, 2 * row), (2, chunk), (200, 1024), (9, 35), (1, 9), (70, 0)]
    for shape in shapes:
        groups = 1 if len(shape) == 1 else shape[0]
        levels = tuple(
            np.sort(random.choice(256, 2**bits, replace=False)).astype(np.uint8)
            for _ in range(groups)
        )
        scale, zero_point = (
            np.full(groups, 0.5, np.float32),
            random.integers(0, 256, groups).astype(np.uint8),
        )
        indices = random.integers(0, 2**bits, math.prod(shape), dtype=np.uint8)
        axis = None if len(shape) == 1 else 0
        tensor = QuantizedTensor("w", shape, axis, indices, levels, scale, zero_point)
        path.write_bytes(encode_artifact([tensor], [], {}, {}, {})[0])
        assert decoder.decode(path)[0]["w"].tobytes() == tensor.dequantize().tobytes(), shape


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
    tensors, info = decoder.decode(GOLDEN)
    assert {
        name: array.reshape(-1).tolist() for name, array in (tensors | info["activations"]).items()
    }.items() >= (oracle(raw).items())
    first = {
        name: (tensor.reshape(-1)[:4].astype(np.float64) * 2**18).tolist()
        for name, tensor in tensors.items()
    }
    assert first["conv.weight"] == [-311448, -362673, -129087, 40980]
    assert first["depthwise.weight"] == [-256125, -432339, -32784, -47127]
    assert first["up.weight"] == [-22539, -24588, -371231, 75887]
    assert first["fc.weight"] == first["tied.weight"] == [-45078, -45078, 57372, 57372]
    assert first["fc.bias"] == [22539, 20490, 127038]
    assert tensors["double"].tolist() == [0.1]
    assert tensors["brain"].view(np.uint16).tolist() == [[0x3F80], [0xC000], [0x7FC1]]
    assert info["meta"] == {"accuracy": 0.9165, "ddq": "0.1.0", "note": "grüße"}


def test_alone_without_torch_or_ddqcli(tmp_path: Path, file: Path) -> None:
    shutil.copy(decoder.__file__, tmp_path / "stranger.py")
    script = (
        "import sys, stranger; tensors, info = stranger.decode(sys.argv[1]);"
        "modules = {m.partition('.')[0] for m in sys.modules};"
        "assert not {'torch', 'ddqcli', 'safetensors'} & modules;"
        "sys.stdout.write(repr(float(abs(tensors['conv.weight']).sum())))"
    )
    run = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {script}",
        str(file),
    ]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert float(printed) == float(abs(decoder.decode(file)[0]["conv.weight"]).sum())
    tree = ast.parse(Path(decoder.__file__).read_text(encoding="utf-8"))
    imported = {
        a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names
    }
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"numpy"}


def test_no_truncation_goes_unnoticed(file: Path) -> None:
    raw = file.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    offsets = [e["data_offsets"] for e in json.loads(raw[8:header]).values() if "data_offsets" in e]
    borders = {header + offset for pair in offsets for offset in pair}
    cuts = {
        *range(200),
        header - 1,
        header,
        header + 1,
        *borders,
        *(b - 1 for b in borders),
        *(b + 1 for b in borders),
    }
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


# ---- forged files, with a digest that fits


def test_a_forged_header_never_gives_another_model(file: Path, contents: Contents) -> None:
    raw = file.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    draw, faults = random.Random(1), 0
    for _ in range(1000):
        damaged = bytearray(raw)
        damaged[draw.choice([*range(8), *range(114, header)])] = draw.randrange(256)
        file.write_bytes(signed(damaged))
        try:
            found = read_artifact(file)
        except (UsageError, VerificationError) as error:
            assert "SHA-256" not in str(error)  # noqa: PT017
            faults += 1
            continue
        assert {name: t.indices.tobytes() for name, t in found.quantized.items()} == {
            t.name: t.indices.tobytes() for t in contents.quantized
        }
    assert faults > 900


def remade(raw: bytes, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> bytes:
    """Return the file with changed manifest and entries; header and digest fit again."""
    entries, manifest = entries_of(raw)
    change(manifest["tensors"], entries)
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


def with_bytes(place: int, new: bytes) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    """Change bytes of `quantized`, which begins with the gates of the first record."""
    return lambda _, entries: entries.update(
        quantized=entries["quantized"][:place] + new + entries["quantized"][place + len(new) :]
    )


CONTRADICTIONS = {
    "longer": lambda tensors, _: tensors["conv"].update(weight=[None, 4, 3, 3, 4]),
    "negative": lambda tensors, _: tensors["conv"].update(weight=[None, -4, -3, 3, 3]),
    "huge": lambda tensors, _: tensors["conv"].update(weight=[None, 10**18, 10**18]),
    "text": lambda tensors, _: tensors["conv"].update(weight=[None, "4333"]),
    "float": lambda tensors, _: tensors["conv"].update(weight=[None, 4, 3, 9.0]),
    "nothing": lambda tensors, _: tensors["conv"].update(weight=[]),
    "no list": lambda tensors, _: tensors["conv"].update(weight=7),
    "one more": lambda tensors, _: tensors.update(more=[None, 1]),
    "one less": lambda tensors, _: tensors["conv"].pop("weight"),
    "an axis": lambda tensors, _: tensors["conv"].update(weight=[0, 4, 3, 3, 3]),
    "no such axis": lambda tensors, _: tensors["depthwise"].update(weight=[4, 5, 1, 3, 3]),
    "axis from the end": lambda tensors, _: tensors["depthwise"].update(weight=[-4, 5, 1, 3, 3]),
    "axis of text": lambda tensors, _: tensors["depthwise"].update(weight=["0", 5, 1, 3, 3]),
    "no activation": lambda tensors, _: tensors.pop("conv (input)"),
    "alias of nothing": lambda tensors, _: tensors.update(x=["alias", "y"]),
    "alias of an alias": lambda tensors, _: tensors.update(x=["alias", "tied.weight"]),
    "alias without a name": lambda tensors, _: tensors.update(x=["alias"]),
    "kept and longer": lambda tensors, _: tensors["bn"].update(weight=["f32", 5]),
    "kept no more": lambda tensors, _: tensors["bn"].pop("num_batches_tracked"),
    "kept in no entry": lambda tensors, _: tensors.update(x=["i8", 1]),
    "kept of no dtype": lambda tensors, _: tensors.update(x=["complex", 0]),
    "one name twice": lambda tensors, _: tensors.update(
        {"bn.weight": ["f32", 4], "bn.bias": ["f32", 0]}
    ),
    "no gates": with_bytes(0, b"\0"),
    "fewer gates": with_bytes(0, b"\x07"),
    "gates with a gap": with_bytes(0, b"\x0d"),
    "one byte more": lambda _, entries: entries.update(quantized=entries["quantized"] + b"\0"),
    "no entry": lambda _, entries: entries.pop("quantized"),
    "scale of many bits": with_bytes(2, struct.pack("<f", 0.1)),
    "no scale": with_bytes(2, struct.pack("<f", math.nan)),
    "levels that fall": with_bytes(6, b"\xff"),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_file_that_contradicts_itself_is_refused(file: Path, change: Any) -> None:
    raw = file.read_bytes()
    file.write_bytes(remade(raw, lambda *_: None))
    assert decoder.decode(file)[0].keys() == decoder.decode(GOLDEN)[0].keys()
    file.write_bytes(remade(raw, change))
    with pytest.raises(VerificationError, match="contradicts itself"):
        read_artifact(file)
    # The decoder alone checks less, but never mistakes one tensor's bytes for another's.
    with contextlib.suppress(Exception):
        found, expected = decoder.decode(file)[0], decoder.decode(GOLDEN)[0]
        assert all(found[name].shape == array.shape for name, array in expected.items())


@pytest.mark.parametrize(
    "change",
    [
        (b'"dtype":"U8"', b'"dtype":"I8"'),
        (b'"dtype":"F32"', b'"dtype":"F33"'),
        (b'"manifest":{', b'"manifesto":{'),
        (b'"quantized":{', b'"quantised":{'),
        (b'"f32":{', b'"f64":{'),
        (b"[0,8]", b"[0,9]"),
        (b'"quantized":{"data_offsets":[', b'"quantized":{"data_offsets":[1'),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    file: Path, change: tuple[bytes, bytes]
) -> None:
    raw = file.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = raw[8 : 8 + length].replace(*change)
    assert header != raw[8 : 8 + length]
    file.write_bytes(signed(struct.pack("<Q", len(header)) + header + raw[8 + length :]))
    with pytest.raises(VerificationError, match="contradicts itself"):
        read_artifact(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(more=[]),
        lambda manifest: manifest.update(meta="report"),
        lambda manifest: manifest.update(tensors=[]),
        lambda manifest: manifest.pop("meta"),
    ],
)
def test_a_manifest_of_other_keys_is_refused(
    file: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    file.write_bytes(with_manifest(file.read_bytes(), change))
    with pytest.raises(VerificationError, match="other keys than meta and tensors"):
        read_artifact(file)


def test_the_tensor_at_fault_is_named(file: Path) -> None:
    raw = remade(file.read_bytes(), lambda tensors, _: tensors.update(x=["complex", 0]))
    file.write_bytes(raw)
    with pytest.raises(VerificationError, match=r"x is \['complex', 0\] in its manifest"):
        read_artifact(file)


def test_an_unknown_version_is_named(file: Path) -> None:
    file.write_bytes(signed(file.read_bytes().replace(b'"version":"1"', b'"version":"3"')))
    with pytest.raises(UsageError, match="version 3; this reader knows versions 1 and 2 only"):
        read_artifact(file)
