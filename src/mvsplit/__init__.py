"""Mean-variance split residuals for very deep diffusion transformers (arXiv 2605.06169).

Scripts import this package before torch and webdataset, because of the three things it does.
"""

import os

# For how long OpenMP threads spin when they wait for the next small operation, in turns of a loop. On an idle machine
# this is as fast as spinning for ever; beside other load the default made steps many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# WebDataset reads this when it is imported: no shell for `pipe:` addresses, no unpickling of members.
os.environ.setdefault("WDS_SECURE", "1")

# So does the library for gs:// addresses: its newer protocol does not survive the fork of a reading process.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

__version__ = "0.1.0"
