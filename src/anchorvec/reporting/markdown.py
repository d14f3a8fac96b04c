"""A report as Markdown, for a model card: the verdict, the tables and the commands, without the charts."""

import re
from collections.abc import Sequence

from anchorvec.reporting.content import Cell, Code, Report, Section, Table, plain
from anchorvec.reporting.reading import Source
from anchorvec.reporting.render import shown
from anchorvec.reporting.systems import is_single

_MARKUP = re.compile(r"([\\`*_\[\]|~])")
_STARTS = re.compile(r"^([#+=-]*|\d*)([#+=.)-])(?=\s|$)")
"""What would make a line a heading, a rule, or part of a list; its last sign is escaped."""


def markdown_page(report: Report, sources: Sequence[Source]) -> str:
    """`report` of `sources` as Markdown; of a single run with the metadata of a model card, its scores among them.

    Names are escaped, so that they are neither markup nor HTML. Tables of curves are left to the HTML page.
    """
    parts = [f"# {escaped(report.title)}", *map(escaped, report.about), "## Verdict"]
    for verdict in report.verdicts:
        parts.append(f"**{_sentence(verdict.headline)}**")
        if verdict.sentences:
            parts.append("\n".join(f"- {_sentence(sentence)}" for sentence in verdict.sentences))
    parts += [text for section in report.sections for text in _section(section)]
    parts += [escaped(line) for line in report.left_out]
    return _metadata(sources) + "\n\n".join(part for part in parts if part) + "\n"


def _metadata(sources: Sequence[Source]) -> str:
    """The head of a model card that the hub reads, with the scores of a single run's last model."""
    if not is_single(sources):
        return ""
    from huggingface_hub import EvalResult, ModelCardData

    name = sources[0].series[0].name
    run = sources[0].series[0].runs[0]
    results = [
        EvalResult(
            task_type=scores.kind,
            dataset_type=task,
            dataset_name=task,
            metric_type=scores.main.metric or "main_score",
            metric_value=scores.main.value,
        )
        for task, scores in run.last.items()
    ]
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "anchorvec"],
        model_name=name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _section(section: Section) -> list[str]:
    """Heading, sentences, tables and code of a section; nothing of one that is charts alone."""
    if not section.tables and not section.code:
        return []
    tables = [_table(table) for table in section.tables]
    return [f"## {escaped(section.title)}", *map(escaped, section.sentences), *tables, *map(_code, section.code)]


def _table(table: Table) -> str:
    head, *rows = [" | ".join(escaped(plain(cell)) for cell in row) for row in (table.columns, *table.rows)]
    lines = [head, " | ".join(["---"] * len(table.columns)), *rows]
    return "\n".join([f"**{escaped(table.caption)}**", "", *(f"| {line} |" for line in lines)])


def _code(code: Code) -> str:
    text = str(shown(code.text))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{escaped(code.caption)}:\n\n{fence}{code.language}\n{text}\n{fence}"


def _sentence(parts: Sequence[Cell]) -> str:
    return escaped("".join(plain(part) for part in parts))


def escaped(text: str) -> str:
    """`text` on one line, as Markdown that shows just that."""
    text = " ".join(str(shown(text)).split())
    text = _MARKUP.sub(r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return _STARTS.sub(r"\1\\\2", text)
