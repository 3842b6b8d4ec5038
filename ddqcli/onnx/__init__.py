"""Exported models as ONNX graphs in integer arithmetic, and their check in onnxruntime."""
