"""Limits for files that may come from elsewhere: a few bytes must not cost gigabytes or minutes."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mvsplit.utils.errors import UserError

MAX_BYTES = 4 << 20
"""Largest file that describes others: a manifest of 10,000 files has 2 MiB, a run's config 8 KiB."""
MAX_NODES, MAX_DEPTH = 20_000, 50
"""Size and depth of a YAML document, with its aliases expanded; a run's config has 400 nodes."""
NUMBERS, MAX_DIGITS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"), 100
"""Parsing a number takes time that grows with the square of its digits."""
MAX_REASON = 200
"""Characters of a library's message in ours."""
MAX_RESOLVED = 1_000_000
"""Characters of a composed config with its interpolations resolved; a run's has 20,000."""


def read_small(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a small file. (It could also be a device or a pipe.)

    Raises:
        UserError: if there is no such file, or it is larger than the limit.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if len(content) > limit:
        raise UserError(f"{path}: larger than {limit / 2**20:g} MiB, the limit for such a file")
    return content


def parse_json(text: bytes | str, where: str) -> Any:
    """Raises `UserError` for invalid JSON, and for what is nested too deeply."""
    try:
        content = json.loads(text)
    except RecursionError:
        content, shallow = None, False
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({str(error)[:MAX_REASON]})") from None
    else:
        shallow = is_shallow(content)
    if not shallow:
        raise UserError(f"{where}: nested more than {MAX_DEPTH} levels deep")
    return content


def is_shallow(content: Any, levels: int = MAX_DEPTH) -> bool:
    """Whether lists and dictionaries are nested at most so deep; without recursion."""
    below = [content] if isinstance(content, dict | list) else []
    for _ in range(levels):
        children = (child for one in below for child in (one.values() if isinstance(one, dict) else one))
        below = [child for child in children if isinstance(child, dict | list)]
    return not below


def parse_yaml(text: bytes | str, where: str) -> Any:
    """Plain containers from YAML. Raises `UserError` for anything else, and for documents beyond the limits."""
    try:
        return yaml.load(text, Loader=bounded(yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML for a config ({' '.join(str(error).split())[:MAX_REASON]})") from None


def bounded(loader: type[yaml.SafeLoader]) -> type[yaml.SafeLoader]:
    """A YAML loader that raises YAML errors for documents beyond the limits and for values it cannot construct."""

    class Bounded(loader):
        count = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.count += 1
            if self.count > MAX_NODES:
                raise yaml.YAMLError(f"{self.name}: more than {MAX_NODES} values")
            node = super().compose_node(parent, index)
            if isinstance(node, yaml.ScalarNode) and node.tag in NUMBERS and len(node.value) > MAX_DIGITS:
                raise yaml.YAMLError(f"{self.name}: a number of more than {MAX_DIGITS} characters")
            return node

        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None:
                _measure(node, {}, self.name)
            return node

        def get_single_data(self) -> Any:
            try:
                return super().get_single_data()
            except RecursionError:
                raise yaml.YAMLError(f"{self.name}: nested too deeply") from None
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise yaml.YAMLError(f"{self.name}: {error}") from None  # `!!int x`, an impossible date

    return Bounded


def check_interpolations(leaves: Iterable[tuple[str, Any]]) -> None:
    """Check that a composed config does not grow without bound when its interpolations are resolved.

    Args:
        leaves: dotted keys and unresolved values. A key in an interpolation counts as all that it contains.

    Raises:
        UserError: naming the first key that would be too large.
    """
    texts = {key: str(value) for key, value in leaves}
    below: dict[str, list[str]] = {}
    for key in texts:
        for end in range(len(key)):
            if key[end] == ".":
                below.setdefault(key[:end], []).append(key)
    sizes: dict[str, int] = {}

    def size(name: str) -> int:
        if name not in sizes:
            sizes[name] = 0  # cycles are reported elsewhere
            text = texts.get(name, "")
            parts = below.get(name, [])
            if "${" in text:
                parent = name.rpartition(".")[0]
                words = re.findall(r"[\w.]+", text)
                parts = [f"{parent}.{word.strip('.')}".strip(".") if word.startswith(".") else word for word in words]
            sizes[name] = len(text) + sum(size(part) for part in parts if part in texts or part in below)
            if sizes[name] > MAX_RESOLVED:
                raise UserError(f"{name}: its interpolations expand to more than {MAX_RESOLVED} characters")
        return sizes[name]

    for key in texts:
        try:
            size(key)
        except RecursionError:
            raise UserError(f"{key}: its interpolations are nested too deeply") from None


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None], name: str) -> tuple[int, int]:
    """Values and levels of a document with its aliases expanded; each node is visited once."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise yaml.YAMLError(f"{name}: a node contains an alias of itself")
        return found
    known[id(node)] = None  # until all below it is known
    pairs = isinstance(node, yaml.MappingNode)
    children = [child for pair in node.value for child in pair] if pairs else node.value
    below = [_measure(child, known, name) for child in ([] if isinstance(node, yaml.ScalarNode) else children)]
    values, levels = 1 + sum(count for count, _ in below), 1 + max((depth for _, depth in below), default=0)
    if values > MAX_NODES:
        raise yaml.YAMLError(f"{name}: its aliases expand to more than {MAX_NODES} values")
    if levels > MAX_DEPTH:
        raise yaml.YAMLError(f"{name}: nested more than {MAX_DEPTH} levels deep")
    known[id(node)] = values, levels
    return values, levels


def text_lines(path: Path, key: str, limit: int) -> list[str]:
    """Lines of a text file in UTF-8. Only a line feed ends one: a text may contain Unicode's other separators.

    Args:
        path: of the file.
        key: of the config, which names it.
        limit: of its size, in bytes.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        text = read_small(path, limit).decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError:
        raise UserError(f"{key} = {path}: not a text file in UTF-8") from None
    except UserError as error:
        raise UserError(f"{key} = {error}") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]
