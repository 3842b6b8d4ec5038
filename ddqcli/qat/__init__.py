"""Float model to quantized model: quantizers, budget, and the rules that decide bits."""
