"""Encodes texts with the libraries of the Python that runs it: `older_vectors.py TEXTS.json OUT.npz FOLDER ...`."""

import json
import sys

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

file, out, *folders = sys.argv[1:]
with open(file, encoding="utf-8") as opened:  # noqa: PTH123
    texts = json.load(opened)
vectors = {}
for i, folder in enumerate(folders):
    vectors[f"sentence_transformers {i}"] = SentenceTransformer(folder, device="cpu").encode(texts, prompt="")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    last = batch["attention_mask"].sum(dim=1) - 1  # padded on the right
    vectors[f"transformers {i}"] = states[torch.arange(len(states)), last].float().numpy()
np.savez(out, **vectors)
