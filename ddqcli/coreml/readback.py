"""A Core ML package read back from the disk: its tables and indices, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddqcli.coreml.package import Palette, quiet, require_coreml
from ddqcli.errors import UsageError, VerificationError

Array = NDArray[Any]


def require_same_palettes(
    path: Path, palettes: Mapping[str, Palette], floats: Mapping[str, Array], name: Path
) -> list[str]:
    """Find every palette among those of the package. Returns the floats that are not stored as is.

    Raises VerificationError, which calls the package `name`, if one is missing or differs.
    """
    stored, constants = _read(path, name)
    for weight, palette in palettes.items():
        if not any(_is_same(palette, *parts) for parts in stored):
            raise VerificationError(f"{name} differs from what was trained in {weight}.")
    if len(stored) < len({id(palette) for palette in palettes.values()}):
        raise VerificationError(f"{name} lacks some of the palettes that were trained.")
    return [weight for weight, value in floats.items() if value.tobytes() not in constants]


def _is_same(palette: Palette, indices: Array, tables: Array) -> bool:
    """Compare with indices [shape] and tables [1 or G, ..., 2^s, 1] of the package."""
    if indices.shape != palette.shape or tables.size != palette.tables.size:
        return False
    rows = np.moveaxis(indices, palette.axis or 0, 0).reshape(palette.indices.shape)
    same_tables = tables.tobytes() == palette.tables.tobytes()
    return (
        tables.dtype == palette.tables.dtype
        and same_tables
        and bool((rows == palette.indices).all())
    )


def _read(path: Path, name: Path) -> tuple[list[tuple[Array, Array]], set[bytes]]:
    """Return indices and tables of each palette, and the values of all other constants."""
    require_coreml()
    if not path.is_dir():
        raise UsageError(f"There is no Core ML package {name}.")
    stored, constants = [], set()
    with quiet():
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load

        try:
            package = ct.models.MLModel(str(path), skip_model_load=True)
            spec = package.get_spec()
            program = load(spec, spec.specificationVersion, package.weights_dir)
            for function in program.functions.values():
                for op in function.operations:
                    if op.op_type == "constexpr_lut_to_dense":
                        indices = np.asarray(op.indices.val).astype(np.uint8)
                        stored.append((indices, np.asarray(op.lut.val)))
                    elif op.op_type == "const" and op.outputs[0].val is not None:
                        constants.add(np.asarray(op.outputs[0].val).tobytes())
        except Exception as error:  # damage can lead to any
            raise VerificationError(
                f"{name} cannot be read ({type(error).__name__}); export it again."
            ) from error
    return stored, constants
