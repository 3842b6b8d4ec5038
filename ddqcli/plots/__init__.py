"""Matplotlib figures made from plain arrays, and their files."""

from ddqcli.plots.layers import Layer, channels_figure, layer_figure, overview_figures
from ddqcli.plots.style import for_page, save, svg_of
from ddqcli.plots.training import (
    bits_by_layer_figure,
    bits_over_time_figure,
    error_over_time_figure,
    levels_over_time_figure,
    loss_over_time_figure,
    size_against_accuracy_figure,
)

__all__ = [
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
    "save",
    "size_against_accuracy_figure",
    "svg_of",
]
