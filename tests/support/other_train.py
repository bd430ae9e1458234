"""`src/train.py` in which configs may name the classes of `networks.py`; run like it, by the tests here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import train
from mvsplit.data.folders import RESOLVERS
from mvsplit.training import settings
from mvsplit.utils import config, entry

if __name__ == "__main__":
    config.PACKAGES += ("networks.",)
    entry.run(train.main, "train.yaml", settings.checked, RESOLVERS)
