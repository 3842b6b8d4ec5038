"""A finished model as a Core ML package, whose weights are palettes: tables of levels, indices."""
