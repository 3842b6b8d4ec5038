"""The text of the header: each tensor as arrays of constants, with its bytes of flash."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.artifact.packing import pack
from ddqcli.artifact.tensors import ActivationTable, QuantizedTensor
from ddqcli.errors import UsageError
from ddqcli.qat.frozen import FrozenModel

Array = NDArray[Any]

KERNELS = Path(__file__).with_name("kernels.h")
C_TYPES = {  # by numpy's code; those that C99 lacks are stored as their bits
    "f4": "float",
    "f8": "double",
    "f2": "uint16_t",
    "i8": "int64_t",
    "i4": "int32_t",
    "i2": "int16_t",
    "i1": "int8_t",
    "u1": "uint8_t",
    "b1": "uint8_t",
}
_INTRODUCTION = """\
/* {title}

   Weights as packed indices into level tables, {flash:,} bytes of constants, and kernels that read
   them. What is not here, you write: the order of the layers, their geometry (ddq_conv), activation
   functions, pooling, additions, and for each BatchNorm y = x * weight + bias a channel, which are
   the scale and the shift. A layer with quantized inputs is

       x[i] = ddq_code(&net_fc_input, value[i]);
       ddq_linear(&net_fc_weight, x, net_fc_input.zero_point, row, y);
       out[k] = (float)y[k] * (ddq_scale(&net_fc_weight, k) * net_fc_input.scale)
              + ddq_bias(&net_fc_bias, k);

   Without quantized inputs, ddq_unpack gives the integers of a row, to multiply floats with.

{table} */
"""


@dataclass(frozen=True)
class FlashRow:
    """One tensor of the header."""

    name: str
    symbol: str  # its name in C
    bits: float  # the mean of its groups; of an unquantized tensor, of its type
    bytes: int  # of constants


def header_text(frozen: FrozenModel, title: str) -> tuple[str, list[FlashRow]]:
    """Return the header and its tensors, in the order of the model.

    Constants that folding leaves of BatchNorm are not among them. Raises UsageError for a dtype or
    a value that C constants cannot express.
    """
    symbols = symbols_of(frozen)
    rows, parts = [], []
    for tensor in frozen.quantized:
        symbol = symbols[tensor.name]
        rows.append(FlashRow(tensor.name, symbol, float(np.mean(tensor.bits or 0)), tensor.nbytes))
        parts.append("".join(_quantized(symbol, tensor)))
    for table in frozen.activations:
        levels = 0 if is_uniform(table) else table.levels.size
        rows.append(FlashRow(table.name, symbols[table.name], table.bits, levels + 6))
        parts.append("".join(_input(symbols[table.name], table)))
    for name, array in frozen.floats.items():
        rows.append(FlashRow(name, symbols[name], 8 * array.dtype.itemsize, array.nbytes))
        parts.append(_float(symbols[name], name, array))
    for name, target in frozen.aliases.items():
        if target in symbols:  # not a constant
            parts.append(f"#define {symbols[name]} {symbols[target]}\n")
    flash = sum(row.bytes for row in rows)
    introduction = _INTRODUCTION.format(title=_comment(title), flash=flash, table=_table(rows))
    text = "\n".join([introduction, KERNELS.read_text(encoding="utf-8"), *parts])
    guard = "DDQ_MODEL_H"
    return f"#ifndef {guard}\n#define {guard}\n\n{text}\n#endif\n", rows


def symbols_of(frozen: FrozenModel) -> dict[str, str]:
    """Return a C identifier for each tensor, input and alias: net_layer1_0_conv1_weight."""
    names = [*(t.name for t in frozen.quantized), *(t.name for t in frozen.activations)]
    names += [*frozen.floats, *frozen.aliases]
    symbols: dict[str, str] = {}
    for name in names:
        plain = "net_" + re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_")
        symbol, number = plain, 2
        while symbol in symbols.values():
            symbol, number = f"{plain}_{number}", number + 1
        symbols[name] = symbol
    return symbols


def is_uniform(table: ActivationTable) -> bool:
    """True if the levels are 0, 1, 2, ..., which ddq_code rounds to without a table."""
    return bool(np.array_equal(table.levels, np.arange(len(table.levels))))


def _quantized(symbol: str, tensor: QuantizedTensor) -> Iterator[str]:
    rows, groups, axis = tensor.rows(), len(tensor.levels), tensor.axis or 0
    stored = [levels for levels in tensor.levels if len(levels) < 256]
    yield f"/* {_comment(tensor.name)} {list(tensor.shape)}, rows along axis {axis} */\n"
    yield _array("uint8_t", f"{symbol}_packed", pack(rows, tensor.bits))
    yield _array("uint8_t", f"{symbol}_levels", np.concatenate([np.zeros(0, np.uint8), *stored]))
    yield _array("uint8_t", f"{symbol}_bits", np.array(tensor.bits, np.uint8))
    yield _array("uint8_t", f"{symbol}_zero_point", tensor.zero_point)
    yield _array("float", f"{symbol}_scale", tensor.scale)
    count = tensor.shape[axis] if tensor.shape else 1
    columns = tensor.indices.size // max(count, 1)
    members = ", ".join(
        f"{symbol}_{m}" for m in ("packed", "levels", "bits", "zero_point", "scale")
    )
    yield f"const ddq_tensor {symbol} = {{{members}, {count}, {columns}, {groups}}};\n"


def _input(symbol: str, table: ActivationTable) -> Iterator[str]:
    levels = "0"
    if not is_uniform(table):
        levels = f"{symbol}_levels"
        yield _array("uint8_t", levels, table.levels)
    members = [levels, str(len(table.levels)), str(table.zero_point)]
    members.append(_literal(np.float32(table.scale)))
    yield f"const ddq_input {symbol} = {{{', '.join(members)}}};\n"


def _float(symbol: str, name: str, array: Array) -> str:
    code = array.dtype.str[1:]
    if code == "V2":  # bfloat16
        code, array = "f2", array.view(np.uint16).view(np.float16)
    if code not in C_TYPES:
        raise UsageError(f"{name} holds {array.dtype}, which a C header cannot.")
    values = array.view(np.uint16) if code == "f2" else array
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UsageError(f"{name} holds values that are not finite, which C constants cannot.")
    about = f"/* {_comment(name)} {list(array.shape)} */\n"
    return about + _array(C_TYPES[code], symbol, values)


def _array(c_type: str, symbol: str, values: Array) -> str:
    flat = values.reshape(-1)
    if not flat.size:
        return f"const {c_type} {symbol}[1] = {{0}};\n"  # C has no empty arrays
    literals = [_literal(value) for value in flat]
    lines, line = [], ""
    for literal in literals:
        if len(line) + len(literal) > 98:
            lines.append(line)
            line = ""
        line += f"{literal},"
    return f"const {c_type} {symbol}[{flat.size}] = {{\n" + "\n".join([*lines, line]) + "\n};\n"


def _literal(value: Any) -> str:
    """Return a constant of exactly this value; floats in hexadecimal."""
    if isinstance(value, np.floating):
        return float(value).hex() + ("f" if value.dtype.itemsize == 4 else "")
    if value == np.iinfo(np.int64).min:
        return "INT64_MIN"
    return str(int(value))


def _comment(text: str) -> str:
    """Return text that cannot end the comment around it."""
    return (
        "".join(c if c.isprintable() else "?" for c in text)
        .replace("*/", "* /")
        .replace("/*", "/ *")
    )


def _table(rows: list[FlashRow]) -> str:
    """Return the bytes by tensor, for the introduction."""
    width = max((len(_comment(row.name)) for row in rows), default=0)
    lines = [f"   {_comment(r.name):<{width}} {r.bits:>6g} bits {r.bytes:>10,} bytes" for r in rows]
    return "\n".join(lines)
