"""What a folder is, is decided in one place and said; what is no base or no embedder is refused with the way on."""

import json
import shutil

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertModel

import anchorvec
from anchorvec.errors import AnchorvecError
from anchorvec.model.base import load_base
from anchorvec.model.embedder import build_embedder, can_write
from anchorvec.model.end import stored_end
from anchorvec.model.folders import identify, positions_of
from anchorvec.model.loading import load_model
from anchorvec.start import with_settings_of_base
from support import QUICK, make_model, make_tokenizer, recipe, write_rows

PAIRS = [{"query": f"q {i}", "positive": f"p {i}"} for i in range(16)]


def mean_pooled(base, folder):
    """An embedder of another kind on the weights of `base`: mean pooling, prompts, a limit of 40 tokens."""
    shutil.copytree(base, folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    types = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(types))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40, "do_lower_case": False}))
    prompts = {"prompts": {"query": "ask: ", "document": "note: "}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture
def folders(save_base, run, tmp_path):
    """A folder of each kind, by what it is."""
    base = save_base(make_model(), make_tokenizer())
    adapter = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    adapter.save_pretrained(tmp_path / "adapter")
    beside = save_base(make_model(), make_tokenizer(), "beside")
    for file in (tmp_path / "adapter").glob("adapter*"):
        shutil.copy2(file, beside)
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "data")
    config = BertConfig(vocab_size=260, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    (tmp_path / "empty").mkdir()
    return {
        "causal LM": base,
        "embedder": mean_pooled(base, tmp_path / "mean"),
        "adapter": tmp_path / "adapter",
        "adapter beside weights": beside,
        "run": run,
        "base of a run": run / "base",
        "stage_one": run / "stage_one",
        "LoRA stage": run / "stage_two",
        "export": run / "model",
        "data set": tmp_path / "data",
        "other model": tmp_path / "encoder",
        "nothing": tmp_path / "empty",
    }


def test_each_kind_is_told_from_the_others(folders):
    """By the files alone."""
    kinds = {name: identify(folder).kind for name, folder in folders.items()}
    same = {name: name for name in ("causal LM", "embedder", "adapter", "run", "LoRA stage", "data set", "nothing")}
    others = dict.fromkeys(("base of a run", "stage_one", "export"), "embedder")
    assert kinds == same | others | {"adapter beside weights": "adapter", "other model": "other model"}
    found = identify(folders["embedder"])
    assert (found.pooling, found.prompts, found.max_tokens) == ("mean", {"query": "ask: ", "document": "note: "}, 40)
    assert [identify(folders[name]).has_head for name in ("stage_one", "export")] == [True, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("causal LM", r"this is a causal LM \(LlamaForCausalLM\), and an embedder is needed; `anchorvec train` makes"),
        ("adapter", "this is an adapter .* merge it into its base first"),
        ("adapter beside weights", "this is an adapter .* merge it into its base first"),
        ("run", "this is a run, .* name one of the folders in it, such as .*/model"),
        ("data set", "this is a data set, .* this one is for data.train, or for --data"),
        ("other model", r"this is a model of another kind \(BertModel\)"),
        ("nothing", "this is no model: it has no config.json"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        lambda model, data: anchorvec.evaluate(model, data=[data]),
        lambda model, data: anchorvec.search(model, data / "corpus.jsonl", ["a"]),
    ],
    ids=["evaluate", "search"],
)
def test_what_is_no_embedder_is_neither_scored_nor_searched_with(folders, tmp_path, name, message, command):
    """sentence-transformers would make one up, with mean pooling."""
    (tmp_path / "set" / "qrels").mkdir(parents=True)
    for file, text in (("corpus", "a"), ("queries", "b")):
        write_rows(tmp_path / "set" / f"{file}.jsonl", [{"_id": "1", "text": text}])
    (tmp_path / "set" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n")
    with pytest.raises(AnchorvecError, match=message):
        command(folders[name], tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter", "model.base: .* this is an adapter"),
        ("adapter beside weights", "model.base: .* this is an adapter"),
        ("run", "model.base: .* this is a run"),
        ("data set", "model.base: .* this is a data set"),
        ("other model", "model.base: "),
        ("nothing", "model.base: .* it has no config.json"),
        ("export", "is an embedder without an LM head, and Stage I needs the head; Stage II can go on from it"),
        ("LoRA stage", "is the LoRA adapter of a run's stage_two, stage_two of the run .*, and Stage I needs the head"),
    ],
)
def test_what_is_no_base_is_refused(folders, tmp_path, name, message):
    """By `plan` as by `train`, with the reason; nothing is written."""
    data = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    values = {"model.base": str(folders[name]), "data.train": [{"path": str(data)}], "output": str(tmp_path / "out")}
    for command in (anchorvec.plan, anchorvec.train):
        with pytest.raises(AnchorvecError, match=message):
            command(recipe(values))
    assert not (tmp_path / "out" / "base").exists()


@pytest.mark.parametrize("name", ["export", "LoRA stage"])
def test_stage_two_goes_on_from_an_embedder_without_a_head(folders, tmp_path, name):
    """With its very vectors; the new run's base holds no head either."""
    data = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    base = folders[name]
    overrides = [f"model.base={base}", f"data.train=[{{path: {data}}}]", f"output={tmp_path / 'out'}", "stage_one=null"]
    steps = [value for value in QUICK if value.startswith("stage_two")]
    anchorvec.train(anchorvec.load_recipe("debug", [*overrides, *steps, "model.max_tokens=64"]))
    texts = ["a text", "and another"]
    new, old = (load_model(folder).float().encode(texts, prompt="") for folder in (tmp_path / "out" / "base", base))
    assert torch.allclose(torch.from_numpy(new), torch.from_numpy(old), atol=1e-5)
    assert not can_write(tmp_path / "out" / "base")


def test_an_embedder_as_base_keeps_what_is_its_own(folders, tmp_path, capsys):
    """Its limit, end and prompts, unless the recipe names others; one line says what is kept and what is replaced."""
    data = str(write_rows(tmp_path / "pairs.jsonl", PAIRS))
    base = str(folders["embedder"])
    kept = with_settings_of_base(recipe({"model.base": base, "data.train": [{"path": data}]}))
    assert kept.model.max_tokens == 40
    assert (kept.data.train[0].instruction, kept.data.train[0].document_instruction) == ("ask: ", "note: ")
    line = capsys.readouterr().err
    assert "kept: its limit of 40 tokens; no end; pooling 'mean'; prompts query 'ask: ', document 'note: '; " in line
    assert (kept.model.pooling, kept.model.end) == ("mean", "none")
    values = {"model.base": base, "model.max_tokens": 50, "data.train": [{"path": data, "instruction": "find: "}]}
    other = with_settings_of_base(recipe({**values, "model.pooling": "lasttoken"}))
    assert other.model.max_tokens == 50
    assert (other.model.pooling, other.model.end) == ("lasttoken", "token")
    assert (other.data.train[0].instruction, other.data.train[0].document_instruction) == ("find: ", "note: ")
    assert "its limit of 40 tokens, by model.max_tokens = 50" in capsys.readouterr().err
    with pytest.raises(AnchorvecError, match=r"data.max_tokens: 48 is more than the 40 tokens"):
        with_settings_of_base(recipe({"model.base": base, "data.train": [{"path": data}], "data.max_tokens": 48}))
    assert with_settings_of_base(recipe({"model.base": str(folders["causal LM"])})).model.max_tokens == 512


def test_a_data_set_keeps_the_prompt_of_its_name(save_base, tmp_path):
    """Before that of all queries or documents; and an instruction of its own before both."""
    base = save_base(make_model(), make_tokenizer())
    prompts = {"query": "any: ", "mine-query": "mine: ", "mine-document": "note: "}
    folder = str(build_embedder(base, tmp_path / "embedder", max_tokens=48, prompts=prompts))
    sources = [{"path": "a.jsonl", "name": name} for name in ("mine", "other")]
    kept = with_settings_of_base(recipe({"model.base": folder, "data.train": sources})).data.train
    assert [(source.instruction, source.document_instruction) for source in kept] == [
        ("mine: ", "note: "),
        ("any: ", ""),
    ]


def test_the_default_limit_is_within_the_positions_of_the_base(save_base, capsys):
    """One line says so; a limit that the recipe names is left for the checks to refuse."""
    model = make_model()
    model.config.max_position_embeddings = 100
    base = str(save_base(model, make_tokenizer()))
    assert with_settings_of_base(recipe({"model.base": base})).model.max_tokens == 100
    assert f"model.max_tokens: 100, the positions of {base}; by default it is 512" in capsys.readouterr().err
    assert with_settings_of_base(recipe({"model.base": base, "model.max_tokens": 101})).model.max_tokens == 101
    assert with_settings_of_base(recipe({"model.base": base, "model.max_tokens": 60})).model.max_tokens == 60
    with pytest.raises(AnchorvecError, match=r"data.max_tokens: 101 is more than the 100 tokens"):
        with_settings_of_base(recipe({"model.base": base, "data.max_tokens": 101}))


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 100}, 100),
        ({"n_positions": 100}, 100),  # GPT-2, GPT-J
        ({"max_seq_len": 100}, 100),  # MPT
        ({"text_config": {"max_position_embeddings": 100}, "max_position_embeddings": 7}, 100),  # with images
        ({"text_config": {}, "n_positions": 100}, 100),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_positions_by_the_names_that_families_have_for_them(config, positions):
    assert positions_of(config) == positions


@pytest.mark.parametrize("end", [None, ("This text: ", " means:"), ("", " in a word:")])
def test_the_end_of_an_embedder_is_kept(save_base, tmp_path, capsys, end):
    """Token or prompt, and in the new run every text is read as before."""
    base = save_base(make_model(), make_tokenizer("bos"))
    folder = build_embedder(base, tmp_path / "embedder", max_tokens=48, end_prompt=end)
    assert stored_end(AutoTokenizer.from_pretrained(folder)) == (end or "token")
    kept = with_settings_of_base(recipe({"model.base": str(folder)})).model
    assert (kept.end if end is None else (kept.end.before, kept.end.after)) == (end or "token")
    again = build_embedder(folder, tmp_path / "again", max_tokens=kept.max_tokens, end_prompt=end)
    ids = [SentenceTransformer(str(f), device="cpu").tokenizer("a text")["input_ids"] for f in (folder, again)]
    assert ids[0] == ids[1]
    assert "replaced: nothing" in capsys.readouterr().err


def broken(folder, name):
    """The base in `folder`, with weights that are broken in the way `name`."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    first = next(iter(weights))
    if name == "nan":
        weights[first][0] = torch.nan
    elif name == "inf":
        weights[first][0] = -torch.inf
    elif name == "missing":
        del weights[first]
    elif name == "renamed":
        weights = {f"other.{key}": value for key, value in weights.items()}
    elif name == "shape":
        weights[first] = weights[first][:-1].clone()
    save_file(weights, file, metadata={"format": "pt"})
    if name == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif name == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif name == "pickle":
        torch.save(weights, folder / "pytorch_model.bin")
        file.unlink()
    return first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "{first} holds numbers that are not finite"),
        ("inf", "{first} holds numbers that are not finite"),
        ("missing", "holds no weights for {first}"),
        ("renamed", "holds no weights for .*, but for other"),
        ("shape", "{first}"),
        ("cut", r"model\.safetensors is damaged or cut short"),
        ("pointer", "a pointer of git-lfs; run `git lfs pull`"),
        ("pickle", "only pytorch_model.bin, which is a pickle and is not read"),
    ],
)
def test_broken_weights_are_refused_with_the_true_reason(save_base, name, message):
    """And the name of the tensor, or of the file."""
    base = save_base(make_model(tied=False), make_tokenizer())
    first = broken(base, name)
    with pytest.raises(AnchorvecError, match=r"^model\.base: .*" + message.format(first=first)):
        load_base(base)


def test_tokens_without_an_embedding(save_base):
    """Added ones are taken out of the tokenizer, with a warning; a vocabulary that is too large is refused."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|a|>", "<|b|>", "<|c|>", "<|d|>"], special_tokens=True)  # 257 to 260, of 260 rows
    base = save_base(make_model(), tokenizer)
    with pytest.warns(UserWarning, match=r"no embedding for 1 tokens of its tokenizer \(<\|d\|>\)"):
        folder = build_embedder(base, base.parent / "embedder", max_tokens=32)
    kept = AutoTokenizer.from_pretrained(folder)
    assert max(kept("a <|d|> b <|c|>")["input_ids"]) == 259
    small = save_base(make_model(vocab_size=200), make_tokenizer(), "small")
    with pytest.raises(AnchorvecError, match="has ids up to 256, and its model 200 embeddings; take the tokenizer"):
        build_embedder(small, small.parent / "other", max_tokens=32)


def test_a_bos_that_the_configuration_asks_for_is_put_before_a_text(save_base):
    """`add_bos_token` in tokenizer_config.json alone, which the general class of tokenizers takes no notice of."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    base = save_base(make_model(), tokenizer)
    for asked in (True, False):
        file = base / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": asked}))
        folder = build_embedder(base, base.parent / f"embedder-{asked}", max_tokens=32)
        ids = AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
        assert (ids[0] == tokenizer.bos_token_id) == asked
        assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("change", ["weights", "another base"])
def test_an_adapter_beside_another_start_is_refused(run, tmp_path, change):
    """By every command that would load it; beside its own start it is loaded wherever the run was moved to."""
    moved = shutil.copytree(run, tmp_path / "moved")
    load_model(moved / "stage_two")
    if change == "weights":
        file = moved / "stage_one" / "model.safetensors"
        weights = load_file(file)
        weights[max(weights)] += 1e-3
        save_file(weights, file, metadata={"format": "pt"})
    else:
        shutil.rmtree(moved / "stage_one")
    for use in (load_model, lambda folder: anchorvec.export(folder, tmp_path / "out")):
        with pytest.raises(AnchorvecError, match=r"was trained over a stage_one with other weights than .* has; put"):
            use(moved / "stage_two")
    assert not (tmp_path / "out").exists()
