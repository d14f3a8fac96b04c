"""One page about runs or a comparison: a self-contained HTML file, and Markdown for a model card."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path, write_text
from anchorvec.reporting.assemble import assemble
from anchorvec.reporting.charts import require_extra
from anchorvec.reporting.content import plain
from anchorvec.reporting.markdown import markdown_page
from anchorvec.reporting.reading import read_sources
from anchorvec.reporting.render import html_page


@dataclass(frozen=True)
class ReportResult:
    """The files that `report` wrote, its verdict in sentences, and what was left out for want of numbers."""

    output: str | None
    markdown: str | None
    verdict: list[str]
    left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)

    def __rich__(self) -> str:
        files = [file for file in (self.output, self.markdown) if file]
        return "\n".join([*self.verdict, *self.left_out, f"written: {', '.join(files)}"])


def report(
    runs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    markdown: str | Path | None = None,
) -> ReportResult:
    """Write a page about `runs`, the folders of runs or of comparisons, or one of them.

    - `output`: the HTML file; charts and what draws them are in it, so that it can be sent to others as it is.
    - `markdown`: a file with the same verdict and tables as Markdown, for a model card.

    At least one of the two is needed; what was there is replaced. A single run's last model is compared with the
    untrained one, several runs with the first of them, the arms of a comparison with its control. Raises
    AnchorvecError for a folder that is neither a run nor a comparison, for a file that cannot be read or written, and
    where the extra `report` is not installed.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    files = [None if file is None else user_path(file) for file in (output, markdown)]
    if not folders or not any(files):
        what = "no run" if not folders else "no file to write"
        raise AnchorvecError(f"{what} is named; name a run's folder, and output=FILE.html or markdown=FILE.md")
    require_extra()
    sources = read_sources(folders)
    found = assemble(sources)
    page, card = files
    made = [(page, html_page(found)) if page else None, (card, markdown_page(found, sources)) if card else None]
    for file, text in filter(None, made):  # both are made before one is written
        write_text(file, text)
    sentences = [
        "".join(plain(part) for part in parts)
        for verdict in found.verdicts
        for parts in (verdict.headline, *verdict.sentences)
    ]
    return ReportResult(str(page) if page else None, str(card) if card else None, sentences, list(found.left_out))
