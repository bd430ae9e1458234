"""A config as one flat table."""

from typing import Any


def flatten(tree: Any, path: str) -> dict[str, Any]:
    """Nested dicts to dotted keys of numbers, switches and names; a class stands under its node's key."""
    if isinstance(tree, dict):
        flat = {path: tree["_target_"].rpartition(".")[2]} if "_target_" in tree else {}
        for key, value in tree.items():
            if key not in ("_target_", "_partial_") and f"{path}.{key}" not in ("model.residual", "data.prepare"):
                flat |= flatten(value, f"{path}.{key}")
        return flat
    if tree is None or (isinstance(tree, str) and "/" in tree):  # not set, or a path of this machine
        return {}
    return {path: tree if isinstance(tree, int | float | str) else str(tree)}
