"""Index an image folder `<root>/<class>/…`: each class is like a shard, whose samples are its files."""

import hashlib
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mvsplit.data.faults import FaultPolicy
from mvsplit.data.folders import class_folders
from mvsplit.data.formats import Format
from mvsplit.data.index import Part, ShardIndex, read_index, split
from mvsplit.data.indexing import StoredIndex, index_path, update_index
from mvsplit.data.shard_set import ShardSet
from mvsplit.data.tar_scan import ScannedSample, Shard, columns_of, stamp
from mvsplit.data.tars import MAX_MEMBER, ShardFindings
from mvsplit.utils.errors import UserError


def load_folder_index(
    shards: ShardSet, policy: FaultPolicy | None = None, classes: Sequence[str] | None = None
) -> ShardIndex:
    """The index of an image folder: the stored one, brought up to date.

    Args:
        shards: whose pattern is the folder's name.
        classes: that it may contain, in the order of their numbers; by default its own.

    Raises:
        UserError: if there is nothing to index, or the policy does not tolerate the damage.
    """
    folder, root, form = shards.folder, shards.pattern, shards.form
    files = {f"{root}/{name}": content for name, content in _images(Path(folder, root), form, classes).items()}
    names = list(files)
    labels = {f"{root}/{name}": i for i, name in enumerate(classes)} if classes else {n: i for i, n in enumerate(names)}

    def scan(name: str) -> Part:
        return _scan_class(folder, name, files[name], labels[name], form)

    path = index_path(shards.storage, folder, names, form)
    index = read_index(path, folder)
    former = {shard.name: (shard, columns) for shard, columns in split(index)} if index is not None else {}
    # A new class of the training set moves the numbers of others, in folders that have not changed.
    former = {name: part for name, part in former.items() if (part[1]["label"] == labels.get(name)).all()}
    digests = {name: _digest(Path(folder, name), files[name]) for name in names}
    valid = {name: part for name, part in former.items() if part[0].sha256 == digests.get(name)}
    return update_index(StoredIndex(folder, names, path, valid, former), scan, policy)


def _images(root: Path, form: Format, allowed: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """The images of each class; classes and images sorted, hidden ones left out.

    Raises `UserError` if there are none, or classes that are not allowed.
    """
    suffixes = {f".{suffix}" for suffix in form.members["data"]}
    if not root.is_dir():
        raise UserError(f"data.folder = {root.parent}: contains no folder '{root.name}'")
    classes = class_folders(root)
    for path in classes:
        if allowed is not None and path.name not in allowed:
            raise UserError(f"data: {path} is not a class of the training set")
    found = {
        path.name: tuple(
            sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
        )
        for path in classes
    }
    if not any(found.values()):
        raise UserError(f"data: no images in {root}/<class>/")
    return found


def _scan_class(folder: str, name: str, files: tuple[str, ...], label: int, form: Format) -> Part:
    root = Path(folder, name)
    found = ShardFindings(str(root))
    rows: list[ScannedSample] = []
    whole: list[str] = []
    for file in files:
        try:
            if (size := (root / file).stat().st_size) > MAX_MEMBER:
                found.add("bad_member", f"{file} has {size} bytes; at most {MAX_MEMBER} are allowed")
                continue
            data = (root / file).read_bytes()
        except OSError as error:
            found.add("missing_member", f"{file}: {error.strerror or error}")
            continue
        if (damage := form.inspect(data) if data else "empty file") is not None:
            found.add("undecodable", f"{file} cannot be decoded ({damage})")
            continue
        rows.append(({"data": (0, len(data))}, {"data": zlib.crc32(data)}, label))
        whole.append(file)
    shard = Shard(name, len(files), 0, _digest(root, files), len(rows), tuple(whole), tuple(found))
    return shard, columns_of(rows)


def _digest(root: Path, files: tuple[str, ...]) -> str:
    """Hash of the files' names, sizes and times."""
    digest = hashlib.sha256()
    for file in files:
        with suppress(OSError):
            stat = (root / file).stat()
            digest.update(f"{file} {stat.st_size} {stamp(stat)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
