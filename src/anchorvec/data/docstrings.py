"""Pairs from the documentation of this Python: a docstring's first sentence, and the rest of it.

The corpus of `anchorvec quickstart`: present wherever our dependencies are, and nothing to download.
Sources are read and parsed, never imported. How well a model finds the rest of a docstring from its summary
is measured on whole packages that the training pairs leave out.
"""

import ast
import gc
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import os
import platform
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorvec.errors import AnchorvecError

MAX_QUERY_WORDS = 40
MIN_QUERY_WORDS = 3
MAX_DOCUMENT_CHARACTERS = 2_000
MIN_DOCUMENT_CHARACTERS = 40
MIN_DOCUMENT_WORDS = 8
MAX_FILE_BYTES = 1_000_000  # larger ones are tables written by a program
# Parsing takes most of the time, half of it for files with a smaller share, which hold a fifth of the pairs.
MIN_DOCSTRING_SHARE = 0.15
SHINGLE_WORDS = 8
NEAR_DUPLICATE = 0.8  # Jaccard similarity of two documents' shingles, or of two queries' words

# Tests say what they test, and vendored copies repeat a package that may be held out.
_SKIPPED_FOLDERS = {
    *("test", "tests", "testing", "_testing", "conftest", "benchmarks"),
    *("_vendor", "vendor", "vendored", "_vendored", "extern", "externals", "_extern", "third_party"),
    *("__pycache__", "site-packages", "dist-packages"),
}
_SKIPPED_PACKAGES = {"anchorvec", "idlelib", "lib2to3", "ensurepip", "turtledemo", "antigravity", "this"}
_TEST_FILE = re.compile(r"(test_.*|.*_test|conftest)\.py")
# transformers writes 1,200 modelling files from others: 18 MB with the same docstrings again.
_GENERATED = re.compile(rb"auto(matically |-)?generated|do not edit", re.IGNORECASE)
# A summary is over where a blank line, a field list, a heading, a doctest or a list begins.
_SUMMARY_END = re.compile(r"\n\s*\n|\n(?=\s*(?:[:@>*=~^.+-]|\d+[.)]\s|[A-Z]\w+:\s*$))", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?][\"'`)\]]*\s+(?=[A-Z`\"'(\[*:])")
_ABBREVIATION = re.compile(r"(?i:\b(?:e\.g|i\.e|etc|vs|cf|approx|resp|fig|eqs?|al|[a-z])|\.\.)\.$")
_ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)(?:\s*<[^`]*>)?`")  # :class:`~a.B` and :ref:`text <target>`
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_DOCUMENTED = ast.Module | ast.ClassDef | _FUNCTION
_WORD = re.compile(r"[^\W_]+")
_BOILERPLATE = re.compile(r"copyright|licen[sc]e|\ball rights reserved\b|auto-?generated", re.IGNORECASE)


@dataclass(frozen=True)
class DocstringPair:
    """A docstring's first sentence and its rest; `name` is module.Class.method, `package` its first part."""

    query: str
    document: str
    package: str
    name: str


@dataclass(frozen=True)
class DocstringData:
    """Training pairs, and a pinned score set from packages that none of them comes from."""

    train: list[DocstringPair]
    score: list[DocstringPair]  # every document of the score set, sorted by name
    queries: list[DocstringPair]  # those of `score` whose query is asked, sorted by name
    fingerprint: str  # sha256 over the names and texts of the score set
    description: dict[str, Any]  # JSON: packages with versions, counts, seed, fingerprint


@dataclass(frozen=True)
class _Scan:
    """The pairs of some packages, and the counts of what was read and left out on the way."""

    pairs: list[DocstringPair]
    counts: Counter[str]


def docstring_pairs(packages: Iterable[str] | None = None) -> list[DocstringPair]:
    """The pairs of these top-level packages, by default of Python and all that is installed, sorted by name.

    The query is the first sentence on one line, without role markup, backticks and its last period; the
    document is the rest as it stands, at most 2,000 characters. Left out: short ones, documents that
    contain their query, licences, second uses of a query or a document, near-duplicates of an earlier
    document (Jaccard similarity of 8-word shingles >= 0.8), and whole files that are generated or hold
    little documentation. Nothing is random. Raises AnchorvecError for a package that is not installed.
    """
    return _scan(_packages(), packages).pairs


def _packages() -> dict[str, Path]:
    """Each top-level name with its folder or file, found in the order of imports: standard library first."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    packages: dict[str, Path] = {}
    for root in roots:
        if not root.is_dir():
            continue
        for path in sorted(root.iterdir()):
            name = path.stem if path.suffix == ".py" else path.name
            if not name.isidentifier() or name in _SKIPPED_PACKAGES | _SKIPPED_FOLDERS:
                continue
            if path.suffix == ".py" or path.is_dir():
                packages.setdefault(name, path)
    return packages


def _scan(installed: dict[str, Path], names: Iterable[str] | None, score: Sequence[DocstringPair] = ()) -> _Scan:
    names = sorted(installed if names is None else set(names))
    for name in names:
        if name not in installed:
            raise AnchorvecError(f"the package {name} is not installed here; `pip install {name}` adds it")
    counts: Counter[str] = Counter()
    pairs: dict[str, DocstringPair] = {}
    with _quick_parsing():
        for package in names:
            for module, path in _modules(package, installed[package]):
                for name, docstring in _docstrings(module, path, counts):
                    counts["docstrings"] += 1
                    texts = _split(docstring)
                    if texts is not None:  # of a property's getter and setter, the first counts
                        pairs.setdefault(name, DocstringPair(*texts, package, name))
    counts["pairs before duplicates"] = len(pairs)
    kept = _without_repeats([pairs[name] for name in sorted(pairs)], score, counts)
    return _Scan(kept, counts)


@contextmanager
def _quick_parsing() -> Iterator[None]:
    """No warnings about others' invalid escapes, and no cyclic garbage collection, a tenth of the time."""
    collected = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if collected:
            gc.enable()


def _modules(package: str, path: Path) -> Iterator[tuple[str, Path]]:
    """Each module's dotted name and file, sorted within a folder."""
    if path.is_file():
        yield package, path
        return
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if f.isidentifier() and f not in _SKIPPED_FOLDERS)
        parts = [package, *Path(folder).relative_to(path).parts]
        for file in sorted(files):
            if file.endswith(".py") and not _TEST_FILE.fullmatch(file):
                stem = file.removesuffix(".py")
                yield ".".join(parts if stem == "__init__" else [*parts, stem]), Path(folder, file)


def _docstrings(module: str, path: Path, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """Each dotted name that has a docstring, with it. What is skipped or cannot be parsed is counted."""
    source = path.read_bytes()
    if len(source) > MAX_FILE_BYTES or _GENERATED.search(source, 0, 2_000):
        counts["generated files"] += 1
        return
    quoted = source.split(b'"""')[1::2]
    if sum(len(text) for text in quoted if b"\n" in text) < MIN_DOCSTRING_SHARE * len(source):
        counts["files with little documentation"] += 1
        return
    counts["files"] += 1
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        counts["unparsable files"] += 1
        return
    yield from _walk(tree, module)


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """The raw docstrings of a module or class and what it defines, also under `if` and `try`."""
    if isinstance(node, _DOCUMENTED):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, docstring
        if isinstance(node, _FUNCTION):
            return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _FUNCTION | ast.ClassDef):
            yield from _walk(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):
            yield from _walk(child, name)


def _split(docstring: str) -> tuple[str, str] | None:
    """The first sentence and the rest of a docstring; None where either says too little to be found by."""
    if len(docstring) < MIN_DOCUMENT_CHARACTERS:  # half of all, and cleaning takes time
        return None
    docstring = inspect.cleandoc(docstring).strip()
    end = _SUMMARY_END.search(docstring)
    summary = docstring[: end.start()] if end else docstring
    cut = len(summary)
    for stop in _SENTENCE_END.finditer(summary):
        if not _ABBREVIATION.search(summary[: stop.start() + 1]):
            cut = stop.end()
            break
    query = " ".join(_ROLE.sub(r"\1", summary[:cut]).replace("`", "").split()).removesuffix(".")
    document = docstring[cut:].strip()
    document = re.sub(r"^[=~^*-]{3,}\s*\n", "", document)  # the underline of a heading
    if len(document) > MAX_DOCUMENT_CHARACTERS:
        document = document[:MAX_DOCUMENT_CHARACTERS].rsplit(maxsplit=1)[0]
    words = [word for word in query.split() if re.search("[A-Za-z]", word)]
    if not MIN_QUERY_WORDS <= len(words) <= MAX_QUERY_WORDS or not re.match(r"[A-Za-z0-9\"'(]", query):
        return None
    if len(document) < MIN_DOCUMENT_CHARACTERS or len(document.split()) < MIN_DOCUMENT_WORDS:
        return None
    if _BOILERPLATE.search(query) or query.lower() in " ".join(document.lower().split()):
        return None
    return query, document


def _normalised(text: str) -> str:
    """Lower-case letters and digits only."""
    return "".join(_WORD.findall(text.lower()))


def _without_repeats(
    pairs: Sequence[DocstringPair], score: Sequence[DocstringPair], counts: Counter[str]
) -> list[DocstringPair]:
    """The pairs that repeat neither an earlier one nor the score set."""
    # A query with two documents has no right answer: the first counts.
    queries: set[str] = set()
    documents: set[str] = set()
    new = []
    for pair in pairs:
        query, document = _normalised(pair.query), _normalised(pair.document)
        if query not in queries and document not in documents:
            new.append(pair)
        queries.add(query)
        documents.add(document)
    counts["duplicates"] += len(pairs) - len(new)
    near = near_duplicates([pair.document for pair in new], [pair.document for pair in score])
    # Like queries ("A beta continuous random variable") may both be trained on, but not when one is scored.
    asked = [pair.query for pair in score]
    near |= near_duplicates([pair.query for pair in new], asked, width=1, among=False)
    counts["near-duplicates"] += int(near.sum())
    return [pair for pair, is_near in zip(new, near, strict=True) if not is_near]


def near_duplicates(
    texts: Sequence[str], reference: Sequence[str] = (), *, width: int = SHINGLE_WORDS, among: bool = True
) -> NDArray[np.bool_]:
    """Which texts resemble one of `reference` or, with `among`, an earlier text that is kept: (len(texts),).

    Two texts do where the Jaccard similarity of their shingles, `width` consecutive words each, is 0.8 or
    more. Exact: such sets share a member among the rarest 0.2 n + 1 of each, for any order that is common
    to both, so few pairs need comparing.
    """
    sets = _shingles([*reference, *texts], width)
    resembles = np.zeros(len(sets), dtype=bool)
    kept_with: dict[int, list[int]] = {}  # a shingle, and the kept texts that have it among their rarest
    for i, members in enumerate(sets):
        rarest = members[: len(members) - int(NEAR_DUPLICATE * len(members)) + 1].tolist()
        if i >= len(reference):
            for j in {j for shingle in rarest for j in kept_with.get(shingle, ())}:
                common = len(np.intersect1d(members, sets[j], assume_unique=True))
                if common >= NEAR_DUPLICATE * (len(members) + len(sets[j]) - common):
                    resembles[i] = True
                    break
        if i < len(reference) or (among and not resembles[i]):
            for shingle in rarest:
                kept_with.setdefault(shingle, []).append(i)
    return resembles[len(reference) :]


def _shingles(texts: Sequence[str], width: int) -> list[NDArray[np.int64]]:
    """Each text's set of shingles as a sorted array of ranks, 0 the rarest. A short text is one shingle."""
    if not texts:
        return []
    numbers: defaultdict[str, int] = defaultdict(itertools.count(1).__next__)
    ids: list[int] = []
    lengths = []
    for text in texts:
        words = [numbers[word] for word in _WORD.findall(text.lower())]
        words += [0] * (width - len(words))
        ids += words
        lengths.append(len(words))
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(texts)), lengths)
    flat = np.array([*ids, *[0] * (width - 1)], dtype=np.uint64)
    shingle = np.zeros(len(ids), dtype=np.uint64)
    for k in range(width):  # a polynomial of the words' numbers, modulo 2^64
        shingle = shingle * np.uint64(0x9E3779B97F4A7C15) + flat[k : k + len(ids)]
    inside = np.arange(len(ids)) + width <= ends[owner]  # not across the end of its text
    _, which, uses = np.unique(shingle[inside], return_inverse=True, return_counts=True)
    rank = np.empty(len(uses), dtype=np.int64)
    rank[np.argsort(uses, kind="stable")] = np.arange(len(uses))
    members = np.sort(owner[inside] * len(uses) + rank[which])
    owner, member = np.divmod(members[np.diff(members, prepend=-1) > 0], len(uses))
    return np.split(member, np.searchsorted(owner, np.arange(1, len(texts))))


def quickstart_data(
    seed: int = 0,
    held_out: Sequence[str] = ("pandas", "networkx"),
    n_queries: int = 500,
    n_documents: int = 1_200,
) -> DocstringData:
    """Training pairs, and a score set: `n_documents` of the packages `held_out`, `n_queries` of their queries.

    Both are drawn with `random.Random(seed)` from the pairs sorted by name, and depend on the held-out
    packages alone, not on what else is installed. No training pair is a near-duplicate of the score set
    (Jaccard similarity of the documents' 8-word shingles or of the queries' words >= 0.8). Fewer pairs than
    asked for are all used, and `description` says so. Raises AnchorvecError when a held-out package is not
    installed.
    """
    installed = _packages()
    held = _scan(installed, held_out)
    draw = random.Random(seed)
    drawn = draw.sample(held.pairs, min(n_documents, len(held.pairs)))
    score = sorted(drawn, key=lambda pair: pair.name)
    queries = sorted(drawn[:n_queries], key=lambda pair: pair.name)
    training = _scan(installed, set(installed) - set(held_out), score)

    asked = {pair.name for pair in queries}
    rows = [[pair.name, pair.query if pair.name in asked else "", pair.document] for pair in score]
    fingerprint = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    description = {
        "seed": seed,
        "fingerprint": fingerprint,
        "held_out": list(held_out),
        "score_documents": len(score),
        "score_documents_asked_for": n_documents,
        "score_queries": len(queries),
        "score_queries_asked_for": n_queries,
        "train_pairs": len(training.pairs),
        "counts": {"train": dict(training.counts), "held_out": dict(held.counts)},
        "packages": _describe_packages([*training.pairs, *score]),
    }
    return DocstringData(training.pairs, score, queries, fingerprint, description)


def _describe_packages(pairs: Iterable[DocstringPair]) -> dict[str, dict[str, Any]]:
    """For each distribution (Python for the standard library): its version and how many pairs are from it."""
    distributions = importlib.metadata.packages_distributions()
    counts: Counter[str] = Counter()
    for pair in pairs:
        is_python = pair.package in sys.stdlib_module_names
        counts["Python" if is_python else distributions.get(pair.package, [pair.package])[0]] += 1
    described = {}
    for name, count in sorted(counts.items()):
        try:
            version = platform.python_version() if name == "Python" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a folder that somebody copied there
            version = "unknown"
        described[name] = {"version": version, "pairs": count}
    return described
