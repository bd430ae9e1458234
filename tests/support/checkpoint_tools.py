"""What somebody who means harm would put into a checkpoint."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvsplit.training.checkpoint_format import COMPLETE, MANIFEST


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


class Called:
    """Unpickled, it calls something."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def deflated(path: Path) -> bytes:
    """A zip archive with the same records, compressed."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return content.getvalue()


def claimed(path: Path, count: int, claim: int) -> bytes:
    """What `torch.save` wrote, where a storage claims more values. Both take the same bytes in a pickle."""
    old, new = (b"K" + bytes([n]) if n < 256 else b"J" + n.to_bytes(4, "little") for n in (count, claim))
    content = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(content, "w") as target:
        for name in source.namelist():
            record = source.read(name)
            target.writestr(name, record.replace(old, new) if name.endswith("data.pkl") else record)
    return content.getvalue()
