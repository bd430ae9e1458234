"""Scripts run in a fork of one process that has imported what they need: starting costs their own work alone.

What a test says about starting itself (imports, signals, processes) is tried with `script` and a new interpreter.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["mvsplit", "warm_imports"])


def run(command: list[str], cwd: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run `python SCRIPT argument …` like `subprocess.run`, both streams captured.

    Raises:
        subprocess.TimeoutExpired: if it takes longer; it is killed then.
    """
    streams = [cwd / f".warm_{os.getpid()}.{name}" for name in ("out", "err")]
    process = _CONTEXT.Process(target=_main, args=(command[1:], str(cwd), dict(os.environ), *map(str, streams)))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(command, seconds)
    out, err = (path.read_text() for path in streams)
    for path in streams:
        path.unlink()
    return subprocess.CompletedProcess(command, process.exitcode or 0, out, err)


def _main(argv: list[str], cwd: str, environment: dict[str, str], *streams: str) -> None:
    for number, path in enumerate(streams, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # What was there before is a pipe to the tests' process, or buffered by it.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]  # as in a new interpreter
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
