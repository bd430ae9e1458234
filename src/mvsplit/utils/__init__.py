"""What the rest stands on: counter-based randomness, config checks, run folders, the console."""
