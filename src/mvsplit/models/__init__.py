"""Networks as plain `nn.Module`s with typed arguments: usable in a notebook without the rest of the project."""
