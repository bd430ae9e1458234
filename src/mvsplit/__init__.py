"""Mean-variance split residuals for very deep diffusion transformers (arXiv 2605.06169).

Scripts import this package before torch, because of the one thing it does.
"""

import os

# Threads that wait for the next small operation sleep instead of spinning. Spinning gains a little on an idle machine;
# beside any other load it made a step of 64 small blocks on two cores five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
