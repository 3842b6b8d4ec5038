"""Exported models as ONNX graphs in integers, and their check in onnxruntime."""
