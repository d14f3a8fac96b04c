"""The command line: one function per command, no logic."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

import anchorvec
from anchorvec.commands.options import (
    Baselines,
    Cache,
    Devices,
    Index,
    Instruction,
    JsonFile,
    Languages,
    ModelFolder,
    Overrides,
    Push,
    Ray,
    RecipeName,
    Resume,
    Sample,
    Tasks,
    TestData,
    writable,
)
from anchorvec.errors import AnchorvecError, Interrupted
from anchorvec.ranks import rank
from anchorvec.terminal import replace_unshown, terminal

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = terminal()


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Before torch is loaded: its threads wait 50 µs for each other, then sleep. By default they turn for milliseconds,
    # which beside other programs made everything 2.6 times as slow (docs/experiments/speed-on-cpu.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    replace_unshown()
    try:
        app()
    except AnchorvecError as error:
        terminal(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(2)


@contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    """A context that ends with one line and the signal's exit code where it is interrupted."""
    try:
        yield
    except Interrupted as interrupted:
        if rank() == 0:
            terminal(stderr=True).print(str(interrupted), highlight=False, soft_wrap=True)
        raise typer.Exit(128 + interrupted.signal) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"anchorvec {anchorvec.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Turn an open decoder LLM into a text embedder."""


@app.command(epilog="Example: anchorvec quickstart --output first-embedder --minutes 10")
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder of the run; must be new.")],
    minutes: Annotated[float, typer.Option(help="Wall time for everything, scoring included.")] = 10,
    seed: Annotated[int, typer.Option(help="Decides everything that is random.")] = 0,
    stage_one: Annotated[
        bool,
        typer.Option(
            "--stage-one/--no-stage-one",
            help="Stage I, and its loss beside Stage II's; without: contrastive steps alone.",
        ),
    ] = True,
    resume: Resume = False,
    json_file: JsonFile = None,
) -> None:
    """The whole job on this machine: train, score before and after, export, and a search prompt to try it."""
    import psutil

    from anchorvec.commands.quickstart import quickstart as run
    from anchorvec.commands.search import search as ask

    _quiet()
    started = psutil.Process().create_time()
    with _told_how_to_go_on():
        result = run(output, minutes=minutes, seed=seed, stage_one=stage_one, started=started, resume=resume)
    _finish(result, json_file)
    console.print(f"The model is in {result.model}, the whole run took {result.minutes:.1f} minutes.")
    console.print(
        "With pairs of your own (query and positive in each row):\n"
        "  anchorvec train quickstart 'data.train=[{path: pairs.jsonl}]' output=runs/mine --minutes 30",
        soft_wrap=True,
    )
    if sys.stdin.isatty() and sys.stdout.isatty():
        ask(result.model, result.corpus)


@app.command(epilog="Example: anchorvec train debug output=runs/debug stage_one.steps=50")
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    minutes: Annotated[
        float | None, typer.Option(help="Wall time for everything, scoring included, instead of the recipe's steps.")
    ] = None,
    resume: Resume = False,
    push: Push = None,
    json_file: JsonFile = None,
) -> None:
    """Stage I, then Stage II, then the export, as the recipe says; KEY=null switches a stage off."""
    from anchorvec.pipeline import train as run
    from anchorvec.recipe import load_recipe
    from anchorvec.training.budget import Budget

    _quiet()
    with _told_how_to_go_on():
        asked = load_recipe(recipe, overrides or []) if rank() == 0 else recipe  # the first process tells the others
        result = run(asked, budget=Budget(minutes), resume=resume, push=push)
    _finish(result, json_file)


@app.command(epilog="Example: anchorvec compare arms/base --arms e5 echo --budget 300000tokens output=runs/compared")
def compare(
    recipe: RecipeName,
    arms: Annotated[
        list[str],
        typer.Option(metavar="ARM...", help="Two or more: shipped ones (e5, echo, ...), files, key=value, the recipe."),
    ],
    rest: Annotated[
        list[str] | None, typer.Argument(metavar="[ARM|KEY=VALUE]...", help="More arms; values for all of them.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Of each run: 300000tokens, 125steps of Stage II, 30minutes.")] = "",
    seeds: Annotated[int, typer.Option(help="How many, from the recipe's own on.")] = 3,
    tries: Annotated[int, typer.Option(help="Learning rates that each arm tries; 0: the recipe's is taken.")] = 3,
    control: Annotated[str | None, typer.Option(help="What the others are compared with; else the first arm.")] = None,
    at: Annotated[str, typer.Option(metavar="STEPS", help="Score after these steps of Stage II too: 0,25,50.")] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Show what it would take; train nothing.")] = False,
    resume: Resume = False,
    json_file: JsonFile = None,
) -> None:
    """Train arms of one recipe with the same budget on the same rows, and compare their scores."""
    from anchorvec.commands.plan_comparison import plan_comparison
    from anchorvec.comparing.compare import compare as run

    _quiet()
    names = [*arms, *(word for word in rest or [] if "=" not in word)]
    overrides = [word for word in rest or [] if "=" in word] + ([f"evaluation.at=[{at}]"] if at else [])
    options: dict[str, Any] = {"budget": budget, "seeds": seeds, "tries": tries, "control": control}
    options |= {"overrides": overrides}
    with _told_how_to_go_on():
        _finish(
            plan_comparison(recipe, names, **options) if plan else run(recipe, names, **options, resume=resume),
            json_file,
        )


@app.command(epilog="Example: anchorvec plan paper/llama-3.2-1b 'data.train=[{path: pairs.jsonl}]'")
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    step: Annotated[
        bool, typer.Option("--step/--no-step", help="Make one real micro-step of each stage, where it fits.")
    ] = True,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:N]", help="Plan for N of a named device, such as a100-80gb:8, instead of for this machine."
        ),
    ] = None,
    machines: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A YAML file of yours with further devices for --machine.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Show what a recipe would do and take: memory, time, disk, a decoded batch, a micro-step. Keeps nothing."""
    from anchorvec.commands.plan import plan as run
    from anchorvec.recipe import load_recipe

    _quiet()
    _finish(run(load_recipe(recipe, overrides or []), step=step, machine=machine, machines=machines), json_file)


@app.command(epilog="Example: anchorvec evaluate first-embedder/model --data beir/scifact --baseline bm25")
def evaluate(
    model: ModelFolder,
    data: TestData = None,
    task: Tasks = None,
    language: Languages = None,
    results: Annotated[
        Path, typer.Option(help="Folder where results of MTEB tasks are kept as mteb does; none is run again.")
    ] = Path("results"),
    batch_size: Annotated[int, typer.Option(help="Texts encoded at a time.", min=1)] = 32,
    baseline: Baselines = None,
    instruction: Instruction = None,
    cache: Cache = True,
    devices: Devices = None,
    ray: Ray = False,
    sample: Sample = None,
    index: Index = None,
    json_file: JsonFile = None,
) -> None:
    """Score a model on local test sets (retrieval, re-ranking, STS, classification, clustering) and MTEB tasks."""
    from anchorvec.device import devices_named
    from anchorvec.evaluation import averages_tables
    from anchorvec.evaluation import evaluate as run

    _quiet()
    scores = run(
        model,
        data=data or [],
        tasks=task or [],
        languages=language or [],
        results=results,
        batch_size=batch_size,
        instruction=instruction,
        baselines=baseline or [],
        cache=cache,
        devices=devices_named(devices, ray=ray) if devices else (),
        ray=ray,
        sample=sample,
        index=index,
        show_progress_bar=True,
    )
    _finish(scores.comparison, json_file)
    console.print(*averages_tables(scores.averages))


@app.command(epilog='Example: anchorvec search first-embedder/model notes/ --query "open a gzip file"')
def search(
    model: ModelFolder,
    corpus: Annotated[Path, typer.Argument(help="A file or a folder of texts, Markdown, JSON, JSON Lines, CSV, TSV.")],
    query: Annotated[list[str] | None, typer.Option(help="Ask this; may be repeated. Without: a prompt.")] = None,
    top_k: Annotated[int, typer.Option(help="Passages shown per query.", min=1)] = 5,
    instruction: Instruction = None,
    cache: Cache = True,
    devices: Devices = None,
    ray: Ray = False,
    index: Index = None,
    json_file: JsonFile = None,
) -> None:
    """Ask a corpus in the terminal."""
    from dataclasses import asdict

    from anchorvec.commands.search import print_hits
    from anchorvec.commands.search import search as run
    from anchorvec.device import devices_named

    _quiet()
    options: dict[str, Any] = {"instruction": instruction, "cache": cache, "index": index}
    options |= {"devices": devices_named(devices, ray=ray) if devices else (), "ray": ray}
    found = run(model, corpus, query, top_k, **options, show_progress_bar=True)
    if query:
        for text, hits in found.items():
            console.print(Text(text, style="bold"), soft_wrap=True)
            print_hits(console, hits)
    _write(json_file, {text: [asdict(hit) for hit in hits] for text, hits in found.items()})


@app.command(epilog='Example: anchorvec decode runs/mine/stage_one "Join two tables on a key"')
def decode(
    model: Annotated[Path, typer.Argument(help="A folder that can still write, such as a run's stage_one.")],
    text: Annotated[str, typer.Argument(help="The text whose embedding is read out.")],
    side: Annotated[
        Literal["query", "document"], typer.Option("--as", help="Read TEXT as one or the other.")
    ] = "query",
    max_tokens: Annotated[int, typer.Option(help="Write at most so many tokens.", min=1)] = 64,
    beams: Annotated[int, typer.Option(help="Beams of the search; 1 is greedy.", min=1)] = 1,
    json_file: JsonFile = None,
) -> None:
    """Show what an embedding says: the text the model writes from the vector alone."""
    from anchorvec.commands.decode import decode as run

    _quiet()
    _finish(run(model, text, side=side, max_tokens=max_tokens, beams=beams), json_file)


@app.command(epilog="Example: anchorvec export runs/first my-embedder")
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its stage folders.")],
    out: Annotated[Path, typer.Argument(help="Folder of the exported model; must be new.")],
    json_file: JsonFile = None,
) -> None:
    """Write one self-contained folder with LoRA merged, compared with the run vector by vector."""
    from anchorvec.exporting.folder import export as run_export

    _quiet()
    _finish(run_export(run, out), json_file)


@app.command(epilog="Example: anchorvec report runs/mine --output report.html")
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_COMPARISON...", help="Folders of runs, or of comparisons.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write one HTML file, with all that it needs in it.", callback=writable)
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the same as Markdown, for a model card.", callback=writable)
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """One page: the verdict with its interval, scores, losses, cost, recipe, data, versions and commands."""
    from anchorvec.commands.report import report as run

    _finish(run(runs, output, markdown=markdown), json_file)


def _quiet() -> None:
    """Keep the libraries' own bars and notes off the terminal; ours say what matters."""
    import logging
    import warnings

    from datasets.utils.logging import disable_progress_bar as disable_datasets_bar
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_datasets_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    logging.getLogger("mteb").setLevel(logging.ERROR)  # it says that prompts are ignored, which are not
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.showwarning = show_warning


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """`message` as one line on stderr, without the line of code that it comes from, once where there are processes."""
    if rank() == 0:
        terminal(stderr=True).print(Text.assemble(("warning: ", "bold yellow"), str(message)), soft_wrap=True)


def _finish(result: Any, json_file: Path | None) -> None:
    if rank() == 0:
        console.print(result)
        _write(json_file, result.to_dict())


def _write(json_file: Path | None, content: dict[str, Any]) -> None:
    from anchorvec.files import write_json

    if json_file is not None:
        write_json(json_file, content)
