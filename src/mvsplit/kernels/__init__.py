"""Fused operations, each beside the plain PyTorch formulation it must equal."""
