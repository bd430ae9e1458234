"""Nested settings as one flat table."""

from typing import Any


def flatten(tree: Any, path: str) -> dict[str, Any]:
    """Nested dicts as dotted keys with plain values; a node's own key has the name of its class."""
    if isinstance(tree, dict):
        flat = {path: tree["_target_"].rpartition(".")[2]} if "_target_" in tree else {}
        for key, value in tree.items():
            if key not in ("_target_", "_partial_") and f"{path}.{key}" not in ("model.residual", "data.prepare"):
                flat |= flatten(value, f"{path}.{key}")
        return flat
    if tree is None or (isinstance(tree, str) and "/" in tree):  # not set, or a path of this machine
        return {}
    return {path: tree if isinstance(tree, int | float | str) else str(tree)}


def dotted(content: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys, values unchanged."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= dotted(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat
