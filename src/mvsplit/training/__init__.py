"""Everything that knows Lightning and trains: module, optimiser, strategies, checkpoints."""
