"""One split of a data set as it is stored: its shards, and the small files beside them."""

import json
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from mvsplit.data.captions import NULL, CaptionStates
from mvsplit.data.formats import Format, Manifest
from mvsplit.data.remote import is_remote
from mvsplit.data.storage import Storage, expand_braces
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import is_shallow

INFO = "_info.json"
"""Name of the file in which the publisher of a set lists how many samples its shards contain."""
MAX_SAMPLES = 1 << 20
"""Largest credible number of samples in a shard: some gigabytes."""
MAX_JSON = 1 << 26
"""Largest manifest (and the like) that is read, in bytes: half a million shards."""


class ShardSet:
    """The shards that a pattern names in a folder or at an address, and the files beside them, each read once."""

    def __init__(self, storage: Storage, folder: str, pattern: str, form: Format) -> None:
        self.storage, self.pattern, self.form = storage, pattern, form
        self.remote = is_remote(folder)
        # The common prefix of the shards' locations.
        self.folder = folder.rstrip("/") if self.remote else str(Path(folder).absolute())

    @cached_property
    def manifest(self) -> Manifest | None:
        """What `src/encode.py` wrote about the set, if it did."""
        content = _read_json(self.beside(f"{set_name(self.pattern)}.manifest.json"))
        return content if isinstance(content, dict) else None

    @cached_property
    def published(self) -> dict[str, int]:
        """Samples per shard, by name, from the `_info.json` of sets on the Hugging Face Hub; empty without one."""
        content = _read_json(self.beside(INFO)) if self.remote else None
        splits = content.get("splits") if isinstance(content, dict) else None
        counts: dict[str, int] = {}
        for split in splits.values() if isinstance(splits, dict) else ():
            listed = split if isinstance(split, dict) else {}
            names, lengths = listed.get("filenames"), listed.get("shard_lengths")
            if isinstance(names, list) and isinstance(lengths, list) and len(names) == len(lengths):
                counts |= {
                    name: n
                    for name, n in zip(names, lengths, strict=True)
                    if isinstance(name, str) and type(n) is int and 0 <= n <= MAX_SAMPLES
                }
        return counts

    def beside(self, name: str) -> Path:
        """A small file that may exist beside the shards, downloaded if they are remote."""
        location = f"{self.folder}/{name}"
        if self.remote:
            self.storage.refresh(location)
        return self.storage.cached(location)

    def names(self) -> list[str]:
        """Names of the shards; with wildcards also of those that the manifest names but that do not exist.

        Raises:
            UserError: if there are others, or `src/encode.py` has not finished them.
        """
        folder = self.folder
        names = [location.removeprefix(f"{folder}/") for location in self.storage.expand(folder, self.pattern)]
        for begun in {name.rpartition("-")[0] for name in names if Path(folder, f".encode/{name}.json").exists()}:
            if not Path(folder, f"{begun}.manifest.json").exists():
                raise UserError(f"data.folder = {folder}: src/encode.py has not finished '{begun}'; run it again")
        if expand_braces(self.pattern) != [self.pattern] or not any(c in self.pattern for c in "*?["):
            return names
        shards = (self.manifest or {}).get("shards")
        listed = [str(s.get("name")) for s in shards if isinstance(s, dict)] if isinstance(shards, list) else []
        listed = [name for name in listed if fnmatch(name, self.pattern) and "/" not in name]
        if listed and (others := sorted(set(names) - set(listed))):
            raise UserError(f"data: {folder}/{others[0]} is not listed in {set_name(self.pattern)}.manifest.json")
        return sorted({*names, *listed})


def read_captions(text: CaptionStates, sets: Sequence[ShardSet], parts: Iterable[set[str]]) -> None:
    """Read what is stored of the captions' states beside the shards, the same for all sets.

    Args:
        sets: the training set, and perhaps the validation set.
        parts: that samples have, of each set whose index is known.

    Raises:
        UserError: if they have none, or they do not fit each other.
    """
    first = sets[0]
    text.describe(first.manifest, first.folder)
    for other in sets[1:]:
        if (other.manifest or {}).get("text") != (first.manifest or {}).get("text"):
            raise UserError(f"data.val = {other.pattern}: its captions were not encoded as those of data.train")
    if any(known and "text" not in known for known in parts):
        raise text.missing(first.folder)
    text.read_null(first.beside(NULL))


def set_name(pattern: str) -> str:
    """The start of the names of the files beside the shards: `train` for `train-*.tar` and `train-{000..146}.tar`."""
    return re.sub(r"[-_.]?(\{.*\}|[*?\d]+)?(\.tar)?$", "", pattern.rpartition("/")[2]) or "set"


def own_index(pattern: str) -> str:
    """Name of the index that `src/encode.py` writes beside the shards."""
    return f"{set_name(pattern)}.index.safetensors"


def _read_json(path: Path) -> Any:
    """The content of a file that may come from anywhere; None if there is none, or it is not JSON of credible depth."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size <= MAX_JSON else None
        return content if is_shallow(content) else None
    except (OSError, ValueError, RecursionError):
        return None
