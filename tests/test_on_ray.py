"""Encoding on a Ray cluster: how many workers, and that the vectors are those of one process, whoever dies."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from anchorvec import cli
from anchorvec.device import devices_named
from anchorvec.errors import AnchorvecError
from anchorvec.model.embedder import build_embedder
from anchorvec.model.loading import load_encoder
from anchorvec.model.on_ray import _shares
from anchorvec.model.text_encoder import TextEncoder
from anchorvec.model.vector_cache import VectorCache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random embedder."""
    return build_embedder("tiny", tmp_path_factory.mktemp("model") / "tiny", max_tokens=64)


@pytest.mark.parametrize(
    ("nodes", "count", "expected"),
    [
        ([{"CPU": 0}, {"CPU": 4}, {"CPU": 2}], None, (2, {"num_cpus": 2})),
        ([{"CPU": 4}], 2, (2, {"num_cpus": 2})),
        ([{"CPU": 2}, {"CPU": 2}], 9, (4, {"num_cpus": 1})),
        ([{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}], None, (8, {"num_gpus": 1})),
        ([{"CPU": 8, "GPU": 4}], 2, (2, {"num_gpus": 1})),
    ],
)
def test_each_gpu_or_else_each_machine_has_a_worker(
    nodes: list[dict[str, float]], count: int | None, expected: tuple[int, dict[str, float]]
) -> None:
    """Unless another number is asked for; more than there are cores or GPUs there are not."""
    assert _shares(nodes, count) == expected


def test_what_ray_cannot_do_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, before any text; on a cluster without a core; devices by their names."""
    with pytest.raises(AnchorvecError, match="no machine with a core"):
        _shares([{"CPU": 0.5}], None)
    assert len(devices_named("3", ray=True)) == 3
    with pytest.raises(AnchorvecError, match="'cuda:0' is no number of workers"):
        devices_named("cuda:0", ray=True)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(AnchorvecError, match=r"pip install 'anchorvec\[ray\]'"):
        TextEncoder(load_encoder(folder), ray=True)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of two machines with a core each, both of them processes here, and one that only directs them."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def workers() -> list[int]:
    """The processes of the cluster that hold a model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # gone meanwhile
            if "_Worker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


@pytest.mark.slow
def test_a_killed_worker_of_a_cluster_changes_no_vector(folder: Path, tmp_path: Path, cluster: Any) -> None:
    """100,000 texts; another worker takes its place. All of them are kept then, and serve without the cluster."""
    texts = [f"text {i} of {i % 97} and {i % 89}" for i in range(100_000)]
    model, cache = load_encoder(folder), VectorCache(tmp_path, 10**9)
    seen: set[int] = set()
    killed: list[int] = []

    def watch(_: int) -> None:
        seen.update(workers())
        if not killed and encode.encoded > 30_000:
            killed.append(workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    with TextEncoder(model, cache=cache, batch_size=64, ray=True, on_texts=watch) as encode:
        vectors = encode(texts, side="document")
    assert encode.encoded == len(texts)
    assert len(killed) == 1
    assert len(seen) == 3, seen
    np.testing.assert_allclose(vectors, TextEncoder(model, batch_size=64)(texts, side="document"), atol=1e-5)
    alone = TextEncoder(model, cache=cache)
    assert alone(texts, side="document").tobytes() == vectors.tobytes()
    assert alone.encoded == 0


@pytest.mark.slow
def test_search_encodes_on_a_cluster_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Where there is none, it starts one on this machine, and ends it."""
    ray = pytest.importorskip("ray")
    (tmp_path / "a.txt").write_text("a text")
    cli.app(["search", str(folder), str(tmp_path / "a.txt"), "--query", "text", "--ray"], standalone_mode=False)
    assert not ray.is_initialized()
