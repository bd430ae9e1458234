"""Studies: `python src/study.py depth|residuals [key=value …]`, and `python src/study.py report FOLDER`.

`depth` asks what depth buys, `residuals` which residual trains best at its own learning rate; keys are explained in
`configs/study_*.yaml`. Repeating the command resumes an interrupted study. `report` writes the tables and figures of
what is there.
"""

import mvsplit  # noqa: F401 (before torch: it sets how idle threads wait)

# isort: split

import sys
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ablate import compose_run, train_here
from mvsplit.data.folders import RESOLVERS
from mvsplit.utils import entry
from mvsplit.utils.config import to_checked
from mvsplit.utils.console import console, info
from mvsplit.utils.errors import UserError

STUDIES = ("depth", "residuals")


def checked(kind: str, cfg: DictConfig) -> Any:
    """The study's plan.

    Raises:
        UserError: for a wrong value, or values that do not fit together.
    """
    from mvsplit.benchmarks import study

    schema, plan = {
        "depth": (study.DepthConfig, study.depth_plan),
        "residuals": (study.ResidualConfig, study.residual_plan),
    }[kind]
    return plan(to_checked(cfg, schema))


def run(kind: str, cfg: DictConfig) -> None:
    """Train what is left, then write the report; exits with 1 if a run failed."""
    plan = checked(kind, cfg)
    from mvsplit.benchmarks import study

    failed = study.run_study(plan, compose_run, train_here)
    if plan.finished():
        report(plan.folder)
    if failed:
        sys.exit(1)


def report(folder: Path) -> None:
    """Write `report/report.md` with tables and figures of a study's finished runs, and show it."""
    from mvsplit.reports.study_report import make_report

    path = make_report(folder)
    console().print(path.read_text(), markup=False, highlight=False, soft_wrap=True)
    info(f"report           {path}")


def command(argv: list[str]) -> str:
    """The study that the arguments name, or `report`.

    Raises:
        UserError: if they name neither.
    """
    word = next((arg for arg in argv[1:] if "=" not in arg and not arg.startswith("-")), None)
    if word not in (*STUDIES, "report"):
        given = f" = {word}: unknown" if word else ": missing"
        raise UserError(f"study{given}; allowed: {', '.join(STUDIES)}, or report FOLDER")
    if word == "report" and len(argv) != 3:
        raise UserError("report: give one folder, as in `python src/study.py report logs/study_depth`")
    return word


if __name__ == "__main__":
    with entry.report_user_errors():
        if sys.argv[1:] in (["-h"], ["--help"]):
            sys.exit(print(__doc__))
        word = command(sys.argv)
        if word == "report":
            report(Path(sys.argv[2]))
            sys.exit()
        sys.argv.remove(word)
    entry.run(partial(run, word), f"study_{word}.yaml", partial(checked, word), RESOLVERS)
