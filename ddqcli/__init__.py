"""ddq: finetune a trained PyTorch model under a memory budget with Differentiable Dynamic Quantization (ICML 2021)."""

__version__ = "0.1.0"
