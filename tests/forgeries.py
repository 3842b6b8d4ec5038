"""Changed content in files whose structure and checksums are right, for each format."""

from __future__ import annotations

import ast
import bz2
import hashlib
import io
import json
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from mutations import INJECTED, NAMES, SPECIAL, changed, limit, mutated, odd_value, rewritten

CANARY = "ran"  # a file that forged code makes
_CODE = [
    f"cos\nsystem\n(S'touch {CANARY}'\ntR.".encode(),
    f"c__builtin__\neval\n(S'open({CANARY!r}, chr(119))'\ntR.".encode().replace(b"'ran'", b'"ran"'),
    f"cposixpath\nos.system\n(S'touch {CANARY}'\ntR.".encode(),
]
_GLOBALS = [b"collections\nOrderedDict", b"torch\nFloatStorage", b"torch._utils\n_rebuild_tensor",
            b"torch\nTensor", b"torch._utils\n_rebuild_parameter", b"torch.storage\nUntypedStorage",
            b"torch\ndevice", b"builtins\nlist", b"_codecs\nencode", b"os\nsystem"]  # fmt: skip
_FIELDS = {  # offset and size of the numbers in the parts of a zip file
    b"PK\x03\x04": [(4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)],
    b"PK\x01\x02": [(6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2),
                    (34, 2), (38, 4), (42, 4)],
    b"PK\x05\x06": [(4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)],
    b"PK\x06\x06": [(4, 8), (24, 8), (32, 8), (40, 8), (48, 8)],
    b"PK\x06\x07": [(8, 8)],
}  # fmt: skip


def forged(name: str, raw: bytes, draw: random.Random) -> bytes:
    """Return the file with other content, by the format that its name tells."""
    path = Path(name)
    if path.name == "file.safetensors":
        return forged_artifact(raw, draw)
    return FORGERS.get(path.suffix, rewritten)(raw, draw)


def forged_artifact(raw: bytes, draw: random.Random) -> bytes:
    """Change a ddq file's manifest, header or data, and set its digest."""
    way = draw.randrange(4)
    if way <= 1:
        return with_manifest(raw, lambda manifest: changed(manifest, draw))
    header, data = _parts(raw)
    if way == 2:
        metadata = header.pop("__metadata__")
        changed(header, draw)
        return _joined({"__metadata__": metadata, **header}, data)
    return _joined(header, mutated(data, draw))


def with_manifest(raw: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a ddq file with a changed manifest, and header and digest that fit."""
    header, data = _parts(raw)
    first, last = header["manifest"]["data_offsets"]
    manifest = json.loads(bz2.decompress(data[first:last]))
    change(manifest)
    packed = bz2.compress(json.dumps(manifest).encode())
    shift = len(packed) - (last - first)
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= last:
            entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
    header["manifest"] |= {"data_offsets": [first, last + shift], "shape": [len(packed)]}
    return _joined(header, data[:first] + packed + data[last:])


def _parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def _joined(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    result = bytearray(len(text).to_bytes(8, "little") + text + data)
    result[50:114] = b"0" * 64
    result[50:114] = hashlib.sha256(result).hexdigest().encode()
    return bytes(result)


def _safetensors(raw: bytes, draw: random.Random) -> bytes:
    """Change the header, with its length right."""
    header, data = _parts(raw)
    changed(header, draw)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _json(raw: bytes, draw: random.Random) -> bytes:
    """Change a report and set its checksum."""
    report = json.loads(raw)
    del report["checksum"]
    changed(report, draw)
    digest = hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()
    return json.dumps({**report, "checksum": digest}).encode()


def _lines(raw: bytes, draw: random.Random) -> bytes:
    lines = [json.loads(line) for line in raw.splitlines()]
    changed(lines, draw)
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


def _yaml(raw: bytes, draw: random.Random) -> bytes:
    way = draw.randrange(10)
    if way < 6:
        tree = yaml.safe_load(raw)
        changed(tree, draw)
        with suppress(yaml.YAMLError):
            return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode(
                "utf-8", "surrogatepass"
            )
    if way == 6:
        code = f"!!python/object/apply:os.system ['touch {CANARY}']"
        return rewritten(raw.replace(b": ", f": {code}\nx: ".encode(), 1), draw)
    return rewritten(raw, draw)


def _zip(raw: bytes, draw: random.Random) -> bytes:
    """Change a record, their list, or a number of the archive's own."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    method = zipfile.ZIP_STORED
    way, place = draw.randrange(10), draw.randrange(len(records))
    if way < 5:
        wanted = [n for n, (name, _) in enumerate(records) if name.endswith((".pkl", ".npy"))]
        place = draw.choice(wanted) if draw.random() < 0.8 else place
        name, content = records[place]
        records[place] = name, _RECORDS.get(Path(name).suffix, mutated)(content, draw)
    elif way == 5:
        records.pop(place)
    elif way == 6:
        records.insert(draw.randrange(len(records)), records[place])
    elif way == 7:
        other = draw.randrange(len(records))
        (a, first), (b, second) = records[place], records[other]
        records[place], records[other] = (a, second), (b, first)
    elif way == 8:
        name = draw.choice([*NAMES, records[place][0].upper(), f"{records[place][0]}/x"])
        records[place] = name.encode("utf-8", "replace").decode(), records[place][1]
        method = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    else:
        return _with_wrong_numbers(raw, draw)
    return _archive(records, method)


def _archive(records: list[tuple[str, bytes]], method: int) -> bytes:
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", method) as archive:
        for name, content in records:
            with suppress(ValueError, IndexError):  # names that zipfile does not write
                archive.writestr(name, content)
    return result.getvalue()


def _with_wrong_numbers(raw: bytes, draw: random.Random) -> bytes:
    result = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 4))):
        signature = draw.choice([signature for signature in _FIELDS if signature in raw])
        at = draw.choice([n for n in range(len(raw)) if raw[n : n + 4] == signature])
        offset, size = draw.choice(_FIELDS[signature])
        old = int.from_bytes(raw[at + offset : at + offset + size], "little")
        new = draw.choice([*SPECIAL, old + 1, old - 1, old * 2]) % 2 ** (8 * size)
        result[at + offset : at + offset + size] = new.to_bytes(size, "little")
    return bytes(result)


def _pickle(raw: bytes, draw: random.Random) -> bytes:
    """Remove, repeat, move, insert or change operations of a pickle."""
    starts = [position for _, _, position in pickletools.genops(raw)]
    ops = [raw[a:b] for a, b in zip(starts, [*starts[1:], len(raw)], strict=True)]
    for _ in range(draw.choice((1, 1, 2, 5))):
        place, other = draw.randrange(1, len(ops) - 1), draw.randrange(1, len(ops))
        op, way = ops[place], draw.randrange(8)
        if way == 0:
            del ops[place]
        elif way == 1:
            ops.insert(other, op)
        elif way == 2:
            ops[place], ops[other] = ops[other], op
        elif way == 3:
            ops[place] = bytes([draw.choice(pickletools.opcodes).code.encode("latin1")[0]]) + op[1:]
        elif way == 4:
            ops.insert(place, draw.choice(pickletools.opcodes).code.encode("latin1"))
        elif way == 5 and op[:1] == b"c":
            ops[place] = b"c" + draw.choice(_GLOBALS) + b"\n"
        elif way == 6 and draw.random() < 0.3:
            ops.insert(place, draw.choice(_CODE)[: -draw.randrange(1, 3)])
        elif len(op) > 1:
            ops[place] = op[:1] + (limit(draw) + bytes(8))[: len(op) - 1]
        if len(ops) < 3:
            break
    return b"".join(ops)


def _npy(raw: bytes, draw: random.Random) -> bytes:
    """Change the header of an array."""
    stream = io.BytesIO(raw)
    major, _ = np.lib.format.read_magic(stream)
    assert major == 1
    length = struct.unpack("<H", stream.read(2))[0]
    header, data = ast.literal_eval(stream.read(length).decode()), stream.read()
    way = draw.randrange(5)
    if way == 0:
        types = [
            "<f4",
            ">f8",
            "|O",
            "|u1",
            "<U9",
            "|V8",
            "<M8[s]",
            "<c16",
            "|S0",
            "<i8",
            "|b1",
            "f2",
        ]
        header["descr"] = draw.choice([*types, [("a", "<f4")], draw.choice(types) * 2])
    elif way == 1:
        shape = list(header["shape"])
        shape[draw.randrange(len(shape))] = draw.choice([*SPECIAL, draw.randrange(200)])
        header["shape"] = tuple(shape)
    elif way == 2:
        data = mutated(data, draw)
    elif way == 3:
        changed(header, draw)
    else:
        header["shape"] = odd_value(list(header["shape"]), draw)
    text = f"{header!r}".encode("utf-8", "replace")
    text = mutated(text, draw) if draw.random() < 0.2 else text
    text = text[:60_000] + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def _png(raw: bytes, draw: random.Random) -> bytes:
    """Change, repeat, remove or move chunks, with right checksums."""
    chunks, at = [], 8
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 4], "big")
        chunks.append((raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]))
        at += 12 + length
    place, other, way = draw.randrange(len(chunks)), draw.randrange(len(chunks)), draw.randrange(7)
    kind, content = chunks[place]
    if way == 0:
        chunks.insert(other, chunks[place])
    elif way == 1:
        del chunks[place]
    elif way == 2:
        chunks[place], chunks[other] = chunks[other], chunks[place]
    elif way == 3:
        kinds = (b"PLTE", b"tRNS", b"iTXt", b"zTXt", b"eXIf", b"iCCP", b"acTL", b"fdAT", b"gAMA")
        chunks.insert(max(other, 1), (draw.choice(kinds), draw.randbytes(draw.randrange(99))))
    elif way == 4:
        size = bytearray(chunks[0][1])
        field = draw.randrange(len(size) - 4)
        number = limit(draw, 4)
        size[field : field + len(number)] = number
        chunks[0] = chunks[0][0], bytes(size)
    elif kind == b"IDAT" and way == 5:
        chunks[place] = kind, zlib.compress(mutated(zlib.decompress(content), draw))
    else:
        chunks[place] = kind, mutated(content, draw)
    return raw[:8] + b"".join(
        len(content).to_bytes(4, "big")
        + kind
        + content
        + zlib.crc32(kind + content).to_bytes(4, "big")
        for kind, content in chunks
    )


def _onnx(raw: bytes, draw: random.Random) -> bytes:
    """Change a field of a graph and set the checksum among the metadata."""
    import onnx

    from ddqcli.onnx.seal import properties, sealed

    model = onnx.load_model_from_string(raw)
    about = {key: value for key, value in properties(model).items() if key != "sha256"}
    message = draw.choice([model, *model.graph.node, *model.graph.initializer, *model.graph.input])
    while True:
        fields = [(f, v) for f, v in message.ListFields() if f.name != "metadata_props"]
        field, value = draw.choice(fields)
        repeated = hasattr(value, "append") or hasattr(value, "add")
        if field.message_type and len(value if repeated else [1]):
            message = draw.choice(list(value)) if repeated else value
            if message.ListFields():
                continue
        break
    if repeated and draw.random() < 0.4:
        del value[draw.randrange(len(value))]
    elif field.message_type or draw.random() < 0.2:
        message.ClearField(field.name)
    else:
        old = draw.choice(list(value)) if repeated else value
        new = mutated(old, draw) if isinstance(old, bytes) else _odd_number_or_text(old, draw)
        with suppress(ValueError, TypeError):
            if repeated:
                value[draw.randrange(len(value))] = new
            else:
                setattr(message, field.name, new)
    return sealed(model, about)


def _odd_number_or_text(old: Any, draw: random.Random) -> Any:
    if isinstance(old, str):
        return draw.choice([old + "x", old[1:], "Identity", INJECTED, "é"])
    return draw.choice([old + 1, -old, 0, *SPECIAL])


_RECORDS = {".pkl": _pickle, ".npy": _npy}
FORGERS = {
    ".safetensors": _safetensors,
    ".json": _json,
    ".jsonl": _lines,
    ".yaml": _yaml,
    ".pt": _zip,
    ".npz": _zip,
    ".png": _png,
    ".onnx": _onnx,
}
