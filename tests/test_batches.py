"""Batches of similar pairs."""

import json
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

import anchorvec.batches
from anchorvec.batches import TOO_SIMILAR, SimilarPairs, similar_groups
from anchorvec.recipe import load_recipe
from anchorvec.training import train
from conftest import write_rows

TOPICS, PER_TOPIC = 6, 20


def vectors_of(texts):
    """A text is "topic number": texts of a topic have a cosine similarity of 0.5, all others 0."""
    found = torch.zeros(len(texts), TOPICS * (PER_TOPIC + 1))
    for row, text in zip(found, texts, strict=True):
        topic, number = map(int, text.split()[:2])
        row[topic * (PER_TOPIC + 1)] = row[topic * (PER_TOPIC + 1) + 1 + number] = 0.5**0.5
    return found


def make_dataset():
    """Pairs of every topic, in turn."""
    names = [f"{topic} {number}" for number in range(PER_TOPIC) for topic in range(TOPICS)]
    return Dataset.from_dict({"query": [f"{name} q" for name in names], "positive": [f"{name} d" for name in names]})


def topics_of(batch):
    """The topics of the pairs of a batch."""
    return {index % TOPICS for index in batch}


def make_sampler(dataset, batch_size, seed=0):
    """The sampler as the trainer makes it."""
    return SimilarPairs(dataset, batch_size=batch_size, drop_last=True, seed=seed, word_vectors=vectors_of)


def test_a_batch_has_similar_pairs():
    """Each batch is of one topic, each pair is in one batch, and each epoch and seed has batches of its own."""
    sampler = make_sampler(make_dataset(), batch_size=5)
    batches = list(sampler)
    assert len(batches) == len(sampler) == TOPICS * PER_TOPIC // 5
    assert sorted(index for batch in batches for index in batch) == list(range(TOPICS * PER_TOPIC))
    assert all(len(topics_of(batch)) == 1 for batch in batches)
    assert len({frozenset(topics_of(batch)) for batch in batches[:6]}) > 1  # in random order
    assert batches == list(sampler)
    sampler.set_epoch(1)
    assert {frozenset(batch) for batch in sampler} != {frozenset(batch) for batch in batches}
    assert list(make_sampler(make_dataset(), batch_size=5, seed=1)) == list(sampler)


def test_pairs_are_sought_in_blocks(monkeypatch):
    """Similar pairs are sought among `BLOCK` pairs at most; what is left over of each block is left out."""
    monkeypatch.setattr(anchorvec.batches, "BLOCK", 50)
    seen = []

    def recorded(texts):
        seen.append(len(texts))
        return vectors_of(texts)

    sampler = SimilarPairs(make_dataset(), batch_size=7, drop_last=True, word_vectors=recorded)
    batches = list(sampler)
    assert seen == [40] * 6  # queries and documents of three blocks
    assert [len(batch) for batch in batches] == [7] * 15
    assert len({index for batch in batches for index in batch}) == 105
    assert sum(len(topics_of(batch)) for batch in batches) < 40  # random batches have four of six topics or more


@pytest.mark.parametrize("size", [2, 3, 8])
def test_groups_equal_the_plain_search(size):
    """The groups are those of a search that goes through all pairs one at a time."""
    generator = torch.Generator().manual_seed(size)
    queries, documents = F.normalize(torch.randn(2, 61, 4, generator=generator, dtype=torch.float64), dim=2)
    texts = [{f"q{i % 50}", f"d{i % 45}"} for i in range(61)]

    def apart(a, b):
        similar = any(float(part[a] @ part[b]) > TOO_SIMILAR for part in (queries, documents))
        return not similar and not texts[a] & texts[b]

    vectors = F.normalize(queries + documents, dim=1)
    free, expected = list(range(61)), []
    while len(free) >= size:
        group = [free.pop(0)]
        by_similarity = sorted(free, key=lambda i: -float(vectors[i] @ vectors[group[0]]))
        for pair in by_similarity[: 8 * size]:
            if len(group) < size and all(apart(pair, other) for other in group):
                group.append(pair)
        for pair in by_similarity[::-1]:
            if len(group) < size and not any(texts[pair] & texts[other] for other in group):
                group.append(pair)
        if len(group) == size:
            expected.append(group)
            free = [i for i in free if i not in group]
    found = similar_groups(queries, documents, texts, size)
    assert found == expected
    assert len(found) > 50 // size - 3


def test_pairs_that_may_answer_each_other_are_apart():
    """Neither the same text nor one with nearly the same words is a negative, unless there is nothing else (T16)."""
    e = torch.eye(8, dtype=torch.float64)
    documents = torch.stack([e[0], F.normalize(e[0] + 0.1 * e[1], dim=0), e[2], e[3]])
    queries = e[4:]
    different = [{f"q{i}", f"d{i}"} for i in range(4)]
    assert all({0, 1} - set(group) for group in similar_groups(queries, documents, different, 2))
    assert all({0, 1} - set(group) for group in similar_groups(documents, queries, different, 2))
    assert similar_groups(queries[:2], documents[:2], different[:2], 2) == [[0, 1]]
    assert similar_groups(queries[:2], documents[:2], [{"q0", "d"}, {"q1", "d"}], 2) == []


def test_training_with_similar_negatives(tmp_path, monkeypatch):
    """The trainer gets similar pairs, from data sets with hard negatives and without; no words are told."""
    topics = ["abcdef", "ghijkl", "mnopqr", "stuvwx"]  # a token is a letter, a text four letters of a topic
    for name in ("one", "two"):
        texts = [["".join(letters) for letters in permutations(topic, 4)] for topic in topics]
        rows = [
            {"query": of_topic[i], "positive": of_topic[i + 120]}
            | ({"negative": of_topic[i + 240]} if name == "two" else {})
            for of_topic in texts
            for i in range(0, 120, 4)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    data = json.dumps([{"path": str(tmp_path / f"{name}.jsonl"), "instruction": "Find: "} for name in ("one", "two")])
    batches = []
    iterate = SimilarPairs.__iter__

    def recorded(self):
        for batch in iterate(self):
            batches.append([self.dataset[i]["query"] for i in batch])
            yield batch

    monkeypatch.setattr(SimilarPairs, "__iter__", recorded)
    monkeypatch.setattr(anchorvec.batches, "TOO_SIMILAR", 0.99)
    options = ["stage_one=null", "stage_two.in_batch_negatives=similar", "stage_two.pairs_per_step=4"]
    options += [f"data.train={data}", "stage_two.steps=20", "stage_two.warmup_steps=1"]
    run = tmp_path / "run"
    train(load_recipe("debug", [f"output={run}", *options]))
    kinds = [len({next(topic for topic in topics if query[0] in topic) for query in batch}) for batch in batches]
    assert len(batches) >= 20
    assert sum(kinds) / len(kinds) < 2  # 2.9 in random batches
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all("words" not in record for record in records)
