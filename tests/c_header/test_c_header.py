"""The C header: compiled by the system's compiler, against numpy, at every bit-width."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_net import quantize, shake

from ddqcli.artifact.read import read_artifact
from ddqcli.artifact.tensors import BFLOAT16, ActivationTable, QuantizedTensor
from ddqcli.c_header.header import header_text, symbols_of
from ddqcli.c_header.verify import require_same_header, require_same_integers
from ddqcli.errors import UsageError, VerificationError
from ddqcli.qat.frozen import FrozenModel
from ddqcli.quant.c_compiler import c_compilers
from ddqcli.quant.frozen_input import FrozenInputQuantizer

needs_compiler = pytest.mark.skipif(not c_compilers(), reason="no C compiler")
STRICT = ("-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-Wconversion")
SANITIZED = ("-fsanitize=undefined,address", "-fno-sanitize-recover=all")


def tensor(
    name: str, shape: tuple[int, ...], axis: int | None, bits: Sequence[int]
) -> QuantizedTensor:
    """Return a tensor of random indices and levels; group g has `bits[g]`."""
    random = np.random.default_rng(len(name) + sum(bits))
    group_of = np.zeros(shape, int) if axis is None else np.indices(shape)[axis]
    draws = random.integers(0, 256, shape)
    levels = tuple(
        np.arange(256) if s == 8 else np.sort(random.choice(256, 2**s, replace=False)) for s in bits
    )
    return QuantizedTensor(
        name,
        shape,
        axis,
        (draws % (2 ** np.array([*bits, 0]))[group_of]).astype(np.uint8).reshape(-1),
        tuple(level.astype(np.uint8) for level in levels),
        np.array([(2049 + 2 * g) * 2.0**-18 for g in range(len(bits))], np.float32),
        random.integers(0, 256, len(bits)).astype(np.uint8),
    )


def model(
    quantized: Sequence[QuantizedTensor],
    activations: Sequence[ActivationTable] = (),
    **parts: Any,
) -> FrozenModel:
    """Return the tensors as a finished model; `parts` are its other fields."""
    trained = {t.name: t.dequantize() for t in quantized}
    fields = {"floats": {}, "aliases": {}, "trained": trained, "constants": {}, **parts}
    return FrozenModel(quantized=list(quantized), activations=list(activations), **fields)


def output(folder: Path, text: str, main: str) -> bytes:
    """Compile the header with a main function, without warnings or undefined behavior; run it."""
    (folder / "model.h").write_text(text)
    (folder / "main.c").write_text(
        f'#include "model.h"\n#include <stdio.h>\nint main(void)\n{{\n{main}\nreturn 0;\n}}\n'
    )
    command = [*c_compilers()[0], *STRICT, *SANITIZED, "-o", "main", "main.c", "-lm"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return subprocess.run([folder / "main"], capture_output=True, check=True).stdout


def array(c_type: str, name: str, values: np.ndarray) -> str:
    literals = [v.hex() if isinstance(v, float) else str(v) for v in values.reshape(-1).tolist()]
    return f"static const {c_type} {name}[] = {{{', '.join(literals)}}};\n"


def values_of(t: QuantizedTensor) -> np.ndarray:
    """Return level - zero_point of each element, one by one, int64 [shape]."""
    found = np.zeros(t.shape, int)
    indices = t.indices.reshape(t.shape)
    for at in np.ndindex(*t.shape):
        group = 0 if t.axis is None else at[t.axis]
        found[at] = int(t.levels[group][indices[at]]) - int(t.zero_point[group])
    return found


@needs_compiler
def test_linear_layers_of_every_bit_width_sum_the_same_integers(tmp_path: Path) -> None:
    layers = [tensor(f"fc{s}.weight", (5, 7), None, [s]) for s in range(1, 9)]
    layers += [tensor("mixed.weight", (8, 7), 0, [3, 1, 8, 5, 2, 7, 4, 6])]
    x = np.random.default_rng(0).integers(0, 256, 7)
    frozen = model(layers)
    symbols = symbols_of(frozen)
    main = array("uint8_t", "x", x) + "static int16_t row[7]; static int32_t y[8]; float scale;"
    for layer in layers:
        symbol = symbols[layer.name]
        main += f"ddq_linear(&{symbol}, x, 37, row, y); fwrite(y, 4, {layer.shape[0]}, stdout);\n"
        main += f"scale = ddq_scale(&{symbol}, 4); fwrite(&scale, 4, 1, stdout);\n"
    found = np.frombuffer(output(tmp_path, header_text(frozen, "x")[0], main), np.int32)
    for layer in layers:
        sums, scale, found = found[: (n := layer.shape[0])], found[n], found[n + 1 :]
        assert sums.tolist() == (values_of(layer) @ (x - 37)).tolist(), layer.name
        assert scale.view(np.float32) == layer.scale[4 if layer.axis == 0 else 0]
    assert not found.size


FIELDS = ("channels", "height", "width", "kernel_height", "kernel_width")
FIELDS += ("stride", "padding", "dilation", "groups")
CONVOLUTIONS = {  # shape of the weight, groups, stride, padding, dilation
    "dense": ((6, 4, 3, 2), 1, 1, 1, 1),
    "strided": ((6, 4, 3, 3), 1, 2, 0, 2),
    "grouped": ((6, 2, 1, 1), 2, 1, 0, 1),
    "depthwise": ((4, 1, 3, 3), 4, 2, 2, 1),
}


@needs_compiler
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_every_bit_width_are_those_of_torch(kind: str, tmp_path: Path) -> None:
    shape, groups, stride, padding, dilation = CONVOLUTIONS[kind]
    layers = [tensor(f"c{s}.weight", shape, None, [s]) for s in range(1, 9)]
    layers.append(tensor("mixed.weight", shape, 0, [1 + k % 8 for k in range(shape[0])]))
    frozen = model(layers)
    x = np.random.default_rng(0).integers(0, 256, (4, 7, 6))
    expected = [
        torch.nn.functional.conv2d(
            torch.tensor(x[None] - 9).double(),
            torch.tensor(values_of(layer)).double(),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )[0]
        for layer in layers
    ]
    size = expected[0].numel()
    geometry = (4, 7, 6, *shape[2:], stride, padding, dilation, groups)
    main = array("uint8_t", "x", x) + array("uint32_t", "g", np.array(geometry))
    main += "static ddq_conv c;" + "".join(f"c.{field} = g[{k}];" for k, field in enumerate(FIELDS))
    main += f"static int16_t row[{math.prod(shape[1:])}]; static int32_t y[{size}];\n"
    for layer in layers:
        symbol = symbols_of(frozen)[layer.name]
        main += f"ddq_conv2d(&{symbol}, &c, x, 9, row, y); fwrite(y, 4, {size}, stdout);\n"
    found = np.frombuffer(output(tmp_path, header_text(frozen, "x")[0], main), np.int32)
    for layer, sums, one in zip(layers, expected, found.reshape(len(layers), -1), strict=True):
        assert one.tolist() == sums.reshape(-1).tolist(), layer.name


@needs_compiler
@pytest.mark.parametrize(
    ("levels", "zero_point"),
    [(np.arange(256), 7), (np.arange(16), 0), (np.array([0, 9, 9, 200]), 9), (np.arange(1, 3), 1)],
    ids=["8 bits", "4 bits", "learned", "1 bit"],
)
def test_inputs_get_the_codes_of_torch(levels: np.ndarray, zero_point: int, tmp_path: Path) -> None:
    table = ActivationTable("fc (input)", levels.astype(np.uint8), 2049 * 2.0**-12, zero_point)
    frozen = model([tensor("fc.weight", (2, 2), None, [4])], [table])
    steps = np.concatenate([np.arange(-40, 600) / 2, np.random.default_rng(0).normal(60, 90, 400)])
    x = ((steps - zero_point) * table.scale).astype(np.float32)
    main = array("double", "xs", x.astype(np.float64))
    main += f"for (int i = 0; i < {len(x)}; i++)\n"
    main += "fputc(ddq_code(&net_fc_input, (float)xs[i]), stdout);"
    codes = np.frombuffer(output(tmp_path, header_text(frozen, "x")[0], main), np.uint8)
    quantizer = FrozenInputQuantizer(torch.tensor(levels), table.scale, zero_point)
    expected = quantizer(torch.tensor(x)).numpy()
    found = (codes.astype(np.float32) - zero_point) * np.float32(table.scale)
    assert np.array_equal(found, expected)


NETWORK = """
static const ddq_conv first = {2, 6, 6, 3, 3, 1, 1, 1, 1}, second = {4, 6, 6, 3, 3, 2, 1, 1, 4};
static uint8_t x[144]; static int16_t row[36]; static int32_t y[144]; static float v[144], out[5];
for (uint32_t i = 0; i < 72; i++) x[i] = ddq_code(&net_0_input, (float)image[i]);
ddq_conv2d(&net_0_weight, &first, x, net_0_input.zero_point, row, y);
for (uint32_t i = 0; i < 144; i++) {
    v[i] = (float)y[i] * (ddq_scale(&net_0_weight, i / 36) * net_0_input.scale);
    v[i] = v[i] * net_1_weight[i / 36] + net_1_bias[i / 36];
    x[i] = ddq_code(&net_3_input, v[i] > 0 ? v[i] : 0);
}
ddq_conv2d(&net_3_weight, &second, x, net_3_input.zero_point, row, y);
for (uint32_t i = 0; i < 36; i++) {
    v[i] = (float)y[i] * (ddq_scale(&net_3_weight, i / 9) * net_3_input.scale)
         + ddq_bias(&net_3_bias, i / 9);
    x[i] = ddq_code(&net_5_input, v[i]);
}
ddq_linear(&net_5_weight, x, net_5_input.zero_point, row, y);
for (uint32_t k = 0; k < 5; k++)
    out[k] = (float)y[k] * (ddq_scale(&net_5_weight, k) * net_5_input.scale)
           + ddq_bias(&net_5_bias, k);
fwrite(out, sizeof *out, 5, stdout);
"""


@needs_compiler
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_network_of_the_kernels_answers_as_torch_does(granularity: str, tmp_path: Path) -> None:
    """As the top of the header says that a layer is computed."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),
        torch.nn.Flatten(),
        torch.nn.Linear(36, 5),
    )
    x = torch.randn(3, 2, 6, 6)
    path = tmp_path / "m.safetensors"
    made = quantize(shake(net), x, path, bits=3, act_bits=8, granularity=granularity)
    artifact = read_artifact(path)
    frozen = model(
        list(artifact.quantized.values()),
        list(artifact.activations.values()),
        floats=artifact.floats,
        constants=artifact.constants,
    )
    main = array("double", "image", x[0].double().numpy()) + NETWORK
    found = np.frombuffer(output(tmp_path, header_text(frozen, "x")[0], main), np.float32)
    with torch.no_grad():
        expected = made.model(x[:1])[0].numpy()
    assert abs(found - expected).max() < 1e-5 * abs(expected).max()


FLOATS = {
    "f32": np.array([0.1, -0.0, 1e-42, 3.4e38], np.float32),
    "f64": np.array([[0.1], [-1e300]]),
    "f16": np.array([1.5, np.inf], np.float16),
    "bf16": np.array([0x3F80, 0x7FC1], np.uint16).view(BFLOAT16),
    "i64": np.array([np.iinfo(np.int64).min, 2**62]),
    "i8": np.array(-3, np.int8),
    "mask": np.array([True, False]),
    "empty": np.zeros((2, 0), np.float32),
}


@needs_compiler
def test_unquantized_tensors_keep_their_bits(tmp_path: Path) -> None:
    frozen = model([tensor("w", (2,), None, [3])], floats=FLOATS, aliases={"tied": "f32"})
    none = tensor("none", (0, 3), None, [1])
    require_same_header(header_text(model([none]), "x")[0], model([none]), Path("model.h"))
    text, rows = header_text(frozen, "x")
    require_same_header(text, frozen, Path("model.h"))
    stored = {name: value for name, value in FLOATS.items() if value.size}
    main = "".join(f"fwrite(net_{n}, 1, sizeof net_{n}, stdout);" for n in stored)
    main += "fwrite(net_tied, 1, sizeof net_tied, stdout);"
    parts = [value.tobytes() for value in stored.values()] + [FLOATS["f32"].tobytes()]
    assert output(tmp_path, text, main) == b"".join(parts)
    assert {row.name: row.bytes for row in rows} == {
        "w": 1 + 8 + 6,
        **{name: value.nbytes for name, value in FLOATS.items()},
    }


def whole() -> FrozenModel:
    """Return a model of names that C does not take, and of what is rare."""
    quantized = [
        tensor("a.b.weight", (3, 4, 2), 1, [2, 7, 8, 6]),
        tensor("a_b.weight", (3, 4), None, [5]),
        tensor("*/ int", (), None, [2]),
    ]
    inputs = [ActivationTable("a.b (input)", np.array([0, 9, 9, 200], np.uint8), 0.5, 9)]
    return model(quantized, inputs, floats={"n": np.array([1.5], np.float32)})


def test_what_is_read_back_is_what_was_trained() -> None:
    frozen = whole()
    text, _ = header_text(frozen, "a title */ of a file")
    require_same_header(text, frozen, Path("model.h"))
    cc, unchecked = require_same_integers(text, frozen, Path("model.h"))
    assert (cc is None, unchecked != "") == (not c_compilers(),) * 2
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line[:1].isdigit() or line.startswith(("const ddq_", "-")):  # constants
            digit = next(k for k in range(len(line) - 1, -1, -1) if line[k].isdigit())
            changed = line[:digit] + str((int(line[digit]) + 1) % 10) + line[digit + 1 :]
            forged = "\n".join([*lines[:number], changed, *lines[number + 1 :]])
            with pytest.raises((VerificationError, OverflowError)):
                require_same_header(forged, frozen, Path("model.h"))


@needs_compiler
def test_kernels_that_unpack_other_integers_are_seen() -> None:
    frozen = whole()
    text = header_text(frozen, "x")[0].replace("8 - shift", "7 - shift")
    with pytest.raises(VerificationError, match=r"model.h, compiled by .*cc, unpacks other"):
        require_same_integers(text, frozen, Path("model.h"))


@needs_compiler
@pytest.mark.parametrize("body", ["exit 1", "touch main", 'exec g++ "$@"'])
def test_a_cc_that_cannot_make_a_program_gives_way_to_the_next_compiler(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may fail, or compile for another machine; or it compiles C++."""
    (tmp_path / "mycc").write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "mycc").chmod(0o755)
    monkeypatch.setenv("CC", f"{tmp_path / 'mycc'} -O0")
    frozen = whole()
    cc, unchecked = require_same_integers(header_text(frozen, "x")[0], frozen, Path("model.h"))
    assert cc is not None
    assert unchecked == ""
    assert ("mycc -O0" in cc) == ("g++" in body and shutil.which("g++") is not None)


def test_without_a_compiler_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    frozen = whole()
    found = require_same_integers(header_text(frozen, "x")[0], frozen, Path("model.h"))
    assert found == (None, "the header was not compiled: this machine has no C compiler (cc)")


def test_what_c_cannot_hold_is_refused() -> None:
    quantized = [tensor("w", (2,), None, [3])]
    for value, message in (
        (np.array([np.nan], np.float32), "n holds values that are not finite"),
        (np.array([1j]), "n holds complex128, which a C header cannot"),
    ):
        with pytest.raises(UsageError, match=message):
            header_text(model(quantized, floats={"n": value}), "x")
    frozen = replace(model(quantized), constants={"c": np.zeros(2)}, aliases={"d": "c"})
    assert "net_d" not in header_text(frozen, "x")[0]
    assert json.dumps(header_text(frozen, "x")[0])
