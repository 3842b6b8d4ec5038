"""Float model to quantized model: quantizers, byte counting, and the rules that decide bits."""
