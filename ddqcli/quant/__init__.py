"""DDQ itself: levels, gates, fake-quantize. No recipe, no I/O. METHOD.md maps equations to code."""
