"""Training and evaluation data as batches on the device."""
