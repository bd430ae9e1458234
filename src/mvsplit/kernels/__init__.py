"""Fused operations, each beside its reference in plain PyTorch."""
