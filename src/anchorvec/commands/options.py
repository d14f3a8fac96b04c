"""The options and arguments that several commands take."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from anchorvec.errors import AnchorvecError

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's.")
]


def writable(option: typer.CallbackParam, file: Path | None) -> Path | None:
    """`file`, refused before the work, by the name of its `option`, where it could not be written after it."""
    if file is not None:
        path = file.absolute()
        folder = next(parent for parent in (*path.parents, path) if parent.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise AnchorvecError(f"{option.opts[0]}: {file} cannot be written; name a file in a folder of your own")
    return file


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result to FILE as JSON.", callback=writable),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the output folder, however it ended; or begin it.")
]
Push = Annotated[
    str | None, typer.Option(metavar="REPO", help="Upload the exported model to this repository of the hub.")
]
Instruction = Annotated[
    str | None,
    typer.Option(
        help="Put before each query, or text of a task without queries, in place of the prompt stored with the model."
    ),
]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep vectors on disk, and encode no text of which one is kept.")
]
Devices = Annotated[
    str | None,
    typer.Option(help="Share the texts out among devices: how many, or which (cuda:0,cuda:1; cpu,cpu)."),
]
Ray = Annotated[bool, typer.Option("--ray", help="Encode on a Ray cluster, with as many workers as --devices, if any.")]
Index = Annotated[
    Literal["exact", "usearch"] | None,
    typer.Option(help="Compare with all vectors, or search them by usearch, which may miss one."),
]
ModelFolder = Annotated[str, typer.Argument(metavar="MODEL", help="A folder with an embedder, or a hub id.")]
TestData = Annotated[list[Path] | None, typer.Option(help="A test set, or a folder of them; may be repeated.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="An MTEB task, a type (STS), a benchmark ('MTEB(eng, v2)', BEIR), or paper-15; may be repeated.",
    ),
]
Languages = Annotated[
    list[str] | None, typer.Option(help="Of tasks and types these languages alone, such as eng; may be repeated.")
]
Baselines = Annotated[
    list[str] | None,
    typer.Option(
        help="Compare with a model, `bm25`, `untrained` (the run's own start), an earlier run, or a file that "
        "--json wrote; may be repeated."
    ),
]
Sample = Annotated[
    int | None,
    typer.Option(metavar="N", help="Of retrieval, rank the relevant documents and N others, drawn.", min=0),
]
