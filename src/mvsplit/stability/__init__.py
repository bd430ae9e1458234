"""What is measured of a run's stability, and what is read from it: plain PyTorch, numpy and matplotlib."""
