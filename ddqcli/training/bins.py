"""Bin regularization of a whole model: the training term that pulls weights to their levels."""

from __future__ import annotations

import torch

from ddqcli.qat.model import QuantizedModel
from ddqcli.quant.bin_regularization import bin_regularization
from ddqcli.quant.cells import level_values
from ddqcli.quant.grid import LEVEL_BITS
from ddqcli.quant.layout import by_group


def regularize_bins(quantized: QuantizedModel, weight: float) -> None:
    """Add the gradient of `weight` times the sum of `bin_regularization` over all weights.

    Biases and 8 bits are left out: there the levels are the grid itself, and there is nothing to
    pull to. As with weight decay, the term is not part of the loss that a run reports, and every
    rank adds the same gradient to the averaged ones.
    """
    terms = []
    for tensor in quantized.tensors:
        quantizer, parameter = tensor.quantizer, tensor.parameter
        if tensor.kind != "bias" and parameter.requires_grad and LEVEL_BITS not in quantizer.bits:
            levels = level_values(quantizer)
            values = by_group(parameter, quantizer.axis, len(levels)).float()
            terms.append(bin_regularization(values, levels))
    if terms:
        torch.autograd.backward(weight * torch.stack(terms).sum())
