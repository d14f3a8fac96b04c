"""Tiny real models and tokenizers: random weights, every family that the product names."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # else their threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line does
os.environ["ANCHORVEC_CACHE"] = ""  # no vectors are kept but where a test names a folder

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from anchorvec.pipeline import train
from anchorvec.recipe import load_recipe
from support import QUICK


@pytest.fixture
def save_base(tmp_path):
    """A function that saves a model and a tokenizer as a base folder and returns the folder."""

    def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str = "base"):
        folder = tmp_path / name
        model.float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module", autouse=True)
def cheap_collections():
    """A run collects garbage several times; what was there before a module need not be gone through each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def disk_is_not_waited_for():
    """What a process that is killed has written stays; only a power cut needs more, which no test makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anchorvec.files.os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def layers_are_not_timed():
    """What plans tell of this machine's time is tested where it is measured, in `test_planning`."""
    from anchorvec.planning.probe import Pace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anchorvec.planning.whole.save_layers", lambda setup, folder: [])
        patch.setattr("anchorvec.planning.whole.measure", lambda *of_stage: Pace(1e-5, 2e-5, 1e-9))
        yield


@pytest.fixture
def own_data_cache(tmp_path, monkeypatch):
    """Arrow files go to the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hugging Face hub, which all libraries ask in its place; their caches are empty."""
    import datasets
    import huggingface_hub.constants as constants
    from huggingface_hub import hf_api

    from hub import hub_here

    with hub_here() as (found, address):
        for name, value in {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        # kept since they were imported, or first used
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data_cache")
        monkeypatch.setenv("HF_TOKEN", "hf_of_someone")
        yield found


@pytest.fixture(scope="session")
def interrupted_values(tmp_path_factory):
    """The recipe's values of the runs that tests interrupt."""
    import interrupting

    return interrupting.values(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def uninterrupted(interrupted_values, tmp_path_factory):
    """The folder of a run with these values that nothing interrupted."""
    from support import recipe

    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(recipe({**interrupted_values, "output": str(folder)}))
    return folder


@pytest.fixture(scope="session")
def texts_run(tmp_path_factory):
    """The run with the values `wiring.TEXTS`, and what it must have done."""
    return _watched_run(tmp_path_factory.mktemp("texts"), "TEXTS")


@pytest.fixture(scope="session")
def words_run(tmp_path_factory):
    """The run with the values `wiring.WORDS`, and what it must have done."""
    return _watched_run(tmp_path_factory.mktemp("words"), "WORDS")


def _watched_run(folder, name):
    import support
    import wiring

    values = {"data.train": wiring.sources(folder / "data"), **getattr(wiring, name)}
    return wiring.expected(support.train(folder / "run", values), values)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run of the recipe `debug`, cut to three steps a stage, with LoRA in Stage II."""
    output = tmp_path_factory.mktemp("run") / "run"
    lora = ["stage_two.lora.r=4", "stage_two.lora.alpha=8"]
    train(load_recipe("debug", [f"output={output}", *QUICK, *lora]))
    return output
