"""The page about a comparison: what it says is what the files say, it loads nothing, and nobody's text is markup."""

import base64
import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest

from anchorvec.commands.report import report
from comparisons import ITEMS, KINDS, write_comparison
from pages import Page

FAILED = "OutOfMemoryError: tried to allocate 3 GB"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A comparison of three arms, of which one failed with the last of three seeds, as its folder and its content."""
    folder = tmp_path_factory.mktemp("comparison") / "arms"
    return folder, write_comparison(folder, failing={"echo": FAILED})


@pytest.fixture(scope="module")
def result(written, tmp_path_factory):
    """What the report of it gave back, with both files."""
    files = tmp_path_factory.mktemp("pages")
    return report(written[0], files / "page.html", markdown=files / "page.md")


@pytest.fixture(scope="module")
def page(result):
    """The page about it."""
    return Page(Path(result.output))


@pytest.fixture
def content(written):
    """What `comparison.json` says."""
    return written[1]


def finished(content, arm):
    return [run for run in content["arms"][arm]["runs"] if "failed" not in run]


def the_change(content, arm, kind):
    [found] = [one for one in content["differences"] if (one["arm"], one["kind"]) == (arm, kind)]
    return found


def shown(value):
    """A number as pages have it."""
    return f"{value:.3f}".replace("-", "\u2212")


def test_the_page_begins_with_what_was_compared(page):
    """Title, arms, recipe, budget, seeds and control; the headings have no gaps."""
    assert page.title == "quickstart: 3 arms"
    assert page.root.get("title").text == page.title
    about = page.root.get("header").get("p").text
    assert about == "3 arms of the recipe quickstart, 300,000 tokens and 3 seeds each, against e5."
    assert list(page.sections) == [
        "Verdict", "Scores", "Differences", "Scores on the way", "Training", "Exchange gap", "Cost", "Recipe", "Data",
        "Versions and machine", "To repeat it",
    ]  # fmt: skip
    levels = [int(element.tag[1]) for element in page.root.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    links = [link.attributes["href"].removeprefix("#") for link in page.root.get("nav").all("a")]
    assert links == [section.attributes["id"] for name, section in page.sections.items() if name != "Verdict"]


def test_the_verdict_is_a_sentence_with_its_interval(page, content, result):
    """What is not shown is said to be so; then the others, what could have been shown, and who failed why."""
    change = the_change(content, "anchor", "all")
    headline, others, able, failed = page.verdict
    assert change["verdict"] == "no difference shown"
    ends = f"+{shown(change['mean'])} [{shown(change['low'])}, +{shown(change['high'])}]"
    assert headline == (
        f"anchor: no difference shown against e5, {ends} on average over all test sets (3 seeds; "
        f"p = {change['p_holm']:.3f}, corrected for the number of comparisons)."
    )
    assert others.startswith(
        f"No difference shown against e5: echo {shown(the_change(content, 'echo', 'all')['mean'])}"
    )
    detectable = sorted(the_change(content, arm, "all")["detectable"] for arm in ("echo", "anchor"))
    assert able.endswith(f"could have shown: {shown(detectable[0])} to {shown(detectable[1])}, by arm.")
    assert failed == f"echo, seed 2, failed: {FAILED}."
    assert result.verdict == page.verdict


def test_every_difference_is_on_the_page_as_it_is_in_the_file(page, content):
    """With its interval and both p-values, unrounded behind what is shown; a chart for each kind."""
    table = page.tables("Differences")["Differences to e5"]
    assert len(table.rows) == len(content["differences"]) == 8
    for change in content["differences"]:
        start = change["arm"], "All test sets" if change["kind"] == "all" else change["kind"]
        assert table.numbers_of("Difference", *start) == [change["mean"], change["low"], change["high"]]
        assert table.numbers_of("p", *start) == [change["p_value"]]
        assert table.numbers_of("p, Holm", *start) == [change["p_holm"]]
        assert table.numbers_of("Could be shown", *start) == [change["detectable"]]
        assert table.row(*start)[3] == change["verdict"]
        chart = page.charts("Differences")[f"{start[1]}: difference to e5"]
        [row] = [row for row in chart.values if row.get("name") == change["arm"]]
        assert (row["value"], row["low"], row["high"]) == (change["mean"], change["low"], change["high"])
        assert shown(abs(change["mean"])) in chart.label
    assert "corrected by Holm's method" in page.sections["Differences"].text


def test_scores_are_those_of_the_file_by_kind(page, content):
    """Mean and range over the seeds that finished; the untrained model, which all arms have alike, once."""
    table = page.tables("Scores")["Scores"]
    columns = [name for name in table.columns if "(" in name]
    assert [name.partition(" (")[0] for name in columns] == list(KINDS)
    for arm in content["arms"]:
        for column, (task, (kind, metric)) in zip(columns, KINDS.items(), strict=True):
            assert f"({kind})" in column
            seeds = [run["scores"][task][metric] for run in finished(content, arm)]
            assert table.numbers_of(column, arm) == [fmean(seeds), min(seeds), max(seeds)]
            chart = page.charts("Scores")[column.partition(", ")[0]]
            assert {row["value"] for row in chart.values if row["name"] == arm} == {fmean(seeds), *seeds}
    averages = [fmean(run["scores"][task][KINDS[task][1]] for task in KINDS) for run in finished(content, "e5")]
    assert table.numbers_of("Average", "e5") == [fmean(averages), min(averages), max(averages)]
    assert [row[0] for row in table.rows] == ["e5", "echo", "anchor", "untrained"]
    assert re.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", table.row("untrained")[1])
    assert "the lowest and the highest seed" in page.sections["Scores"].text


def test_losses_are_drawn_with_and_without_stage_one(page, written):
    """Means over seeds at the steps that all have; a long curve is thinned, and the page says so."""
    folder, content = written
    logs = [
        [json.loads(line) for line in (folder / run["folder"] / "log.jsonl").read_text().splitlines()]
        for run in finished(content, "anchor")
    ]
    first, second = page.charts("Training").values()
    assert first.label.startswith("Stage I: reconstruction loss by direction, anchor.")
    table = page.tables("Training")["Stage I: reconstruction loss by direction, anchor"]
    for step in (1, 40):
        of_step = [next(r for r in log if (r["stage"], r["step"]) == ("stage_one", step)) for log in logs]
        mean = fmean(record["query_to_document"] for record in of_step)
        assert table.numbers_of("query to document", str(step)) == [mean]
    assert second.keys == ["e5, without Stage I", "echo, without Stage I", "anchor, after Stage I"]
    dashes = [layer["mark"]["strokeDash"] for layer in second.spec["layer"]]
    assert dashes == [[5, 3], [5, 3], [1, 0]]
    table = page.tables("Training")["Stage II: loss"]
    last = fmean(log[-1]["loss"] for log in logs)
    assert table.numbers_of("anchor, after Stage I", "200") == [last]
    assert {"x": 200, "y": last} in [{"x": row["x"], "y": row["y"]} for row in second.values]
    assert len(table.rows) == 100
    assert "100 of 200 logged steps are shown." in page.sections["Training"].text


def test_exchange_gaps_and_scores_on_the_way_are_drawn(page, content):
    """The gap by direction, from 0 on; the average score against the steps of Stage II."""
    [gap] = page.charts("Exchange gap").values()
    assert gap.keys == ["query to document", "document to query"]
    assert gap.label.startswith("Exchange gap by direction, anchor.")
    assert all(layer["encoding"]["y"]["scale"]["zero"] for layer in gap.spec["layer"])
    assert len(gap.values) == 80
    [title] = page.tables("Scores on the way")
    assert title == "Score against Stage II steps: average over 4 test sets"
    table = page.tables("Scores on the way")[title]
    for arm in content["arms"]:
        points = [[point for point in run["curve"] if point["step"] == 50] for run in finished(content, arm)]
        mean = fmean(fmean(point["scores"].values()) for [point] in points)
        assert table.numbers_of(arm, "50") == [pytest.approx(mean, abs=1e-12)]


def test_the_cost_is_that_of_the_runs(page, content):
    """Quality against compute, throughput, memory, and what each stage of each run took."""
    charts, tables = page.charts("Cost"), page.tables("Cost")
    quality = tables["Score against minutes: average over 4 test sets"]
    assert len(quality.rows) == 8
    for arm in content["arms"]:
        for run in finished(content, arm):
            assert quality.numbers_of("Minutes", arm, str(run["seed"])) == [run["minutes"]]
            score = fmean(run["scores"][task][metric] for task, (_, metric) in KINDS.items())
            assert quality.numbers_of("Score", arm, str(run["seed"])) == [pytest.approx(score)]
    assert "Score against decoder tokens: average over 4 test sets" not in charts  # which are alike
    throughput = {row["name"]: row["value"] for row in charts["Throughput"].values}
    rates = {"e5, Stage II": 520, "echo, Stage II": 520, "anchor, Stage I": 480, "anchor, Stage II": 520}
    assert throughput == {name.replace("Stage ", "Stage\u00a0"): rate for name, rate in rates.items()}
    memory = charts["Memory of a micro-batch's activations"]
    assert [row["value"] for row in memory.values] == [pytest.approx(1536 * 410_000 / 1e9)] * 4
    stages = tables["What each stage took"]
    assert stages.numbers_of("Tokens", "anchor", "0", "Stage I") == [60_000]
    assert stages.numbers_of("Tokens", "anchor", "0", "Stage II") == [240_000]
    assert stages.numbers_of("Micro-batch tokens", "e5", "1", "Stage II") == [1536]
    assert stages.numbers_of("Its memory, GB", "e5", "1", "Stage II") == [pytest.approx(0.62976)]


def test_the_page_says_what_was_run(page, content):
    """Differences of the recipes, rates that were tried, counts of the data, versions and commands."""
    recipes = page.tables("Recipe")
    table = recipes["What each arm changes in the recipe quickstart"]
    assert table.row("e5") == ["e5", "stage_one: null", "stage_two: 0.0002"]
    assert table.row("anchor")[1] == "nothing"
    tries = recipes["Learning rates that were tried"]
    assert [tries.numbers[i][1:] for i in range(3)] == [
        [[one["learning_rate"]], [one["score"]], [one["tokens"]]] for one in content["arms"]["e5"]["tries"]
    ]
    [recipe] = page.code("Recipe")
    assert "stage_one: null" in recipe
    assert "output" not in recipe
    data = page.tables("Data")["Training pairs"]
    assert data.row("nq") == ["nq", "nq.jsonl", "1,010", "1,000", "10", "0", "2"]
    assert "With each seed all arms saw the same rows in the same order" in page.sections["Data"].text
    versions = page.tables("Versions and machine")["What it ran with"]
    assert versions.row("torch") == ["torch", "2.13.0", "all"]
    assert versions.row("device") == ["device", "AMD EPYC", "all"]
    install, commands = page.code("To repeat it")
    assert install == "pip install torch==2.13.0 transformers==5.23.0"
    assert commands.splitlines()[0] == "anchorvec train 0/0/recipe.yaml output=0/0-again"


def test_charts_can_be_read_without_seeing_them(page):
    """Each has words, and the same numbers in a table: its own, or one of its section; colours are variables."""
    for name in page.sections:
        for title, chart in page.charts(name).items():
            assert chart.label.startswith(f"{title}. ")
            assert re.search(r"\d", chart.label.removeprefix(title)), title
            assert page.tables(name), title
            assert not re.search(r"#[0-9a-f]{6}", json.dumps(chart.spec)), title
    scrolled = [element for element in page.root if element.attributes.get("role") == "region"]
    assert len(scrolled) == len(page.root.all("table"))
    assert all(element.attributes["tabindex"] == "0" and element.attributes["aria-label"] for element in scrolled)
    assert page.root.get("html").attributes["lang"] == "en"


def test_the_page_is_whole(page):
    """It names no address to load from, and its policy allows its own two scripts and no request."""
    loading = {"src", "href", "data", "action", "poster", "srcset", "xlink:href"}
    found = {value for element in page.root for name, value in element.attributes.items() if name in loading}
    assert all(value.startswith(("#", "data:")) for value in found)
    styles = "".join(element.raw for element in page.root.all("style"))
    assert not re.search(r"@import|url\(", styles)
    [policy] = [one.attributes["content"] for one in page.root.all("meta") if "http-equiv" in one.attributes]
    scripts = [script for script in page.root.all("script") if "type" not in script.attributes]
    digests = [base64.b64encode(hashlib.sha256(script.raw.encode()).digest()).decode() for script in scripts]
    assert policy.startswith("default-src 'none'; script-src " + " ".join(f"'sha256-{one}'" for one in digests) + ";")
    assert len(scripts) == 2
    assert "connect-src" not in policy
    assert "vegaEmbed" in scripts[0].raw


def test_markdown_has_the_same(page, result):
    """The verdict, the tables and the commands, for a model card; a comparison has no card's metadata."""
    text = Path(result.markdown).read_text(encoding="utf-8")
    plain = re.sub(r"\\(.)", r"\1", text)
    assert text.startswith("# quickstart: 3 arms\n")
    assert f"**{page.verdict[0]}**" in plain
    for sentence in page.verdict[1:]:
        assert f"- {sentence}" in plain
    for section in ("Scores", "Differences", "Cost", "Recipe", "Data", "Versions and machine"):
        assert f"\n## {section}\n" in plain
        for table in page.tables(section).values():
            if len(table.rows) < 12 and section != "Cost":
                assert all(f"| {' | '.join(row)} |" in plain for row in table.rows)
    for code in page.code("To repeat it"):
        assert f"```bash\n{code}\n```" in text


def test_a_single_seed_has_the_intervals_of_its_items(tmp_path):
    """And the file's differences; with them p-values that are not corrected, where it has no others."""
    content = write_comparison(tmp_path, ("control", "other"), seeds=1)
    for change in content["differences"]:
        change.update(p_holm=None, detectable=None, method="", mean=0.1, low=0.05, high=0.15, verdict="higher",
                      p_value=0.0004)  # fmt: skip
    (tmp_path / "comparison.json").write_text(json.dumps(content | {"command": ["anchorvec", "compare", "a b"]}))
    result = report(tmp_path, markdown=tmp_path / "page.md")
    assert result.verdict == [
        "other scores higher than control: +0.100 [+0.050, +0.150] on average over all test sets (one seed; p < 0.001)."
    ]
    text = (tmp_path / "page.md").read_text().replace("\\", "")
    scores = content["arms"]["other"]["runs"][0]["scores"]["stsbenchmark"]
    low, high = scores["cosine_spearman_interval"]
    assert f"| {shown(scores['cosine_spearman'])} [{shown(low)}, {shown(high)}] |" in text
    assert "| System | On | Difference | Verdict | p |\n" in text
    assert "Intervals are of 95%, over the items of a test set" in text
    assert "anchorvec compare 'a b'" in text
    assert scores["items"] == ITEMS
