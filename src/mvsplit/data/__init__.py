"""Images in WebDataset tar shards: shards (write) → index → reader → order → datamodule."""
