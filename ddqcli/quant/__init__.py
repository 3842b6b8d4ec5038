"""The method: levels, gates, fake-quantization. No recipe, no I/O; METHOD.md maps equations to functions."""
