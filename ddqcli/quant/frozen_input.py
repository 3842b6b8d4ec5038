"""A layer's input quantizer as a file holds it: for inference, of plain tensor operations that torch.export can follow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddqcli.quant.grid import grid_cells
from ddqcli.quant.lookup import nearest_level_table


class FrozenInputQuantizer(nn.Module):
    """Gives the same bits as the ActivationQuantizer whose `table()` it is made of.

    Attributes:
        bits: bit-width a.
        uniform: whether the levels are 0, 1, 2, ... on the grid; what lies half-way between two then goes to the even one,
            and with any other levels to the upper one.
        scale, zero_point: float32 scalar and whole number; value = (level - zero_point) * scale.
        values: float32 [2^a], the level values.
        nearest: uint8 [512], the index of the nearest level for each half-step of the grid, see `nearest_table`.
    """

    observing = False  # as the hooks of a converted layer ask it
    scale: Tensor
    values: Tensor
    nearest: Tensor

    def __init__(self, levels: Tensor, scale: float, zero_point: int) -> None:
        """`levels`: [2^a] ascending whole numbers in 0..255."""
        super().__init__()
        level = levels.float()
        self.bits = len(level).bit_length() - 1
        self.uniform = bool((level == torch.arange(len(level))).all())
        self.zero_point = zero_point
        # Not persistent, so that a loaded model has the state dict of the float one.
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.register_buffer("values", (level - zero_point) * self.scale, persistent=False)
        self.register_buffer(
            "nearest", nearest_level_table(level[None])[0].to(torch.uint8), persistent=False
        )

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {'uniform' if self.uniform else 'learned'} levels"

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.uniform:
            low, high = -self.zero_point, len(self.values) - 1 - self.zero_point
            code = torch.clamp(torch.round(wide / self.scale), low, high)
            code = torch.add(
                code, wide, alpha=-0.0
            )  # makes -0 in the code 0, and NaN or an infinity NaN
            return (code * self.scale).to(x.dtype)
        cell = grid_cells(wide, self.scale / 2, 2 * self.zero_point + 1)
        index = self.nearest.index_select(0, cell.reshape(-1)).int()
        value = self.values.index_select(0, index).view(x.shape)
        return torch.add(value, wide, alpha=0.0).to(x.dtype)  # NaN where x is NaN or infinite
