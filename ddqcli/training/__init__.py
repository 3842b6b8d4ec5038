"""Algorithm 1: calibration, the training loop, evaluation."""
