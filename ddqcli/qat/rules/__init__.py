"""Rules that decide the bit-width of every tensor under a budget: one file a rule."""
