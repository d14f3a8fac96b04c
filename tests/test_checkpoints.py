"""A checkpoint counts with its manifest alone, and what cannot be written costs nothing that was written before."""

import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import save_file

from anchorvec import files
from anchorvec.errors import AnchorvecError
from anchorvec.files import new_folder, write_text
from anchorvec.run import Run
from anchorvec.training import checkpoints as module
from anchorvec.training.checkpoints import MANIFEST, Checkpoints, is_complete


def write(checkpoints, step):
    """A checkpoint with two files."""
    with checkpoints.writing_step(step) as folder:
        (folder / "a.bin").write_bytes(b"a" * 1000 + bytes([step]))
        (folder / "b.json").write_text("{}")
    return folder


@pytest.fixture
def checkpoints(tmp_path):
    """Two complete checkpoints, of steps 8 and 10."""
    found = Checkpoints(tmp_path / "stage", limit=2)
    for step in (8, 10):
        write(found, step)
    return found


def steps(checkpoints):
    """Of all folders that are there."""
    return sorted(int(path.name.rpartition("-")[2]) for path in checkpoints.folder.iterdir())


def test_the_newest_complete_one_is_taken(checkpoints, capsys):
    """By its number; one that was cut off does not count, is removed, and that is said."""
    assert checkpoints.newest() == checkpoints.of_step(10)
    half = checkpoints.of_step(12)
    half.mkdir()
    (half / "a.bin").write_bytes(b"a")
    assert checkpoints.newest() == checkpoints.of_step(10)
    assert f"{half}: this checkpoint was not written to its end" in capsys.readouterr().err
    assert steps(checkpoints) == [8, 10]
    assert Checkpoints(checkpoints.folder / "nowhere", limit=2).newest() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "a.bin").write_bytes(b"a" * 1000), "a.bin has not the size"),
        (lambda folder: (folder / "a.bin").write_bytes(b"a" * 1000 + b"?"), "a.bin is not what was written"),
        (lambda folder: (folder / "b.json").unlink(), "b.json is missing"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"?"), "optimizer.pt is no part of it"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": [1]}'), "manifest.json cannot be read"),
        (
            lambda folder: [(folder / "b.json").rename(folder.parent / "b"), (folder / "b.json").symlink_to("../b")],
            "b.json",
        ),
    ],
    ids=["cut short", "altered", "missing", "added", "no JSON", "no manifest", "a link"],
)
def test_one_that_was_altered_is_an_error(checkpoints, change, message):
    """With what is wrong and what to do; nothing is removed. Without that folder it goes on from the one before."""
    folder = checkpoints.of_step(10)
    change(folder)
    with pytest.raises(AnchorvecError, match=f"{folder}: .*{message}.*; remove that folder to go on"):
        checkpoints.newest()
    assert checkpoints.of_step(8).is_dir()
    assert folder.is_dir()
    shutil.rmtree(folder)
    assert checkpoints.newest() == checkpoints.of_step(8)


def test_older_ones_are_removed_after_a_newer_one_is_complete(checkpoints):
    """Never before, and never the last complete one."""
    with checkpoints.writing_step(12) as folder:
        assert steps(checkpoints) == [8, 10, 12]
        assert not is_complete(folder)
    assert steps(checkpoints) == [10, 12]
    with pytest.raises(ZeroDivisionError), checkpoints.writing_step(14):
        1 / 0  # noqa: B018
    assert steps(checkpoints) == [10, 12]
    once = Checkpoints(checkpoints.folder, limit=1)
    write(once, 14)
    assert steps(once) == [14]


def test_all_is_on_the_disk_before_the_manifest_is(checkpoints, monkeypatch):
    """Every file, then the manifest, then the folder: a machine may lose its power at any moment."""
    synced = []

    def recorded(path):
        synced.append((path.name, (checkpoints.of_step(12) / MANIFEST).exists()))

    monkeypatch.setattr(files, "sync", recorded)
    monkeypatch.setattr(module, "sync", recorded)
    write(checkpoints, 12)
    before = [name for name, there in synced if not there]
    assert set(before[:2]) == {"a.bin", "b.json"}
    assert before[2:4] == ["checkpoint-12", "stage"]
    assert before[4].startswith(f".{MANIFEST}")
    assert [name for name, there in synced if there] == ["checkpoint-12"]


class Limit:
    """A limit on the size of files, which the system keeps as it does a full disk."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


LARGE = {"a": torch.zeros(50_000)}
WRITERS = {
    "safetensors": lambda folder: save_file(LARGE, folder / "a.safetensors"),
    "torch": lambda folder: torch.save(LARGE, folder / "a.pt"),
    "python": lambda folder: (folder / "a.txt").write_text("a" * 200_000),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_clear_error(checkpoints, tmp_path, writer):
    """Whichever library meets it; the last good checkpoint is named and stays, and nothing half-written does."""
    full = r"the disk is full; .* \(the last good checkpoint is .*/checkpoint-10\)"
    with Limit(50_000), pytest.raises(AnchorvecError, match=full), checkpoints.writing_step(12) as folder:
        writer(folder)
    full = "stage_one cannot be written: the disk is full"
    with Limit(50_000), pytest.raises(AnchorvecError, match=full), new_folder(tmp_path / "stage_one") as folder:
        writer(folder)
    assert steps(checkpoints) == [8, 10]
    assert not (tmp_path / "stage_one").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_a_full_disk_leaves_a_file_as_it_was(tmp_path):
    """The new text is written beside it first."""
    write_text(tmp_path / "run.json", "old")
    with Limit(1_000), pytest.raises(AnchorvecError, match=r"run.json cannot be written: the disk is full"):
        write_text(tmp_path / "run.json", "new" * 1_000)
    assert (tmp_path / "run.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path):
    """Before any data are read; root, who may write everywhere, is another user here for a moment."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65_534)
        for open_ in (Run.create, Run.resume):
            with pytest.raises(AnchorvecError, match=r"output: .*locked cannot be written; name a folder of your own"):
                open_(locked)
        with pytest.raises(AnchorvecError, match=r"output: .*new cannot be made: Permission denied"):
            Run.create(locked / "new")
    finally:
        if is_root:
            os.seteuid(0)


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    """Another one is told so; what a killed one has left half-written is removed."""
    (tmp_path / ".base.123.tmp").mkdir()
    (tmp_path / ".run.json.123.tmp").write_text("{")
    with Run(tmp_path).locked():
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
        with pytest.raises(AnchorvecError, match="another process is at work in"), Run(tmp_path).locked():
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_log_is_cut_back(tmp_path):
    """To a step of a stage; a line that was cut short goes, what comes before stays as it was written."""
    lines = [json.dumps({"stage": stage, "step": step}) for stage in ("stage_one", "stage_two") for step in (1, 2, 3)]
    log = tmp_path / "log.jsonl"
    for stage, step, kept in [("stage_two", 2, 5), ("stage_two", 0, 3), ("stage_one", 3, 3), ("stage_one", 0, 0)]:
        log.write_text("\n".join(lines) + '\n{"stage": "stage_t')
        Run(tmp_path).cut_log(stage, step)
        assert log.read_text().splitlines() == lines[:kept]
