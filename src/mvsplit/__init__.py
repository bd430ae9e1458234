"""Mean-variance split residuals for very deep diffusion transformers (arXiv 2605.06169).

Scripts import this package before torch and webdataset, because it sets variables that those read when imported.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvsplit.python import build as build
    from mvsplit.python import compose as compose
    from mvsplit.python import load as load

# How long OpenMP threads spin while they wait for the next operation. On an idle machine this is as fast as spinning
# forever; under load the default makes steps many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# For WebDataset: no shell for `pipe:` addresses, no unpickling of members.
os.environ.setdefault("WDS_SECURE", "1")

# For gs:// addresses: the newer protocol does not survive the fork of a worker process.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """`from mvsplit import load` imports PyTorch, `import mvsplit` does not."""
    if name not in ("build", "compose", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mvsplit import python

    return getattr(python, name)
