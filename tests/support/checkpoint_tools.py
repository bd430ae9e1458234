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


NESTED = b")q\x00" + b"h\x00\x86q\x00" * 60
"""A tuple of two tuples of two …: 2^60 of them to whoever looks at all."""


def _text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def _stored(key: bytes) -> bytes:
    return b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + key + _text("cpu") + b"K\x01tQ"


nested_storage = b"\x80\x02" + _stored(NESTED) + b"."
"""Containers with a storage that has such a tuple for a name."""
nested_encoding = b"\x80\x02c_codecs\nencode\n(" + _text("a") + NESTED + b"tR."
"""Bytes that are encoded as such a tuple says."""


def tensor_of(size: bytes) -> bytes:
    """A tensor of the one value that is stored, with these opcodes for size and stride."""
    tuples = b"(" + size + b"t(" + size + b"t"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + _stored(_text("0")) + b"K\x00" + tuples + b"\x89}tR"
    return b"\x80\x02}" + _text("a") + made + b"s."


def hand_made(content: bytes) -> Callable[[Path], bytes]:
    """A file of `torch.save` whose containers are written by hand, with one stored value."""

    def make(file: Path) -> bytes:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model/data.pkl", content)
            archive.writestr("model/data/0", b"\0" * 4)
        return file.read_bytes()

    return make


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
