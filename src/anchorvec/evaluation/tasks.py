"""The kinds of tasks that are read from folders and scored item by item."""

from pathlib import Path

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.retrieval import RETRIEVAL
from anchorvec.evaluation.task_kind import LocalData, TaskKind
from anchorvec.files import user_path

KINDS: list[TaskKind] = [
    RETRIEVAL,
]
"""Where a folder, or a task of mteb, fits several, the first counts."""


def load_folder(folder: str | Path) -> LocalData:
    """The test data in `folder`, whichever kind it is of, named after it; a leading `~` is the home folder.

    Raises AnchorvecError for a folder that is not there or of no known kind, and for data that cannot be used.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise AnchorvecError(f"{folder}: there is no such folder; name one in BEIR layout")
    for kind in KINDS:
        if kind.recognises(folder):
            data: LocalData = kind.load(folder)
            return data
    layouts = "; ".join(f"{kind.name}: {kind.layout}" for kind in KINDS)
    raise AnchorvecError(f"{folder}: there is no test data in it, which is one of: {layouts}")


def kind_of_data(data: LocalData) -> TaskKind:
    """The kind of `data`, which were read already. Raises AnchorvecError if it is of none."""
    for kind in KINDS:
        if isinstance(data, kind.data):
            return kind
    raise AnchorvecError(f"{type(data).__name__} is no test data; name a folder")


def kind_of_mteb_type(mteb_type: str) -> TaskKind | None:
    """The kind by which tasks of `mteb_type` (`Retrieval`, `STS`, ...) are read back; None: main score alone."""
    return next((kind for kind in KINDS if mteb_type in kind.mteb_types), None)


def headings() -> dict[str, str]:
    """Each per-item metric of any kind, and how a table calls it."""
    return {metric: heading for kind in KINDS for metric, heading in kind.metrics.items()}
