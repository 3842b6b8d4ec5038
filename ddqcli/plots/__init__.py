"""Matplotlib figures from plain arrays, and their files."""

from ddqcli.plots.backend import MPLBACKEND  # noqa: F401 - matplotlib is first imported there
from ddqcli.plots.bits import (
    MAX_BITS,
    bits_by_layer_figure,
    bits_over_time_figure,
    probabilities_over_time_figure,
)
from ddqcli.plots.channels import channels_figure
from ddqcli.plots.files import for_page, save, svg_of
from ddqcli.plots.histogram import Layer, layer_figure
from ddqcli.plots.layout import HEIGHT, WIDTH
from ddqcli.plots.over_time import (
    error_over_time_figure,
    levels_over_time_figure,
    loss_over_time_figure,
)
from ddqcli.plots.overview import overview_figures
from ddqcli.plots.size_accuracy import size_against_accuracy_figure

__all__ = [
    "HEIGHT",
    "MAX_BITS",
    "WIDTH",
    "Layer",
    "bits_by_layer_figure",
    "bits_over_time_figure",
    "channels_figure",
    "error_over_time_figure",
    "for_page",
    "layer_figure",
    "levels_over_time_figure",
    "loss_over_time_figure",
    "overview_figures",
    "probabilities_over_time_figure",
    "save",
    "size_against_accuracy_figure",
    "svg_of",
]
