"""The kinds of tasks that are read from folders and scored item by item."""

from pathlib import Path

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.classification import CLASSIFICATION
from anchorvec.evaluation.clustering import CLUSTERING
from anchorvec.evaluation.reranking import RERANKING
from anchorvec.evaluation.retrieval import RETRIEVAL
from anchorvec.evaluation.sts import STS
from anchorvec.evaluation.task_kind import LocalData, TaskKind
from anchorvec.files import user_path
from anchorvec.terminal import say

KINDS: list[TaskKind] = [
    RETRIEVAL,
    RERANKING,
    STS,
    CLASSIFICATION,
    CLUSTERING,
]
"""Where a folder, or a task of mteb, fits several, the first counts."""


def load_folder(folder: str | Path) -> LocalData:
    """The test set in `folder`, or in a file, whichever kind it is of, named after it; `~` is the home folder.

    Raises AnchorvecError for one that is not there or of no known kind, and for data that cannot be used.
    """
    folder = user_path(folder)
    if not folder.exists():
        raise AnchorvecError(f"{folder}: there is no such folder, nor file; name a test set")
    kind = _kind_of(folder)
    if kind is not None:
        data: LocalData = kind.load(folder)
        return data
    layouts = "; ".join(f"{kind.name}: {kind.layout}" for kind in KINDS)
    raise AnchorvecError(f"{folder}: there is no test data in it, which is one of: {layouts}")


def sets_in(folder: str | Path) -> list[Path]:
    """`folder` itself if it is a test set, else the sets in it, by their names; a line says what in it is none.

    Empty where it holds none.
    """
    folder = user_path(folder)
    if not folder.is_dir() or _kind_of(folder) is not None:
        return [folder]
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    sets = [path for path in inside if _kind_of(path) is not None]
    others = [path.name for path in inside if path not in sets]
    if sets and others:
        say(f"{folder}: {len(sets)} test sets; no test set: {', '.join(others)}")
    return sets


def _kind_of(path: Path) -> TaskKind | None:
    return next((kind for kind in KINDS if kind.recognises(path)), None)


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
