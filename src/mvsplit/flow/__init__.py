"""Flow matching as pure functions and small dataclasses: path, times, loss, guidance, solvers."""
