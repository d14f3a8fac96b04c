"""Recipes as files: those that are shipped, what is saved, and the reference page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import anchorvec
from anchorvec.errors import AnchorvecError
from anchorvec.recipe import (
    DataSettings,
    EndPrompt,
    EvaluationSettings,
    Lora,
    ModelSettings,
    Recipe,
    StageOne,
    StageTwo,
    TrainData,
    dump_recipe,
    load_recipe,
    recipe_names,
    save_recipe,
)
from anchorvec.recipe.reference import reference

DATA = "data: {train: [{path: pairs.jsonl}]}\n"
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that messages show short relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> Recipe:
    """The recipe of a file `my.yaml` with this text."""
    Path("my.yaml").write_text(text, encoding="utf-8")
    return load_recipe("my.yaml", overrides)


def mistake(text: str, *overrides: str) -> str:
    """What is said of a bad recipe; always one line."""
    with pytest.raises(AnchorvecError) as caught:
        load(text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shipped_recipes() -> None:
    """Each shipped recipe is valid; the names are those that the documentation promises."""
    assert [name for name in recipe_names() if not name.startswith("arms/")] == [
        "debug",
        "paper/base",
        "paper/llama-3.1-8b",
        "paper/llama-3.2-1b",
        "paper/llama-3.2-3b",
        "paper/mistral-7b",
        "paper/qwen2.5-1.5b",
        "quickstart",
    ]
    for name in recipe_names():
        load_recipe(name)


def test_a_path_object_is_never_a_shipped_name() -> None:
    """A file in the way of a shipped name is reached as a `Path`, or with its ending."""
    Path("debug").write_text(DATA + "seed: 7")
    assert load_recipe(Path("debug")).seed == 7
    assert load_recipe("debug").model.base == "tiny"


def test_paper_recipes_differ_in_the_model_only() -> None:
    """The five models of the paper have its settings: 14 data sets, the end token no target, LoRA."""
    base = load_recipe("paper/base")
    for name in recipe_names():
        if name.startswith("paper/"):
            recipe = load_recipe(name)
            assert recipe == base.model_copy(update={"model": recipe.model})
            assert recipe.model == base.model.model_copy(update={"base": recipe.model.base})
    assert base.stage_one == StageOne(end_token_target=False, gradient_checkpointing=True)
    assert base.stage_two == StageTwo(gradient_checkpointing=True)
    assert len(base.data.train) == 14
    assert all(re.fullmatch(r"Instruct: .+\nQuery: ", source.instruction) for source in base.data.train)
    symmetric = [source for source in base.data.train if source.document_instruction]
    assert [source.name for source in symmetric] == ["allnli", "quora_duplicates"]
    assert all(source.document_instruction == source.instruction for source in symmetric)
    assert {source.name: source.weight for source in base.data.train if source.weight != 1} == {
        "eli5_question_answer": 0.1,
        "msmarco_passage": 0.5,
        "msmarco_document": 0.2,
        "quora_duplicates": 0.1,
        "t2ranking": 0.5,
    }


def test_saving_replaces_the_file_whole(folder: Path) -> None:
    """The folder is made, an older file replaced, and nothing else left behind."""
    path = folder / "runs" / "first" / "recipe.yaml"
    for name in ("quickstart", "debug"):
        save_recipe(load_recipe(name), path)
        assert load_recipe(path) == load_recipe(name)
    assert list(path.parent.iterdir()) == [path]


texts = st.text(max_size=20) | st.sampled_from(["no", "4e-5", "08", "1_0", "~", "2024-01-01", "<<", "Q: \n", "'\"\x85"])
numbers = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
counts = st.integers(1, 10**6)
stage = {
    "steps": st.integers(10**6, 10**9),
    "warmup_steps": counts,
    "learning_rate": numbers,
    "log_every": counts,
}
recipes = st.builds(
    Recipe,
    model=st.builds(
        ModelSettings,
        base=texts.filter(bool),
        revision=st.none() | texts,
        max_tokens=st.integers(8, 10**6),
        end=st.just("token") | st.builds(EndPrompt, before=texts, after=texts.filter(bool)),
    ),
    data=st.builds(
        DataSettings,
        max_tokens=st.none() | st.just(8),
        train=st.lists(
            st.builds(TrainData, path=texts.filter(bool), instruction=texts, weight=numbers),
            min_size=1,
            max_size=3,
            unique_by=lambda source: source.name,
        ),
    ),
    stage_one=st.builds(StageOne, **stage, alpha=st.floats(0, 1), max_target_tokens=st.none() | counts),
    stage_two=st.none() | st.builds(StageTwo, **stage, lora=st.none() | st.builds(Lora), temperature=numbers),
    evaluation=st.builds(EvaluationSettings, tasks=st.lists(texts, max_size=2)),
    output=st.none() | st.sampled_from([Path("runs/x"), Path("/a b/ü: #")]),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=150, deadline=None)
@given(recipes)
def test_a_dumped_recipe_loads_as_the_same_recipe(recipe: Recipe) -> None:
    """Whatever the texts and numbers in it."""
    assert load(dump_recipe(recipe)) == recipe


def test_the_reference_page_is_up_to_date() -> None:
    """docs/recipe.md is what `reference` gives; its first lines say how to write it again."""
    assert (DOCS / "recipe.md").read_text(encoding="utf-8") == reference()


def test_the_example_in_the_reference_page_is_valid() -> None:
    """The YAML in the head of docs/recipe.md loads, and does what its comments say."""
    example = re.search(r"```yaml\n(.*?)```", reference(), re.DOTALL)
    assert example is not None
    recipe = load(example[1])
    assert recipe.stage_two is not None
    assert (recipe.stage_two.lora, recipe.stage_two.temperature) == (None, 0.05)
    assert recipe.data.train[0].instruction.endswith("Query: ")


def test_every_key_is_documented() -> None:
    """Each field of each section is a row of the reference page with a meaning."""
    sections: list[type[BaseModel]] = [
        Recipe,
        ModelSettings,
        EndPrompt,
        DataSettings,
        TrainData,
        StageOne,
        StageTwo,
        Lora,
        EvaluationSettings,
    ]
    page = reference()
    for section in sections:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no docstring"
            assert f"| `{name}` |" in page


def test_the_recipe_layer_does_not_load_torch() -> None:
    """`anchorvec --help` and a mistake in a recipe answer at once."""
    code = "import sys, anchorvec.recipe as r; r.load_recipe('debug'); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(anchorvec.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_a_tilde_in_the_output_is_the_home_folder(tmp_path, monkeypatch):
    """A folder that is called `~` would be a trap for whoever removes it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe("debug", ["output=~/run"]).output == tmp_path / "run"
    assert load_recipe("debug", ["output=~nobody-of-this-name/run"]).output == Path("~nobody-of-this-name/run")
