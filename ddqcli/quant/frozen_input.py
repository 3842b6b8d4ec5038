"""FrozenInputQuantizer: an activation quantizer as the file holds it, for inference and export."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddqcli.quant.grid import grid_cells
from ddqcli.quant.lookup import nearest_level_table


class FrozenInputQuantizer(nn.Module):
    """Same results, bit for bit, as the ActivationQuantizer whose `table()` it is made from.

    It consists of plain tensor operations that torch.export can follow.

    Attributes:
        bits: bit-width a.
        uniform: True if the levels are 0, 1, 2, ... on the grid. A tie then goes to the even level,
            otherwise to the upper one.
        scale, zero_point: float32 scalar and whole number; value = (level - zero_point) * scale.
        values: float32 [2^a], the level values.
        nearest: uint8 [512], index of the nearest level by half-step (`nearest_level_table`).
    """

    observing = False  # read by the hooks on a layer's input, as of an ActivationQuantizer
    scale: Tensor
    values: Tensor
    nearest: Tensor

    def __init__(self, levels: Tensor, scale: float, zero_point: int) -> None:
        """`levels`: [2^a] ascending whole numbers in 0..255."""
        super().__init__()
        level = levels.float()
        nearest = nearest_level_table(level[None])[0].to(torch.uint8)
        self.bits = len(level).bit_length() - 1
        self.uniform = bool((level == torch.arange(len(level))).all())
        self.zero_point = zero_point
        # Not persistent, so that a loaded model has the float model's state dict.
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32), persistent=False)
        self.register_buffer("values", (level - zero_point) * self.scale, persistent=False)
        self.register_buffer("nearest", nearest, persistent=False)

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {'uniform' if self.uniform else 'learned'} levels"

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.uniform:
            low, high = -self.zero_point, len(self.values) - 1 - self.zero_point
            code = torch.clamp(torch.round(wide / self.scale), low, high)
            code = torch.add(code, wide, alpha=-0.0)  # 0 for -0, NaN where x is not finite
            return (code * self.scale).to(x.dtype)
        cell = grid_cells(wide, self.scale / 2, 2 * self.zero_point + 1)
        index = self.nearest.index_select(0, cell.reshape(-1)).int()
        value = self.values.index_select(0, index).view(x.shape)
        return torch.add(value, wide, alpha=0.0).to(x.dtype)  # NaN where x is not finite
