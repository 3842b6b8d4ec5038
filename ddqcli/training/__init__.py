"""Finetuning: calibration, Algorithm 1's training loop, evaluation."""
