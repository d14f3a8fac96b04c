"""Every program that reads an embedder folder reads the same vectors from it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig

from anchorvec.exporting.folder import LEAST_COSINE, PROBES
from anchorvec.model.embedder import build_embedder
from anchorvec.model.portable import with_older_rope
from support import make_model, make_tokenizer

TESTS = Path(__file__).parent
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
END_PROMPT = ("This text: ", " means in one word:")


@pytest.fixture(scope="module")
def older_python(tmp_path_factory):
    """The Python of an environment with transformers 4.57 and sentence-transformers 5.1; ANCHORVEC_OLDER names one."""
    folder = Path(os.environ.get("ANCHORVEC_OLDER") or tmp_path_factory.mktemp("older") / "venv")
    if not folder.is_dir():
        subprocess.run([TESTS.parent / "scripts" / "older_runtime.sh", folder], check=True)
    return folder / "bin" / "python"


def embedder(save_base, name, family, tokenizer, *, end_prompt=None, rope=None):
    """The folder of a tiny embedder."""
    model = make_model(family)
    if rope:
        model.config.rope_parameters = rope
    base = save_base(model, make_tokenizer(tokenizer), f"base-{name}")
    return build_embedder(base, base.parent / name, max_tokens=64, end_prompt=end_prompt, prompts={"query": "Q: "})


@pytest.mark.slow
def test_older_libraries_read_the_same_vectors(older_python, save_base, tmp_path):
    """Those of transformers 4.57 and sentence-transformers 5.1; the paper's families, end token and end prompt.

    Texts stand without white space around them, which sentence-transformers before 6 takes away.
    """
    folders = [
        embedder(save_base, f"{family}-{tokenizer}-{end is None}", family, tokenizer, end_prompt=end, rope=rope)
        for family, tokenizer, rope in [
            ("llama", "bos", LLAMA_3),
            ("llama", "plain", {"rope_type": "default", "rope_theta": 100000.0}),
            ("mistral", "bos", {"rope_type": "default", "rope_theta": 1000000.0}),
            ("qwen2", "chat", {"rope_type": "default", "rope_theta": 1000000.0}),
            ("qwen3", "left", YARN),
        ]
        for end in (None, END_PROMPT)
    ]
    texts = [text.strip() for text in PROBES]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    command = [older_python, TESTS / "older_vectors.py", tmp_path / "texts.json", tmp_path / "older.npz", *folders]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment)
    older = np.load(tmp_path / "older.npz")
    for i, folder in enumerate(folders):
        here = SentenceTransformer(str(folder), device="cpu").encode(texts, prompt="", convert_to_tensor=True)
        for program in ("sentence_transformers", "transformers"):
            there = torch.from_numpy(older[f"{program} {i}"])
            cosines = torch.cosine_similarity(here, there, dim=1)
            assert cosines.min() >= LEAST_COSINE, (folder.name, program, cosines)


def test_the_folder_has_the_form_that_all_versions_read(save_base):
    """Module names and options that sentence-transformers 5.1 knows, and rotary positions as before transformers 5."""
    folder = embedder(save_base, "model", "llama", "plain", rope=LLAMA_3)

    def read(name):
        return json.loads((folder / name).read_text())

    types = [module["type"] for module in read("modules.json")]
    assert types == ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    assert read("sentence_bert_config.json") == {"max_seq_length": 64, "do_lower_case": False}
    pooling = read("1_Pooling/config.json")
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_lasttoken", "include_prompt"]
    assert pooling["word_embedding_dimension"] == 32
    config = read("config.json")
    assert (config["rope_theta"], config["rope_scaling"]["factor"]) == (500000.0, 32.0)
    assert AutoConfig.from_pretrained(folder).rope_parameters == LLAMA_3


def test_a_model_without_rotary_positions_is_left_as_it_is():
    """Or with some for each kind of layer, which no older name can say."""
    for config in ({"n_embd": 8}, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}):
        assert with_older_rope(config) == config
