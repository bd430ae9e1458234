"""Check a composed config before anything is built, and build from it.

There is no second description of what a config may contain: a node's `_target_` names a class, and the class's own
annotated arguments are the schema (`PositiveInt`, `Literal[…]`, …). A class may add a static `check(…)` for values
that must fit together; its arguments are taken from the node by name. Any mistake raises one `UserError`.

A `_target_` may name classes defined in `PACKAGES`, the classes in `EXTERNAL`, the functions in `FUNCTIONS` and the
classes in the allow-list (`allowed.py`). A config file from elsewhere cannot call anything else.
"""

import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal

import hydra
import yaml
from annotated_types import Ge, Lt
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError

from mvsplit.utils.allowed import MORE, owners_list
from mvsplit.utils.errors import UserError

Seed = Annotated[int, Ge(0), Lt(1 << 63)]

PACKAGES = (
    "mvsplit.callbacks.",
    "mvsplit.data.",
    "mvsplit.evaluation.dinov2.",
    "mvsplit.evaluation.feature_networks.",
    "mvsplit.flow.",
    "mvsplit.models.",
    "mvsplit.stability.thresholds.",
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
FUNCTIONS = {  # with `_partial_: true`: passed as arguments, not called while building
    "mvsplit.data.digits.write_digits",
    "mvsplit.data.imagenet.unpack_imagenet",
}
NOT_SUPPORTED = {
    "trainer.max_epochs": "trainer.max_steps",
    "trainer.min_epochs": "trainer.max_steps",
    "trainer.limit_train_batches": "trainer.max_steps",
    "trainer.overfit_batches": "data.overfit_samples",
}
"""Lightning's keys that are not supported, because runs are counted in optimiser steps, and what to use instead."""
STRICTER: dict[str, dict[str, Any]] = {
    "lightning.pytorch.Trainer": {
        "max_steps": PositiveInt,
        "devices": PositiveInt | list[NonNegativeInt] | Literal["auto"],
        "num_nodes": PositiveInt,
        "precision": Any,  # depends on the strategy: `settings.check_together`
        "accumulate_grad_batches": PositiveInt,
        "val_check_interval": PositiveInt,
        "log_every_n_steps": PositiveInt,
        "gradient_clip_val": NonNegativeFloat | None,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": Literal[False],
    }
}
"""Types that replace a class's own; checked before its module is imported."""
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
        UserError: for a missing mandatory value or an interpolation that cannot be resolved.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        line = str(error).splitlines()[0]
        ours = line.partition("UserError raised while resolving interpolation: ")[2]  # from one of our resolvers
        raise UserError(ours or f"{error.full_key or 'config'}: {line}") from error
    assert isinstance(plain, dict)
    return typing.cast(dict[str, Any], plain)


def to_yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def check_config(config: dict[str, Any], schema: type, path: str = "") -> None:
    """Check the top-level keys against the schema (a class of annotated fields), then every node below.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    hints = typing.get_type_hints(schema, include_extras=True)
    for key in hints:
        if key not in config and not hasattr(schema, key):  # keys with a default: some saved runs are older
            raise UserError(f"{path}{key}: missing from the config")
    for key, value in config.items():
        if key not in hints:
            raise UserError(f"{path}{key}: {describe_unknown(key, hints)}")
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise UserError(f"{path}{key} = {value!r}: must be a group of keys")
            check_config(value, typing.cast(type, hints[key]), f"{path}{key}.")
        else:
            check_value(f"{path}{key}", value, hints[key])
    for key in hints:  # in the schema's order: parts come before the nodes that include them by interpolation
        check_tree(f"{path}{key}", config.get(key))


def to_checked(cfg: DictConfig, schema: type) -> dict[str, Any]:
    """`to_plain` and `check_config` in one."""
    config = to_plain(cfg)
    check_config(config, schema)
    return config


def check_tree(path: str, value: Any) -> None:
    """Check every node in a value against the class that it names.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    if isinstance(value, dict):
        # Children first: their errors are closer to the key that the user wrote.
        for key, child in value.items():
            check_tree(f"{path}.{key}", child)
        if "_target_" in value:
            _check_node(path, value)
    elif isinstance(value, list):
        for number, child in enumerate(value):
            check_tree(f"{path}.{number}", child)
    elif isinstance(value, str) and "${" in value:
        # The config is already resolved. Building would resolve this one into a node that was never checked.
        raise UserError(f"{path} = {value}: an interpolation is not allowed here")


def _check_node(path: str, node: dict[str, Any]) -> None:
    stricter = STRICTER.get(str(node["_target_"]), {})
    for key, hint in stricter.items():
        if key in node:
            check_value(f"{path}.{key}", node[key], hint)
    target = locate(node["_target_"], path)
    partial = node.get("_partial_", False)
    if not inspect.isclass(target) and partial is not True:
        raise UserError(f"{path}._partial_ = {partial}: must be true, since {node['_target_']} is a function")
    provided: frozenset[str] = getattr(target, "provided", frozenset())  # arguments that the network supplies
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
            raise UserError(f"{path}.{key} = {value!r}: supplied by the network and cannot be set here")
        if key not in stricter and not (isinstance(value, dict) and "_target_" in value):
            check_value(f"{path}.{key}", value, hints[key])
    if inspect.isclass(target):
        for key in required:
            if key not in given and key not in provided:
                raise UserError(f"{path}.{key}: missing; {target.__name__} needs it")
    check = getattr(target, "check", None)
    if check is not None:
        names = inspect.signature(check).parameters
        if all(name in given for name in names):
            check(**{name: given[name] for name in names})


def locate(name: Any, path: str) -> Callable[..., Any]:
    """The class or function that a `_target_` names.

    Raises:
        UserError: if it does not exist or is not allowed.
    """
    owners = set(owners_list().targets)
    listed = EXTERNAL | FUNCTIONS | owners
    allowed = [*(f"a class of {package.removesuffix('.')}" for package in PACKAGES), *sorted(listed)]
    refused = UserError(f"{path}._target_ = {name}: must be {', '.join(allowed)}; {MORE}")
    if not isinstance(name, str) or not (name in listed or name.startswith(PACKAGES)):
        raise refused
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{path}._target_ = {name}: not found ({error})") from error
    # What our modules merely import (os, torch.load …) is not allowed.
    if name not in listed and not (inspect.isclass(target) and f"{target.__module__}.".startswith(PACKAGES)):
        raise refused
    if name in owners and not inspect.isclass(target):
        raise UserError(f"{path}._target_ = {name}: must be a class; the allow-list cannot name functions")
    return target


def parameters_of(target: Callable[..., Any]) -> tuple[dict[str, Any], list[str], bool]:
    """Arguments of a target.

    A constructor with `**kwargs` passes them to the next class in the MRO, whose arguments are then included.

    Returns:
        The types by name, the required names, and whether other names are accepted.
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
        return  # not a type that YAML can hold: a protocol or another built object
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        problems = list(dict.fromkeys(_allowed(item) for item in error.errors()))
        if len(problems) > 1:
            each = [problem.removeprefix("must be ") for problem in problems]
            problems = [f"must be {', '.join(each[:-1])} or {each[-1]}"]
        raise UserError(f"{path} = {value!r}: {problems[0]}") from None


def _allowed(item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "callable_type" or kind == "is_instance_of":
        return "must be a node with a _target_"
    return (
        item["msg"].replace("Input should be", "must be").replace("a valid integer", "an integer").replace("valid ", "")
    )


def describe_unknown(key: Any, known: Iterable[Any]) -> str:
    """Message for a key that is not among the known ones."""
    known = [str(name) for name in known if name not in HYDRA_KEYS]
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown key; {hint}allowed: {', '.join(sorted(known))}"


def build(node: Any) -> Any:
    """Build the object that a checked node describes; null gives None.

    Raises:
        UserError: if the class rejects its arguments.
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
    """Build the entries of a group such as callbacks; null entries are left out."""
    return [build(node) for node in (nodes or {}).values() if node is not None]
