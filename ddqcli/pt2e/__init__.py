"""A finished model in int8 for LiteRT and ExecuTorch, both made from one graph of torch.export."""
