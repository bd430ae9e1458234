"""What `src/bench.py` measures: one module per benchmark."""
