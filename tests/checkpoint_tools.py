"""What somebody who means harm would put into a checkpoint."""

import hashlib
import json
from pathlib import Path

from mvsplit.training.folder import COMPLETE, MANIFEST


class Canary:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def poison(path: Path, name: str, content: bytes) -> None:
    """Put another file in, with a manifest that vouches for it."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest))
    (path / COMPLETE).write_text(hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest())
