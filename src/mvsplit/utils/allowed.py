"""The allow-list: what configs may name in this checkout beyond what the project ships.

It is the file `configs/local/allowed.yaml`, which git ignores:

    targets: [my_package.callbacks.Heatmap]  # classes that a `_target_` may name
    hydra:                                   # keys below `hydra`, each with its allowed values; null allows any value
      launcher._target_: [hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher]
      launcher.n_jobs: null

Only this checkout's file is read, never one from `--config-dir`, the folder of a run or a checkpoint.
"""

import os
import typing
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import parse_yaml, read_small
from mvsplit.utils.run_dirs import PROJECT_ROOT

FILE = PROJECT_ROOT / "configs" / "local" / "allowed.yaml"
MORE = f"more can be allowed in {FILE.relative_to(PROJECT_ROOT)}"
ClassName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")]
KeyName = Annotated[str, StringConstraints(pattern=r"^\w+(\.\w+)*$")]


class OwnersList(BaseModel):
    """Content of the file."""

    model_config = ConfigDict(strict=True, extra="forbid")
    targets: list[ClassName] = []
    hydra: dict[KeyName, Annotated[list[str | int | float | bool], Len(1)] | None] = {}

    def hydra_type(self, key: str) -> Any:
        """Type of the values allowed for a key below `hydra`; None if the key is not listed."""
        if key not in self.hydra:
            return None
        values = self.hydra[key]
        return Any if values is None else Literal[tuple(values)]


def owners_list() -> OwnersList:
    """The list of this checkout; empty without a file.

    Raises:
        UserError: naming the file and the entry that is wrong.
    """
    if not os.path.lexists(FILE):
        return OwnersList()
    try:
        return OwnersList.model_validate(parse_yaml(read_small(FILE), str(FILE)) or {})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        value = repr(typing.cast(object, first["input"]))[:200]
        raise UserError(f"{FILE}: {place} = {value}: {first['msg']}") from None
