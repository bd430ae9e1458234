"""The entry of every script: compose the config with Hydra, run, and report a user's mistake in one line."""

import functools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from mvsplit.utils import hydra_node, sweeps
from mvsplit.utils.config import NOT_SUPPORTED, check_tree, describe_unknown, to_plain
from mvsplit.utils.errors import AgreedError, UserError
from mvsplit.utils.launch import set_rank
from mvsplit.utils.resolvers import register_resolvers
from mvsplit.utils.run_dirs import PROJECT_ROOT

EXTRAS = ("optuna", "submitit")
"""Extras in pyproject that bring plugins of Hydra."""


def run(
    main: Callable[[DictConfig], Any],
    config_name: str,
    check: Callable[[DictConfig], object],
    of_data: Mapping[str, Callable[..., Any]],
    planning: bool = False,
) -> None:
    """Call `main(cfg)` with the config composed from the command line, after `check(cfg)`.

    A user's mistake prints `error: …` and exits with 2. Ctrl-C exits with 130. A bug keeps its traceback.
    A mistake in the config is reported before any folder is made, and before PyTorch is imported.

    Args:
        main: the script's work.
        config_name: of the file in `configs/`.
        check: called with a config in which the run's folder is not chosen yet.
        of_data: see `register_resolvers`.
        planning: see `register_resolvers`.
    """
    set_rank()
    prepare = functools.partial(register_resolvers, of_data, planning)
    prepare()
    threading.excepthook = _in_a_thread
    with report_user_errors():
        sys.argv = plain_overrides(sys.argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through: they are reported here

    def check_job(cfg: DictConfig) -> None:
        # Overrides first: their classes may be quick to import.
        typed = {override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task}
        groups = {key.partition(".")[0].partition("/")[0] for key in typed}
        for key, value in to_plain(cfg).items():
            if key in groups:
                check_tree(str(key), value)
        check(cfg)
        _quieten()  # before Hydra sets up logging

    @functools.wraps(main)
    def job(cfg: DictConfig) -> Any:
        with sweeps.job(), report_user_errors():  # inside Hydra's job, which would add lines of its own
            return main(cfg)
        return None  # a failed job, of a sweep that continues

    with report_user_errors():
        args = get_args_parser().parse_known_args()[0]
        if args.experimental_rerun is not None:
            raise UserError("--experimental-rerun: not supported: it would run code from a pickle")
        shows = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
        with sweeps.table_at_end(), hydra_node.checked(None if shows else check_job, prepare):
            hydra.main(version_base="1.3", config_path=str(PROJECT_ROOT / "configs"), config_name=config_name)(job)()


def _quieten() -> None:
    import lightning.pytorch  # noqa: F401 (which sets the level of its logger, and filters, when it is imported)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # their tables
    for expected in ("Checkpoint directory .* exists", "The number of training batches",
                     ".*does not have many workers", "predict returned None", "Total length of `DataLoader`",
                     "When saving the DeepSpeed"):  # fmt: skip
        warnings.filterwarnings("ignore", message=expected)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # one line per image with odd metadata
    # Libraries warning each other.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|lightning\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.|lightning\.|deepspeed\.")


def _in_a_thread(args: threading.ExceptHookArgs) -> None:
    """Ignore errors in TensorBoard's thread: its writer raises them again when the next value is logged."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(args)


def plain_overrides(argv: Sequence[str]) -> list[str]:
    """Accept overrides that Hydra refuses: `logger=null` for `~logger`, and unquoted braces in names of shards."""
    for key in ("data.train", "data.val"):
        if any(one.startswith(f"{key}=") and two.startswith(f"{key}=") for one, two in pairwise(argv)):
            raise UserError(f"{key}: given several times; quote it, or the shell expands {{000..146}}")
    # Added, so that our check refuses them with the key to use instead; Hydra would only find them unknown.
    argv = [f"+{arg}" if arg.partition("=")[0] in NOT_SUPPORTED else arg for arg in argv]
    groups = {f"{group}=null": f"~{group}" for group in ("callbacks", "logger")}
    absent = {
        f"{group}=null" for group in ("debug", "experiment", "hparams_search", "features", "protocol")
    }  # the default
    if any(arg.startswith("protocol=") and arg != "protocol=null" for arg in argv):  # which may choose one
        groups["autoencoder=null"] = "~autoencoder"
    elif not any(arg.endswith("encode.py") for arg in argv[:1]):  # which always has one
        absent.add("autoencoder=null")
    return [_quoted(groups.get(arg, arg)) for arg in argv if arg not in absent]


def _quoted(arg: str) -> str:
    """Quote data.train=train-{000..146}.tar: Hydra would parse the braces."""
    key, _, value = arg.partition("=")
    unquoted = key.lstrip("+") in ("data.train", "data.val") and "{" in value and value[0] not in "'\""
    return f'{key}="{value}"' if unquoted else arg


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Report a user's mistake in one line, and exit with its status."""
    try:
        yield
    except AgreedError as error:
        from lightning.pytorch.utilities import rank_zero_only

        sys.exit(fail(str(error)) if getattr(rank_zero_only, "rank", 0) == 0 else 2)
    except Exception as error:
        if is_users(error):
            sys.exit(fail(explain(error)))
        if not isinstance(error, RuntimeError) or "DataLoader worker" not in str(error):
            raise
        sys.exit(fail(f"data.num_workers: a reading process was killed ({str(error).splitlines()[0]})"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except _lightnings("SIGTERMException"):  # outside of training, where Lightning exits with 0
        sys.exit(143)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's answer to Ctrl-C, with 1
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        raise


def exit_status(error: BaseException) -> int:
    """Exit status of a process that the error ends, see `report_user_errors`."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, _lightnings("SIGTERMException")):
        return 143
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 2 if is_users(error) else 1


def _lightnings(name: str) -> tuple[type[BaseException], ...]:
    """An exception class of Lightning; empty if it is not imported, so cannot have been raised."""
    found = getattr(sys.modules.get("lightning.pytorch.utilities.exceptions"), name, None)
    return (found,) if found else ()


def fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def is_users(error: BaseException) -> bool:
    """Whether the error is about the user's input: raised by a check of ours or of a library, not by a bug."""
    spoken = (UserError, HydraException, OmegaConfBaseException, OSError, YAMLError)
    if isinstance(error, (spoken, _lightnings("MisconfigurationException"))):
        return True
    if not isinstance(error, ValueError):
        return False
    # A ValueError from deep inside a library is a bug, unless Lightning or Hydra raised it.
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
        options = f"; allowed: {', '.join(sorted(error.options))}" if error.options else ""
        extra = next((extra for extra in EXTRAS if f"/{extra}" in str(error.missing_cfg_file)), None)
        install = f"; for this one: pip install -e '.[{extra}]'" if extra else ""
        return f"{str(error).splitlines()[0]}{options}{install}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not a key=value override"
    if isinstance(error, ConfigCompositionException):
        cause = error.__cause__
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
            node = cause.parent_node
            # The arguments of the node's class are known only once it is imported.
            add = f"; other arguments of its class are given as +{cause.full_key}=…" if "_target_" in node else ""
            return f"{cause.full_key}: {describe_unknown(cause.key, node)}{add}"
        return str(error).splitlines()[0] + (f" ({str(cause).splitlines()[0]})" if cause else "")
    if isinstance(error, OmegaConfBaseException):
        cause = error.__cause__
        if isinstance(cause, UserError):
            return str(cause)
        return str(error).splitlines()[0].removeprefix("UserError raised while resolving interpolation: ")
    if str(error).startswith("Caught "):  # raised in a worker process
        return str(error).splitlines()[-1].partition("UserError: ")[2] or str(error).splitlines()[-1]
    if isinstance(error, OSError) and error.filename:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return f"{name}: {error.strerror}"
    return str(error)
