"""Tensors in, tensors out: the mathematics, without models or files."""
