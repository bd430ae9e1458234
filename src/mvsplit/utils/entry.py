"""The way into every script: compose with Hydra, run, and turn what the user got wrong into one line."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mvsplit.utils import hydra_node
from mvsplit.utils.config import describe_unknown, locate, parameters_of
from mvsplit.utils.errors import AgreedError, UserError
from mvsplit.utils.runs import PROJECT_ROOT, register_resolvers


def run(main: Callable[[DictConfig], Any], config_name: str, planning: bool = False) -> None:
    """Call `main(cfg)` with the config composed from the command line.

    A user's mistake prints `error: …` and exits with 2; Ctrl-C exits with 130; a defect of ours keeps its traceback.
    """
    register_resolvers(planning)
    with told():
        sys.argv = plain_overrides(sys.argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # we tell what matters ourselves
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # their tables
    for expected in ("Checkpoint directory .* exists", "The dirpath has changed", "The number of training batches",
                     ".*does not have many workers", "When saving the DeepSpeed"):  # fmt: skip
        warnings.filterwarnings("ignore", message=expected)
    # Libraries talking to each other about their own futures.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|lightning\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.|lightning\.|deepspeed\.")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through: they are told here

    @functools.wraps(main)
    def job(cfg: DictConfig) -> Any:
        with told():  # inside Hydra's job, which would add lines of its own
            return main(cfg)

    with told(), hydra_node.checked():
        if get_args_parser().parse_known_args()[0].experimental_rerun is not None:
            raise UserError("--experimental-rerun: not supported, it would run whatever a pickle holds")
        hydra.main(version_base="1.3", config_path=str(PROJECT_ROOT / "configs"), config_name=config_name)(job)()


def plain_overrides(argv: Sequence[str]) -> list[str]:
    """Make `logger=null` and its like, and braces in names of shards, work as they are typed.

    Hydra calls leaving out a group with a default `~logger`.
    """
    for key in ("data.train", "data.val"):
        if any(one.startswith(f"{key}=") and two.startswith(f"{key}=") for one, two in pairwise(argv)):
            raise UserError(f"{key}: given several times; quote it, or the shell spells out {{000..146}} itself")
    groups = {f"{group}=null": f"~{group}" for group in ("callbacks", "logger")}
    absent = {f"{group}=null" for group in ("debug", "experiment", "hparams_search")}  # what they are anyway
    return [_quoted(groups.get(arg, arg)) for arg in argv if arg not in absent]


def _quoted(arg: str) -> str:
    """Let data.train=train-{000..146}.tar be typed as it is: braces are Hydra's own unless they are quoted."""
    key, _, value = arg.partition("=")
    unquoted = key.lstrip("+") in ("data.train", "data.val") and "{" in value and value[0] not in "'\""
    return f'{key}="{value}"' if unquoted else arg


@contextmanager
def told() -> Iterator[None]:
    """Turn a user's mistake into one line and an exit status."""
    try:
        yield
    except AgreedError as error:
        sys.exit(fail(str(error)) if getattr(rank_zero_only, "rank", 0) == 0 else 2)
    except (ValueError, HydraException, OmegaConfBaseException, MisconfigurationException, OSError) as error:
        if not is_users(error):
            raise
        sys.exit(fail(explain(error)))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(fail(f"data.num_workers: a reading process was ended from outside ({str(error).splitlines()[0]})"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except SIGTERMException:  # Lightning's, outside training; it would exit with 0
        sys.exit(143)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's answer to Ctrl-C, with 1
            sys.exit(130)
        raise


def exit_status(error: BaseException) -> int:
    """What the process exits with when the error ends it, see `told`."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SIGTERMException):
        return 143
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    told_as_mistake = (ValueError, HydraException, OmegaConfBaseException, MisconfigurationException, OSError)
    return 2 if isinstance(error, told_as_mistake) and is_users(error) else 1


def fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def is_users(error: BaseException) -> bool:
    """Whether the error speaks to the user: raised on purpose by us or a library's check, not by a slip of code."""
    if isinstance(error, UserError) or not isinstance(error, ValueError):
        return True
    # A ValueError of ours carries its message; one from deep inside a library is a defect unless it is Lightning's.
    frame = error.__traceback__
    last = ""
    while frame is not None:
        last, frame = frame.tb_frame.f_globals.get("__name__", ""), frame.tb_next
    return last.startswith(
        ("mvsplit.", "__main__", "train", "eval", "sample", "encode", "lightning.", "hydra.", "omegaconf.")
    )


def explain(error: BaseException) -> str:
    """One line that names the key and what is allowed."""
    if isinstance(error, MissingConfigException):
        options = f"; allowed are {', '.join(sorted(error.options))}" if error.options else ""
        return f"{str(error).splitlines()[0]}{options}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not a key=value override"
    if isinstance(error, ConfigCompositionException):
        cause = error.__cause__
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
            key, node = str(cause.key), cause.parent_node
            try:
                known = parameters_of(locate(node["_target_"], str(cause.full_key)))[0] if "_target_" in node else {}
            except UserError as refused:
                return str(refused)
            if key in known:
                return f"{cause.full_key}: not in the config file; give it as +{cause.full_key}=…"
            return f"{cause.full_key}: {describe_unknown(key, dict.fromkeys(node))}"
        return str(error).splitlines()[0] + (f" ({str(cause).splitlines()[0]})" if cause else "")
    if isinstance(error, OmegaConfBaseException):
        cause = error.__cause__
        if isinstance(cause, UserError):
            return str(cause)
        return str(error).splitlines()[0].removeprefix("UserError raised while resolving interpolation: ")
    if str(error).startswith("Caught "):  # raised in a reading process
        return str(error).splitlines()[-1].partition("UserError: ")[2] or str(error).splitlines()[-1]
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
