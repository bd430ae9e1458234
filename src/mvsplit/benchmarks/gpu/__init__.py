"""The first hour on a GPU, as one command that can be repeated: `python src/bench.py gpu`."""
