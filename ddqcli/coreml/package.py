"""Convert a loaded model with coremltools, then store its weights as tables and indices."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddqcli.artifact.tensors import QuantizedTensor
from ddqcli.data.trees import Tree
from ddqcli.errors import UsageError
from ddqcli.qat.input_hooks import input_quantizer, remove_input_quantizer
from ddqcli.qat.network_copy import copy_network

Array = NDArray[Any]

SUFFIX = ".mlpackage"
OFFERED_BITS = (1, 2, 3, 4, 6, 8)  # of Core ML's indices
# It would put BatchNorm's factor into the weights, which then have one value a channel and level.
_BATCH_NORM_PASS = "common::fuse_conv_batchnorm"


def require_coreml() -> None:
    """Raise UsageError unless the extra `ddqcli[coreml]` is installed."""
    if importlib.util.find_spec("coremltools") is None:
        raise UsageError("Core ML needs coremltools; run pip install 'ddqcli[coreml]'.")


def stored_bits(bits: int) -> int:
    """Return the bits of an index in Core ML: 5 become 6, and 7 become 8."""
    return min(offered for offered in OFFERED_BITS if offered >= bits)


@dataclass(frozen=True)
class Palette:
    """A weight as Core ML stores it: values are tables[g][index], for groups along `axis`."""

    tables: Array  # [G, 2^stored bits], float32 or float16
    indices: Array  # uint8 [G, numel of a group]
    axis: int | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: QuantizedTensor, dtype: Any) -> Palette:
        """Keep the tensor's levels and indices; tables of fewer bits repeat their last entry."""
        size = 2 ** stored_bits(max(tensor.bits))
        tables = np.zeros((len(tensor.levels), size), dtype)
        for g, levels in enumerate(tensor.levels):
            values = (levels.astype(np.float32) - tensor.zero_point[g]) * tensor.scale[g]
            tables[g] = np.pad(values, (0, size - len(values)), "edge").astype(dtype)
        return cls(tables, tensor.rows(), tensor.axis, tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of tables and indices."""
        bits = self.tables.shape[1].bit_length() - 1
        return int(self.tables.nbytes + (self.indices.size * bits + 7) // 8)


def make_package(
    model: nn.Module,
    weights: Mapping[str, QuantizedTensor],
    example: Tree,
    about: Mapping[str, str],
    *,
    half: bool,
) -> tuple[Any, dict[str, Palette]]:
    """Return a coremltools.models.MLModel, and the palettes in it by the weight's name.

    Activations are float, so quantizers of inputs are left out. A weight that Core ML stores in
    another form (of LSTM, for one) has no palette.

    Args:
        model: the network as `ddqcli.load` returns it.
        weights: its quantized tensors.
        example: inputs of some samples: a tensor [B, ...], or a tuple of them.
        about: metadata of the package.
        half: compute in float16, and store tables in it.

    Raises UsageError for what coremltools cannot convert.
    """
    require_coreml()
    positional = example if isinstance(example, (tuple, list)) else (example,)
    if not all(isinstance(x, Tensor) for x in positional):
        raise UsageError("Core ML export takes a network of tensors alone, or a tuple of them.")
    inputs = tuple(x[:1].cpu().contiguous() for x in positional)
    model = copy_network(model).cpu().to(memory_format=torch.contiguous_format).eval()
    for module in model.modules():
        if input_quantizer(module) is not None:
            remove_input_quantizer(module)
    dtype = np.float16 if half else np.float32
    palettes = {
        name: Palette.of(tensor, dtype)
        for name, tensor in weights.items()
        if len(tensor.shape) > 1 and tensor.indices.size  # of a bias, tables would be most
    }
    with quiet():
        try:
            package = _converted(model, inputs, half)
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            raise UsageError(
                f"coremltools cannot convert the model: {type(error).__name__}: {reason[0][:300]}"
            ) from error
        package, found = _palettized(package, palettes, weights, dtype)
    for key, value in about.items():
        package.user_defined_metadata[key] = value
    return package, found


def _converted(model: nn.Module, inputs: tuple[Tensor, ...], half: bool) -> Any:
    import coremltools as ct

    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes({_BATCH_NORM_PASS})
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs)  # type: ignore[no-untyped-call]
    precision = ct.precision.FLOAT16 if half else ct.precision.FLOAT32
    types = [
        ct.TensorType(name="input" if len(inputs) == 1 else f"input_{k}", shape=x.shape)
        for k, x in enumerate(inputs)
    ]
    return ct.convert(
        traced,
        inputs=types,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,  # the first with 3 bits and tables by channel
        compute_precision=precision,
        pass_pipeline=pipeline,
        skip_model_load=True,
    )


def _palettized(
    package: Any,
    palettes: Mapping[str, Palette],
    weights: Mapping[str, QuantizedTensor],
    dtype: Any,
) -> tuple[Any, dict[str, Palette]]:
    """Put palettes in place of the constants of the same values; also return those."""
    from coremltools.optimize import coreml

    values = {name: weights[name].dequantize().astype(dtype) for name in palettes}
    constants = coreml.get_weights_metadata(package, weight_threshold=1)
    configs, found = {}, {}
    for constant, about in constants.items():
        for name, value in values.items():
            if about.val.shape == value.shape and about.val.tobytes() == value.tobytes():
                configs[constant] = _config(palettes[name], value)
                found[name] = palettes[name]
                break
    if not found:
        return package, found
    config = coreml.OptimizationConfig(op_name_configs=configs)
    return coreml.palettize_weights(package, config), found


def _config(palette: Palette, value: Array) -> Any:
    """Return coremltools' configuration that stores exactly this palette."""
    from coremltools.optimize import coreml

    settings: dict[str, Any] = {"mode": "custom", "weight_threshold": 1}
    entries: dict[bytes, tuple[Array, Array]] = {}  # table and indices of a group, by its values
    if palette.axis is None:
        indices = palette.indices.reshape(palette.shape)
        # coremltools hands over a transposed convolution with its output channels first.
        for v, k in ((value, indices), (np.swapaxes(value, 0, 1), np.swapaxes(indices, 0, 1))):
            entries[np.ascontiguousarray(v).tobytes()] = palette.tables[0], k.reshape(-1)
    else:
        settings |= {"granularity": "per_grouped_channel", "group_size": 1}
        settings["channel_axis"] = palette.axis
        groups = np.moveaxis(value, palette.axis, 0).reshape(palette.indices.shape)
        for group, *entry in zip(groups, palette.tables, palette.indices, strict=True):
            entries[group.tobytes()] = entry[0], entry[1]

    def find(values: Array) -> tuple[Array, Array]:
        return entries[np.ascontiguousarray(values).tobytes()]

    return coreml.OpPalettizerConfig(lut_function=find, **settings)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress, logs and warnings of coremltools, which are about its own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
