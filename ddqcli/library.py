"""The library: quantize a float model, train it in a loop of your own, save and load the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from ddqcli import __version__
from ddqcli.artifact.encode import encode_artifact
from ddqcli.artifact.read import decode_model
from ddqcli.artifact.sizes import Sizes
from ddqcli.checkpoint.compiled import uncompiled
from ddqcli.checkpoint.recorded import build_recorded
from ddqcli.data.trees import call
from ddqcli.errors import UsageError, VerificationError
from ddqcli.qat.budget import make_budget
from ddqcli.qat.convert import attach, detach, prepare
from ddqcli.qat.frozen import FrozenModel, freeze
from ddqcli.qat.load import fill, to_torch
from ddqcli.qat.model import QuantizedModel
from ddqcli.qat.rules.registry import make_rule
from ddqcli.quant.level_kinds import LevelKind
from ddqcli.recipe.faults import plain_message
from ddqcli.recipe.schema import Budget, Recipe
from ddqcli.runs.files import write_atomic
from ddqcli.training.optimizers import level_groups, network_groups

__all__ = ["Budget", "load", "parameter_groups", "quantize", "save"]

_META = {"ddq": __version__}  # what the file says about the model


def quantize(
    model: nn.Module,
    *,
    bits: float | None = None,
    budget: Budget | None = None,
    min_bits: int = 1,
    max_bits: int = 8,
    levels: LevelKind = "learned",
    granularity: Literal["layer", "channel"] = "layer",
    act_bits: int | None = None,
    calibration: Iterable[Any] | None = None,
    overrides: Sequence[Mapping[str, Any]] = (),
) -> nn.Module:
    """Attach quantizers to a float model, in place, with bit-widths that keep a budget.

    The model keeps its classes and its forward. Weights are read quantized, and gradients reach the
    float weights behind them and the levels, so any training loop goes on as before. The bit-widths
    stay, and with them the bytes that `save` writes.

    Bits go where they lower the error most. Gradients that the parameters hold, of some batches
    before this call, weigh the error of each layer by its empirical Fisher.

    Args:
        model: a float network with its trained weights.
        bits: average stored bits per quantized value; short for Budget(target_bits=bits).
        budget: a target in bits or in bytes of the file; Budget() gives every layer max_bits.
        min_bits, max_bits: range of a weight's bit-width, 1 to 8.
        levels: "learned" (Eqn 3), "uniform" (Eqn 1) or "power_of_two" (Eqn 2).
        granularity: one set of levels per "layer" or per output "channel".
        act_bits: bit-width of the layers' inputs, 8 for the first and the last layer; None: float.
        calibration: input batches, which set the range of the inputs: each a tensor, a tuple of
            positional arguments, or a dict of keyword arguments. Needed with act_bits.
        overrides: what differs for some layers, as in a recipe: {"match": "conv1", "skip": True}.

    Returns:
        The model.

    Raises BudgetError for a budget that cannot be met and UsageError for arguments or a model that
    do not allow quantization; the model is then as it was. TypeError for what is no network.

    >>> model = ddqcli.quantize(model, bits=4)  # doctest: +SKIP
    """
    _require_network("quantize", model)
    if (bits is None) == (budget is None):
        raise UsageError("Give quantize() either bits or a budget.")
    if budget is not None and budget.target_format != "safetensors":
        raise UsageError("quantize() knows the size of its safetensors file alone.")
    recipe = _recipe(
        budget={"target_bits": bits} if budget is None else budget,
        weights={
            "levels": levels,
            "min_bits": min_bits,
            "max_bits": max_bits,
            "granularity": granularity,
        },
        activations={"bits": act_bits},
        overrides=list(overrides),
        gates={"rule": "fixed"},
        train={"correction": 0},  # in units of the loss, of which nothing is known here
    )
    quantized = prepare(model, recipe)
    if quantized.activations and calibration is None:
        raise UsageError("Give quantize() calibration batches: they set the range of the inputs.")
    resolved = make_budget(quantized, recipe, meta=_META)
    rule = make_rule("fixed", quantized, recipe, resolved, 0, 1)
    if any(t.parameter.grad is not None for t in quantized.tensors):
        rule.watch()
    attach(quantized, recipe)
    try:
        if quantized.activations:
            _calibrate(quantized, calibration or ())
            rule.recount()
        rule.start()
    except BaseException:
        detach(quantized)
        raise
    return model


def parameter_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 1e-4, levels_lr: float = 0.1
) -> list[dict[str, Any]]:
    """Return the parameters of a quantized model in groups for Adam or AdamW.

    Levels need a learning rate of their own: they are positions on a grid of 255 steps, so with a
    rate that suits weights they would not move, and weight decay would pull them to one end.

    Args:
        model: as `quantize` returned it.
        lr: of weights, biases and norms.
        weight_decay: of matrices and kernels; nothing else decays.
        levels_lr: of levels, in steps of the level grid.

    Raises UsageError for a model without quantizers.

    >>> optimizer = torch.optim.AdamW(ddqcli.parameter_groups(model, lr=1e-4))  # doctest: +SKIP
    """
    _require_network("parameter_groups", model)
    quantized = QuantizedModel.of(model)
    network = [{"lr": lr, **group} for group in network_groups(quantized, weight_decay)]
    levels = [{"weight_decay": 0.0, **group} for group in level_groups(quantized, levels_lr)]
    return network + levels


def save(model: nn.Module, path: str | Path) -> Sizes:
    """Write a quantized model as one safetensors file, and compare every bit that is read back.

    The quantizers are found in the model, which may be a copy of the one that was quantized, or
    contain it. Of BatchNorm, the file holds scale and shift (FORMAT.md), so the loaded network's
    outputs may differ from the model's by a few roundings; the model stays as it is.

    Returns:
        The sizes of the file's parts in bytes; a budget in bytes counts `file`.

    Raises UsageError for a model without quantizers or a path that cannot be written, DDQError for
    values that are not finite, and VerificationError for a file that reads differently; nothing is
    then written.

    >>> ddqcli.save(model, "model.safetensors").file  # doctest: +SKIP
    """
    _require_network("save", model)
    path = Path(path)
    frozen = FrozenModel.from_state(freeze(QuantizedModel.of(model)))
    raw, sizes = encode_artifact(
        frozen.quantized,
        frozen.activations,
        frozen.floats,
        frozen.aliases,
        _META,
        frozen.constants,
    )

    def write(temporary: Path) -> None:
        temporary.write_bytes(raw)
        _verify(temporary, frozen, path)

    write_atomic(path, write)
    return sizes


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Fill `model`, the float architecture, with an exported file; return it in eval mode.

    Its weights become the trained values bit for bit, and layers whose inputs were quantized
    quantize them. The file must be of this architecture, name for name. As by `ddq finetune`, half
    precision becomes float32, and torch.compile is taken off: the original network is returned. For
    inference: no gradients pass the inputs' quantizers, and BatchNorm has scale and shift in place
    of statistics.

    Without `model`, the network of torchvision or timm is built that the file of `ddq export`
    names. No code runs that comes with the file.

    Raises UsageError for a file that is none of ddq's or names no such network, VerificationError
    for a damaged one, CheckpointError for one of another network, which leaves the model as it was,
    and TypeError for a `model` that is no network, such as the function that builds it.

    >>> model = ddqcli.load("model.safetensors", torchvision.models.resnet18())  # doctest: +SKIP
    """
    if model is not None:
        _require_network("load", model)
    arrays, tables, meta = decode_model(Path(path))
    tensors = to_torch(arrays)
    if model is None:
        model = build_recorded(Path(path), tensors, meta)
    model, _ = uncompiled(model)
    fill(model, tensors, tables, str(path))
    return model


def _require_network(function: str, model: object) -> None:
    """Raise TypeError for anything but a network, such as the function that builds it."""
    if isinstance(model, nn.Module):
        return
    name = getattr(model, "__name__", "")
    given = f"{name}; pass {name}()" if name and callable(model) else f"a {type(model).__name__}"
    raise TypeError(f"{function}() takes a network, a torch.nn.Module, not {given}.")


def _recipe(**sections: Any) -> Recipe:
    """Return a recipe. Raises UsageError for values that it does not allow."""
    try:
        return Recipe.model_validate(sections)
    except ValidationError as error:
        faults = [f"{fault['loc'][-1]}: {plain_message(fault)}" for fault in error.errors()]
        text = "; ".join(faults)
        raise UsageError(f"quantize() cannot use {text}{'' if text[-1] == '?' else '.'}") from error


def _calibrate(quantized: QuantizedModel, batches: Iterable[Any]) -> None:
    """Fit the input quantizers to what reaches them; inputs that none reaches stay float."""
    with _eval_mode(quantized.model), torch.no_grad():
        for batch in batches:
            for quantizer in quantized.activations.values():
                quantizer.observe_pass()
            call(quantized.model, batch)
    unreached = [name for name, a in quantized.activations.items() if not a.fit()]
    if len(unreached) == len(quantized.activations):
        raise UsageError("The calibration batches reached no layer; give at least one.")
    for name in unreached:
        quantized.keep_input_float(name)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate: a forward pass then changes no statistics. Restores each module's own mode."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _verify(file: Path, frozen: FrozenModel, path: Path) -> None:
    """Raise VerificationError unless the file holds every bit of the frozen model."""
    tensors, tables, _ = decode_model(file)
    stored = tensors | {name: table.values() for name, table in tables.items()}
    expected = frozen.expected()
    different = expected.keys() ^ stored.keys()
    for name in expected.keys() & stored.keys():
        old, new = expected[name], stored[name]
        if (old.dtype, old.shape, old.tobytes()) != (new.dtype, new.shape, new.tobytes()):
            different.add(name)
    if different:
        raise VerificationError(
            f"{path} would differ from the model in {', '.join(sorted(different)[:3])}; "
            "it was not written."
        )
