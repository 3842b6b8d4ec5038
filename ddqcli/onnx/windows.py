"""The windows of a 2-D convolution in an image, gathered so that it becomes a matrix product."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Windows(NamedTuple):
    """The geometry of a convolution; pairs are (height, width)."""

    image: tuple[int, int]  # H, W
    output: tuple[int, int]  # H', W'
    pads: tuple[int, int, int, int]  # top, left, bottom, right
    kernel: tuple[int, int]  # kh, kw
    strides: tuple[int, int]
    dilations: tuple[int, int]

    @property
    def taps(self) -> int:
        """Pixels in a window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def are_pixels(self) -> bool:
        """True if the windows are the pixels of the image: a 1x1 convolution without strides."""
        return self.taps == 1 and self.image == self.output

    def pixels(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return two arrays whose sum is the pixel of the padded image at each tap of each window.

        int32 [H', 1, kh, 1] and [1, W', 1, kw]; pixels are counted row by row.
        """
        rows, columns = (
            np.arange(self.output[axis])[:, None] * self.strides[axis]
            + np.arange(self.kernel[axis])[None] * self.dilations[axis]
            for axis in (0, 1)
        )  # [H', kh], [W', kw]
        width = self.image[1] + self.pads[1] + self.pads[3]
        rows, columns = (part.astype(np.int32) for part in (rows * width, columns))
        return rows[:, None, :, None], columns[None, :, None, :]
