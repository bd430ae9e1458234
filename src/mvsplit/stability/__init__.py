"""What a network's stability is measured, watched and told by."""
