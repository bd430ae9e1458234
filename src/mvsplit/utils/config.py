"""Check a composed config before anything is built, and build from it.

There is no second description of what a config may hold: a node's `_target_` names a class, and the class's own
annotated arguments are the schema (`PositiveInt`, `Literal[…]`, …). A class may add a static `check(…)` for values
that must fit together; its arguments are taken from the node by name. Whatever is wrong ends in one `UserError`.

A `_target_` may name classes that `PACKAGES` define, the classes in `EXTERNAL` and the functions in `FUNCTIONS`: a
config file from elsewhere cannot make the program call anything else. A fork that needs another one adds a line there.
"""

import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError

from mvsplit.utils.errors import UserError

PACKAGES = (
    "mvsplit.callbacks.",
    "mvsplit.data.",
    "mvsplit.flow.",
    "mvsplit.models.",
    "mvsplit.training.",
    "mvsplit.utils.loggers.",
)
EXTERNAL = {
    "lightning.pytorch.Trainer",
    "lightning.pytorch.callbacks.DeviceStatsMonitor",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.callbacks.ModelSummary",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.strategies.DDPStrategy",
}
FUNCTIONS = {  # with `_partial_: true`: handed on, not called while building
    "mvsplit.data.digits.write_digits",
    "mvsplit.data.imagenet.unpack_imagenet",
}
HYDRA_KEYS: dict[str, Any] = {
    "_target_": str,
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": typing.Literal["none", "partial", "object", "all"],
}
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain dicts and lists, interpolations resolved.

    Raises:
        UserError: for a missing mandatory value or an interpolation that leads nowhere.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return typing.cast(dict[str, Any], plain)


def check_config(config: dict[str, Any], schema: type, path: str = "") -> None:
    """Check the top-level keys against the schema (a class of annotated fields), then every node below.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    hints = typing.get_type_hints(schema, include_extras=True)
    for key in hints:
        if key not in config:
            raise UserError(f"{path}{key}: missing from the config")
    for key, value in config.items():
        if key not in hints:
            raise UserError(f"{path}{key}: {describe_unknown(key, hints)}")
        if is_dataclass(hints[key]) and isinstance(value, dict):
            check_config(value, typing.cast(type, hints[key]), f"{path}{key}.")
        else:
            check_value(f"{path}{key}", value, hints[key])
    for key in hints:  # in the schema's order: parts before the nodes that repeat them by interpolation
        _check_tree(f"{path}{key}", config[key])


def _check_tree(path: str, value: Any) -> None:
    if isinstance(value, dict):
        # The parts first: their errors are nearer to the key that the user wrote.
        for key, child in value.items():
            _check_tree(f"{path}.{key}", child)
        if "_target_" in value:
            _check_node(path, value)
    elif isinstance(value, list):
        for number, child in enumerate(value):
            _check_tree(f"{path}.{number}", child)
    elif isinstance(value, str) and "${" in value:
        # A composed config is resolved. Building would resolve this one, into a node that was never checked.
        raise UserError(f"{path} = {value}: an interpolation cannot stand here")


def _check_node(path: str, node: dict[str, Any]) -> None:
    target = locate(node["_target_"], path)
    partial = node.get("_partial_", False)
    if not inspect.isclass(target) and partial is not True:
        raise UserError(f"{path}._partial_ = {partial}: true is needed, {node['_target_']} is a function")
    provided: frozenset[str] = getattr(target, "provided", frozenset())  # arguments that the network fills in
    hints, required, open_ended = parameters_of(target)
    for key, hint in HYDRA_KEYS.items():
        if key in node:
            check_value(f"{path}.{key}", node[key], hint)
    given = {key: value for key, value in node.items() if key not in HYDRA_KEYS}
    for key, value in given.items():
        if key not in hints:
            if open_ended and isinstance(key, str) and not key.startswith("_"):  # `_args_` would escape the check
                continue
            raise UserError(f"{path}.{key} = {value!r}: {describe_unknown(key, hints)}")
        if key in provided:
            raise UserError(f"{path}.{key} = {value!r}: comes from the network, it cannot be set here")
        if not (isinstance(value, dict) and "_target_" in value):
            check_value(f"{path}.{key}", value, hints[key])
    if inspect.isclass(target):
        for key in required:
            if key not in given and key not in provided:
                raise UserError(f"{path}.{key}: missing, {target.__name__} needs it")
    check = getattr(target, "check", None)
    if check is not None:
        names = inspect.signature(check).parameters
        if all(name in given for name in names):
            check(**{name: given[name] for name in names})


def locate(name: Any, path: str) -> Callable[..., Any]:
    """The class or function that a `_target_` names, if it is one that configs may name.

    Raises:
        UserError: if it does not exist or is not allowed.
    """
    listed = EXTERNAL | FUNCTIONS
    allowed = [*(f"classes of {package.removesuffix('.')}" for package in PACKAGES), *sorted(listed)]
    refused = UserError(f"{path}._target_ = {name}: allowed are {', '.join(allowed)}")
    if not isinstance(name, str) or not (name in listed or name.startswith(PACKAGES)):
        raise refused
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{path}._target_ = {name}: not found ({error})") from error
    # What a module of ours merely imported (os, torch.load …) is not ours.
    if name not in listed and not (inspect.isclass(target) and f"{target.__module__}.".startswith(PACKAGES)):
        raise refused
    return target


def parameters_of(target: Callable[..., Any]) -> tuple[dict[str, Any], list[str], bool]:
    """Arguments a target takes, with their types; those it requires; whether it takes any others.

    A constructor with `**kwargs` hands them on to the next class above it, whose arguments then count too.
    """
    hints: dict[str, Any] = {}
    required: list[str] = []
    ours = target.__module__.startswith("mvsplit.")
    callables: Iterable[Any] = [target.__init__ if inspect.isclass(target) else target]
    if inspect.isclass(target) and ours:
        callables = [vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c) and c is not object]
    for function in callables:
        types = _type_hints(function)
        open_ended = False
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                open_ended = True
            elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.name != "self":
                hints.setdefault(parameter.name, types.get(parameter.name, Any))
                if parameter.default is parameter.empty and parameter.name not in required:
                    required.append(parameter.name)
        if not open_ended:
            return hints, required, False
    return hints, required, not ours


def _type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}  # an external class whose annotations exist only for type checkers


def check_value(path: str, value: Any, hint: Any) -> None:
    """Check one value against a type.

    Raises:
        UserError: one line with the key, the value and what is allowed.
    """
    try:
        adapter = TypeAdapter(hint, config=_STRICT)
    except (PydanticUserError, SchemaError, TypeError, NameError):
        return  # not a type that data can have: a protocol or another built object
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        problems = list(dict.fromkeys(_allowed(item) for item in error.errors()))
        raise UserError(f"{path} = {value!r}: {' or '.join(problems)}") from None


def _allowed(item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return f"allowed are {context['expected']}"
    if kind == "callable_type" or kind == "is_instance_of":
        return "a node with a _target_ is needed"
    return item["msg"].replace("Input should be", "must be").replace("valid ", "")


def describe_unknown(key: Any, known: Iterable[Any]) -> str:
    """What to tell about a key that is not one of the known."""
    known = [str(name) for name in known if name not in HYDRA_KEYS]
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown key; {hint}allowed are {', '.join(sorted(known))}"


def build(node: Any) -> Any:
    """Build a checked node: plain arguments in, objects out; null gives None.

    Raises:
        UserError: what the class refused.
    """
    if node is None:
        return None
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError | OSError):
            raise cause from None
        name = node.get("_target_") if isinstance(node, dict) else node
        raise UserError(f"{name}: {cause or error}") from error


def build_each(nodes: dict[str, Any] | None) -> list[Any]:
    """Build the entries of a group such as callbacks; null entries are switched off."""
    return [build(node) for node in (nodes or {}).values() if node is not None]
