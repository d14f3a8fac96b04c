"""The pages that people read: links lead somewhere, commands are those that are run, tests that are named exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def anchors(page: Path) -> set[str]:
    """The names under which the headings of a page can be linked to."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Every link to a file of the repository names one that is there, and a heading that it has."""
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_experiment_has_its_question_its_answer_and_its_place_in_the_index():
    """A page starts with a question and a short answer, and is a row of the index; lines stay readable."""
    folder = ROOT / "docs" / "experiments"
    index = (folder / "README.md").read_text(encoding="utf-8")
    for page in sorted(folder.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert max(map(len, text.splitlines())) <= 140, page.name
        if page.name != "README.md":
            assert re.match(r"# .*\?\n\n\*\*Answer\.\*\* ", text), page.name
            assert f"({page.name}) |" in index, page.name


def test_the_gate_runs_the_commands_of_the_readme():
    """Both commands are scripts, which the README shows as they are and `.ci/run` runs."""
    readme, gate = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    for script in ("scripts/quickstart.sh", "scripts/test.sh"):
        assert f"```bash\n{script}\n```" in readme
        assert re.search(rf"^{script}( |$)", gate, re.MULTILINE)
        assert (ROOT / script).stat().st_mode & 0o111


def test_each_listed_internal_names_a_test():
    """Each row of docs/internals.md has one test or a file of tests, and these are there under that name."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {path.stem for path in files}
    known |= {name for path in files for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)}
    rows = re.findall(r"^\| .* \| (.*) \|$", (ROOT / "docs" / "internals.md").read_text(), re.MULTILINE)
    rows = [row for row in rows if row not in ("test", "---")]
    assert len(rows) > 40
    for row in rows:
        named = re.findall(r"`(test_\w+)", row)
        assert named, row
        assert known.issuperset(named), row
