"""Recipes: what is accepted, what a mistake is told, and that a saved recipe is the same recipe."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from anchorvec.errors import AnchorvecError
from anchorvec.recipe import EndPrompt, Lora, Recipe, StageOne, StageTwo, TrainData, load_arm, load_recipe

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


# -- defaults and values


def test_defaults_are_the_paper_s_numbers() -> None:
    """A recipe that names only its data has the settings of the paper."""
    recipe = load(DATA)
    assert recipe.stage_one == StageOne(steps=2000, pairs_per_step=512, learning_rate=4e-5, warmup_steps=300, alpha=0.2)
    assert recipe.stage_two == StageTwo(
        steps=1000, pairs_per_step=512, learning_rate=2e-4, temperature=0.05, lora=Lora(r=16, alpha=32)
    )
    assert (recipe.model.max_tokens, recipe.model.end) == (512, "token")


@pytest.mark.parametrize("written", ["4e-5", "4E-5", "4.0e-5", "0.00004", "+4e-05"])
def test_numbers_may_be_written_without_a_point(written: str) -> None:
    """`4e-5` is a number, though YAML 1.1 takes it for text."""
    recipe = load(f"{DATA}stage_one: {{learning_rate: {written}}}")
    assert recipe.stage_one is not None
    assert recipe.stage_one.learning_rate == 4e-5


@pytest.mark.parametrize("written", ["no", "on", "2024-01-01", "1:30", "1_a", "08", "'4e-5'"])
def test_plain_words_stay_text(written: str) -> None:
    """What YAML 1.1 takes for a boolean, a date or a time is text."""
    recipe = load(f"data: {{train: [{{path: a.jsonl, split: {written}}}]}}")
    assert recipe.data.train[0].split == written.strip("'")


def test_no_value_is_converted() -> None:
    """A text is no number, a number with a point is no integer, and 1 is no boolean."""
    assert "stage_one.steps: should be a valid integer, not '3'" in mistake(
        DATA + "stage_one: {steps: '3', warmup_steps: 0}"
    )
    assert "seed: should be a valid integer, not 1.0" in mistake(DATA + "seed: 1.0")
    assert "data.strict: should be a valid boolean, not 1" in mistake(DATA, "data.strict=1")


def test_an_integer_is_a_number() -> None:
    """`weight: 2` need not be written `2.0`."""
    assert load(DATA, "data.train.0.weight=2").data.train[0].weight == 2.0


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/nq.jsonl", "nq"),
        ("data/nq.csv.gz", "nq"),
        ("data/nq/", "nq"),
        ("org/nq-v1.5", "nq-v1.5"),
        ("builtin:debug", "debug"),
    ],
)
def test_a_data_set_is_called_after_its_path(path: str, name: str) -> None:
    """The name is the last part of the path, without the ending of a data file."""
    assert TrainData(path=path).name == name


def test_a_recipe_cannot_be_changed() -> None:
    """What is saved beside a result is what was run."""
    with pytest.raises(ValidationError):
        load(DATA).seed = 3  # type: ignore[misc]


def test_an_end_prompt_is_a_section() -> None:
    """`model.end` takes words before and after the text."""
    recipe = load(DATA + "model: {end: {before: '', after: ' means: '}}")
    assert recipe.model.end == EndPrompt(before="", after=" means: ")


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_null_switches_a_stage_off(stage: str) -> None:
    """One stage may be null; a section that is not written is on."""
    recipe = load(f"{DATA}{stage}: null")
    assert [recipe.stage_one is None, recipe.stage_two is None] == [
        stage == "stage_one",
        stage == "stage_two",
    ]


# -- mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "stage_one: {learning_rte: 1e-4}",
            "my.yaml: stage_one.learning_rte: unknown key; did you mean stage_one.learning_rate?",
        ),
        (
            "stage_one: {temperature: 0.1}",
            "my.yaml: stage_one.temperature: unknown key; did you mean stage_two.temperature?",
        ),
        (
            "stage_two: {lora: {rnk: 8}}",
            "my.yaml: stage_two.lora.rnk: unknown key; the keys here are r,",
        ),
        ("sead: 1", "my.yaml: sead: unknown key; did you mean seed?"),
        ("5: 1", "my.yaml: 5: unknown key; the keys here are about, model, data,"),
        (
            "stage_one: {steps: 0, warmup_steps: 0}",
            "my.yaml: stage_one.steps: should be greater than 0, not 0",
        ),
        ("stage_one: {alpha: 1.5}", "my.yaml: stage_one.alpha: should be less than or equal to 1, not 1.5"),
        ("stage_two: {temperature: 0}", "my.yaml: stage_two.temperature: should be greater than 0, not 0"),
        ("stage_two: {learning_rate: 1e999}", "my.yaml: stage_two.learning_rate: should be a finite number"),
        ("model: {max_tokens: 7}", "my.yaml: model.max_tokens: should be greater than or equal to 8, not 7"),
        (
            "model: {precision: fp16}",
            "my.yaml: model.precision: should be 'auto', 'bf16' or 'fp32', not fp16",
        ),
        ("model: {revision: 1234}", "my.yaml: model.revision: should be text, not 1234; put it in quotes"),
        (
            "model: {end: eos}",
            "my.yaml: model.end: should be `token`, `none`, or a section with `before`",
        ),
        ("model: {end: {before: x}}", "my.yaml: model.end.after: missing, and it has no default"),
        ("model: {end: {before: x, after: ''}}", "my.yaml: model.end.after: should not be empty"),
        ("output: 7", "my.yaml: output: should be text, not 7; put it in quotes"),
        ("stage_one: 5", "my.yaml: stage_one: should be a section of keys and values, not 5"),
    ],
)
def test_a_mistake_names_file_key_and_what_to_write(text: str, message: str) -> None:
    """One line: the file, the dotted key, what is wrong, and the nearest valid key."""
    assert mistake(DATA + text).startswith(message)


def test_several_mistakes_are_counted() -> None:
    """The first one is told, and how many more there are; an unknown key goes first, as it causes others."""
    message = mistake("data: {tain: []}\nseed: -1")
    assert message == "my.yaml: data.tain: unknown key; did you mean data.train? (and 2 more)"


def test_warm_up_longer_than_the_run_names_both_keys() -> None:
    """A stage that ends in its warm-up is refused, with the value that was not written too."""
    assert mistake(DATA + "stage_two: {steps: 100}") == (
        "my.yaml: stage_two.warmup_steps, stage_two.steps: 300 steps of warm-up do not fit into 100 steps; set both"
    )


def test_training_on_more_than_the_model_reads_is_refused() -> None:
    """The limit for training is at most that of the model."""
    assert mistake("data: {train: [{path: x}], max_tokens: 600}") == (
        "my.yaml: data.max_tokens: 600 is more than the 512 of model.max_tokens; lower it, or raise that"
    )


def test_a_run_without_stages_is_refused() -> None:
    """Both stages null leaves nothing to do."""
    assert mistake(DATA + "stage_one: null\nstage_two: null") == (
        "my.yaml: stage_one, stage_two: both are null, so there is nothing to train; leave one on"
    )


@pytest.mark.parametrize("text", ["", "seed: 1", "data: {}", "data: {train: []}"])
def test_missing_data_say_what_to_write(text: str) -> None:
    """A recipe without data, an empty file included, tells the override that names some."""
    assert "data.train.0.path=pairs.jsonl" in mistake(text)
    assert mistake(text, "seed=2").startswith("my.yaml: data")


def test_data_sets_have_different_names() -> None:
    """Two files of the same name would be mixed up in logs and batches."""
    text = "data: {train: [{path: a/train.jsonl}, {path: b/train.jsonl}]}"
    assert mistake(text) == (
        "my.yaml: data.train.1.name, data.train.0.name: both data sets are called train; give each its own name"
    )
    assert load(text, "data.train.1.name=b").data.train[1].name == "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: {base: x", "my.yaml:2: not valid YAML: "),
        ("seed: 1\nmodel: a: b", "my.yaml:2: not valid YAML: "),
        ("seed: 1\nseed: 2", "my.yaml:2: not valid YAML: seed is there twice"),
        ("seed: !!int abc", "my.yaml:1: not valid YAML: a tag, such as !!int, has no place in a recipe"),
        ("seed: 1\nmodel: \0", "my.yaml:2: not valid YAML: "),
        ("? [a]\n: 1", "my.yaml:1: not valid YAML: "),
        ("- path: x", "my.yaml: a recipe is keys and values"),
    ],
)
def test_broken_yaml_names_the_line(text: str, message: str) -> None:
    """A file that cannot be parsed is shown with file:line; a key that is written twice counts as broken."""
    assert mistake(text).startswith(message)


def test_a_file_in_another_encoding_is_refused() -> None:
    """The line of the first byte that is not UTF-8 is named."""
    Path("my.yaml").write_bytes("seed: 1\n# für\n".encode("latin-1"))
    with pytest.raises(AnchorvecError, match=r"^my\.yaml:2: not UTF-8"):
        load_recipe("my.yaml")


def test_a_missing_recipe_names_the_nearest_shipped_one() -> None:
    """Neither a file nor a shipped name."""
    with pytest.raises(AnchorvecError, match=r"^papr/base\.yaml: no such file.*did you mean paper/base\?$"):
        load_recipe("papr/base.yaml")


# -- overrides


def test_overrides_are_yaml_values() -> None:
    """Numbers, null, lists and texts are written as in the file; the last of two overrides wins."""
    recipe = load(
        DATA,
        "seed=1",
        "seed=2",
        "stage_one=null",
        "evaluation.tasks=[A, B]",
        "output=runs/x",
        "model.revision=",
    )
    assert (recipe.seed, recipe.stage_one, recipe.evaluation.tasks) == (2, None, ["A", "B"])
    assert (recipe.output, recipe.model.revision) == (Path("runs/x"), None)


def test_overrides_reach_into_lists() -> None:
    """A number in the key is a place in a list; the place after the last one adds an entry."""
    recipe = load(DATA, "data.train.0.weight=0.5", "data.train.1.path=b.jsonl")
    assert [(source.path, source.weight) for source in recipe.data.train] == [
        ("pairs.jsonl", 0.5),
        ("b.jsonl", 1.0),
    ]
    assert mistake(DATA, "data.train.2.path=c.jsonl") == (
        "command line: data.train.2: the list is shorter; its next entry is data.train.1"
    )


def test_an_override_can_be_all_the_data() -> None:
    """A recipe without data is completed on the command line."""
    assert load("seed: 1", "data.train.0.path=b.jsonl").data.train == [TrainData(path="b.jsonl")]


def test_an_override_switches_a_stage_on() -> None:
    """A key of a section that the file has switched off gives the section its defaults."""
    assert load(DATA + "stage_one: null", "stage_one.steps=500").stage_one == StageOne(steps=500)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage_one.learning_rte=1", "command line: stage_one.learning_rte: unknown key; did you mean"),
        (
            "learning_rate=1",
            "command line: learning_rate: unknown key; did you mean stage_one.learning_rate or",
        ),
        ("stage_one.steps=-1", "command line: stage_one.steps: should be greater than 0, not -1"),
        ("extends=debug", "command line: extends: unknown key"),
        ("0=1", "command line: 0: unknown key"),
        ("seed", "command line: seed: write key=value"),
        ("=1", "command line: =1: write key=value"),
        ("model..base=x", "command line: model..base=x: write key=value"),
        (
            "data.train.0.instruction=Query: ",
            "command line: data.train.0.instruction: should be text, not {Query: null}",
        ),
        (
            "data.train.0.instruction=a: b: ",
            "command line: data.train.0.instruction: 'a: b: ' is not valid YAML",
        ),
    ],
)
def test_a_bad_override_is_the_command_line_s(override: str, message: str) -> None:
    """A mistake in an override is told like one in a file."""
    assert mistake(DATA, override).startswith(message)


def test_an_override_keeps_a_quoted_text_as_it_is() -> None:
    """What the message of an instruction with a colon says to write works."""
    override = 'data.train.0.instruction="Instruct: find it\\nQuery: "'
    assert load(DATA, override).data.train[0].instruction == "Instruct: find it\nQuery: "


# -- extends


def test_a_child_differs_in_what_it_writes() -> None:
    """Sections are merged key by key, lists replaced; null replaces a section; paths count from the file."""
    Path("below").mkdir()
    Path("below/base.yaml").write_text(
        DATA
        + "seed: 5\nstage_one: {alpha: 0.5, log_every: 3}\n"
        + "stage_two: {lora: {r: 8}}\nevaluation: {tasks: [A, B]}"
    )
    Path("below/child.yaml").write_text("extends: base.yaml\nstage_one: {alpha: 0.7}\nevaluation: {tasks: [C]}")
    recipe = load("extends: below/child.yaml\nstage_two: {lora: null}")
    assert recipe.stage_one == StageOne(alpha=0.7, log_every=3)
    assert recipe.stage_two == StageTwo(lora=None)
    assert (recipe.seed, recipe.evaluation.tasks) == (5, ["C"])


def test_a_mistake_is_told_of_the_file_that_made_it() -> None:
    """With `extends`, each value is traced back to the file, or the override, that set it last."""
    Path("base.yaml").write_text(DATA + "stage_one: {alpha: 2, steps: 400}")
    child = "extends: base.yaml\nstage_one: {log_every: 1}"
    assert mistake(child).startswith("base.yaml: stage_one.alpha: ")
    assert mistake(child + "\nseed: -1", "stage_one.alpha=0").startswith("my.yaml: seed: ")
    assert mistake(child, "stage_one.alpha=3").startswith("command line: stage_one.alpha: ")
    # A rule about two keys: the one that was set last broke it.
    assert mistake(child, "stage_one.alpha=0", "stage_one.steps=9").startswith("command line: stage_one.warmup_steps, ")
    Path("base.yaml").write_text(DATA + "stage_one: {warmup_steps: 300}")
    assert mistake("extends: base.yaml\nstage_one: {steps: 9}", "stage_one.alpha=0").startswith("my.yaml: stage_one.")


def test_a_shipped_recipe_can_be_extended_and_is_named() -> None:
    """`extends` takes a shipped name; a child that breaks a rule of two keys is the one to mend."""
    assert load("extends: debug\nseed: 3").seed == 3
    assert mistake("extends: debug\nstage_one: {steps: 1}").startswith("my.yaml: stage_one.warmup_steps, ")


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ("my.yaml", "my.yaml: extends: goes in a circle, my.yaml -> my.yaml"),
        ("other.yaml", "other.yaml: extends: goes in a circle, my.yaml -> other.yaml -> my.yaml"),
        ("nope.yaml", "my.yaml: extends: nope.yaml: no such file"),
        (
            "papr/base",
            "my.yaml: extends: papr/base: no such file, and no shipped recipe; did you mean paper/base?",
        ),
        ("[debug]", "my.yaml: extends: should be one recipe"),
    ],
)
def test_a_bad_parent_is_refused(parent: str, message: str) -> None:
    """Circles, missing parents, and several parents."""
    Path("other.yaml").write_text("extends: my.yaml")
    assert mistake(f"extends: {parent}").startswith(message)


# -- arms


def test_an_arm_is_laid_over_the_recipe() -> None:
    """What it extends first of all is left out; the command line is over both."""
    Path("root.yaml").write_text(DATA + "seed: 9\nstage_one: {alpha: 0.9}")
    Path("middle.yaml").write_text("extends: root.yaml\nstage_one: null\nstage_two: {temperature: 0.1}")
    Path("arm.yaml").write_text("extends: middle.yaml\nstage_two: {temperature: 0.2}")
    recipe = load(DATA + "seed: 5\nstage_one: {alpha: 0.4}\nstage_two: {steps: 500}")
    own = load_arm("my.yaml", "arm.yaml", ["stage_two.log_every=3"])
    assert own.stage_one is None
    assert own.stage_two == StageTwo(steps=500, temperature=0.2, log_every=3)
    assert own.seed == 5
    assert load_arm("my.yaml", "my.yaml") == recipe
    assert load_arm("my.yaml", "stage_one.alpha=0.3").stage_one == StageOne(alpha=0.3)
    Path("alone.yaml").write_text("stage_one: {log_every: 7}")
    assert load_arm("my.yaml", "alone.yaml").stage_one == StageOne(alpha=0.4, log_every=7)


@pytest.mark.parametrize("key", ["data", "evaluation", "seed", "output"])
def test_an_arm_changes_nothing_that_arms_share(key: str) -> None:
    load(DATA)
    with pytest.raises(AnchorvecError, match=rf"^arm {key}=1: {key}: all arms of a comparison share it"):
        load_arm("my.yaml", f"{key}=1")
    with pytest.raises(AnchorvecError, match=r"did you mean stage_one\.alpha"):
        load_arm("my.yaml", "stage_one.alpa=1")
