"""Batches without a text twice, of random and of similar pairs."""

import json
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

import anchorvec.data.samplers
from anchorvec.data.samplers import PATIENCE, TOO_SIMILAR, DifferentTexts, SimilarPairs, similar_groups
from anchorvec.pipeline import load_training_data, train
from anchorvec.recipe import load_recipe
from support import write_rows

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


def letters_of(texts):
    """How often each letter is in a text, at length 1."""
    counts = torch.tensor([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
    return F.normalize(counts.double(), dim=1)


@pytest.mark.parametrize("order", ["random", "similar"])
def test_batches_of_rows_of_which_half_have_negatives(tmp_path, order):
    """They are full and mixed, and have no text twice in any column, though the data repeat texts in all of them."""
    numbers = np.random.default_rng(0).integers(0, 10_000, (400, 4)).tolist()
    rows = [
        {
            "query": f"query {i // 2 if i % 20 < 2 else a}",  # every tenth query has two positives
            "positive": "None" if i == 5 else f"document {a % 97} {b % 7}",
            "negatives": [f"document {c % 97} {d % 7}", f"document {d}"][: 2 * (i % 2)],
        }
        for i, (a, b, c, d) in enumerate(numbers)
    ]
    path = write_rows(tmp_path / "half.jsonl", rows)
    options = [f"output={tmp_path / 'run'}", f"data.train=[{{path: {path}}}]", "stage_two.negatives=2"]
    inputs = load_training_data(load_recipe("debug", options))
    dataset, hashes = inputs.contrastive["half"], inputs.hashes["half"]
    make = partial(SimilarPairs, word_vectors=letters_of)
    if order == "random":
        make = partial(DifferentTexts, hashes={"": hashes})
    batches = list(make(dataset, batch_size=16, drop_last=True))
    assert len(batches) == len(dataset) // 16
    for batch in batches:
        columns = dataset[batch]
        texts = [[text for text in column if text is not None] for column in columns.values()]
        assert [len(column) for column in texts[:2]] == [16, 16]
        assert len(texts[2]) == len(texts[3])
        assert 0 < len(texts[2]) < 16
        assert len({text for column in texts for text in column}) == sum(map(len, texts))


def numbered(texts):
    """`DifferentTexts` over pairs of such texts, by their numbers; 0 is none."""
    hashes = np.array(texts, dtype=np.uint64)
    return partial(DifferentTexts, Dataset.from_dict({"query": texts}), hashes={"": hashes}, drop_last=True)


def test_a_pair_waits_for_a_batch_without_its_texts():
    """The batches are those of sentence-transformers' own sampler, which compares the texts themselves."""
    draw = np.random.default_rng(0)
    columns = draw.integers(1, 300, (3, 500)) + np.array([[0], [1000], [1100]])  # the last two share some texts
    dataset = Dataset.from_dict({name: list(map(str, column)) for name, column in zip("abc", columns, strict=True)})
    for epoch in (0, 1):
        own = numbered(columns.T)(batch_size=20, seed=3)
        theirs = NoDuplicatesBatchSampler(dataset, batch_size=20, drop_last=True, seed=3, generator=torch.Generator())
        own.set_epoch(epoch)
        theirs.set_epoch(epoch)
        batches = list(own)
        assert batches == list(theirs) == list(own)
        assert len(batches) == len(own) == 25


def test_a_missing_text_is_none_of_a_batchs_texts():
    """Pairs without a negative are in a batch together; every pair is in one batch."""
    sampler = numbered([[2 * i + 1, 2 * i + 2, 0] for i in range(64)])(batch_size=8)
    assert sorted(index for batch in sampler for index in batch) == list(range(64))


def test_an_epoch_over_repeated_texts_takes_linear_time():
    """Where half of the pairs share a text, none is looked at more often than it may wait; the epoch is whole."""

    class Counted(np.ndarray):
        looks = 0

        def __getitem__(self, key):
            Counted.looks += 1
            return super().__getitem__(key)

    n = 20_000
    sampler = numbered([[i + 1, n + i + 1 if i % 2 else 3 * n] for i in range(n)])(batch_size=16)
    sampler.hashes = sampler.hashes.view(Counted)
    batches = list(sampler)
    assert len(batches) == len(sampler) == n // 16
    assert all(sum(index % 2 == 0 for index in batch) <= 1 for batch in batches)
    assert Counted.looks < 2 * (PATIENCE + 2) * n  # two passes; (n / 16) * (n / 2) without an end to waiting


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
    """Similar pairs are sought among `BLOCK` pairs at most; those that are left over of each have a second chance."""
    monkeypatch.setattr(anchorvec.data.samplers, "BLOCK", 50)
    seen = []

    def recorded(texts):
        seen.append(len(texts))
        return vectors_of(texts)

    sampler = SimilarPairs(make_dataset(), batch_size=7, drop_last=True, word_vectors=recorded)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert seen == [40] * 8  # queries and documents of three blocks; of one again, for two more batches
    assert [len(batch) for batch in batches] == [7] * 17
    assert len({index for batch in batches[:15] for index in batch}) == 105
    assert sum(len(topics_of(batch)) for batch in batches) < 40  # random batches have four of six topics or more


def test_an_epoch_has_all_its_batches():
    """The trainer plans its epochs by the sampler's length; without a single batch an epoch ends."""
    texts = {
        "query": [f"{i % TOPICS} {i} q" for i in range(19)],
        "positive": ["0 0 d"] * 6 + [f"1 {i} d" for i in range(13)],
    }
    sampler = make_sampler(Dataset.from_dict(texts), batch_size=4)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 4
    assert all(sum(index < 6 for index in batch) <= 1 for batch in batches)  # the others of the six share its text
    assert list(make_sampler(Dataset.from_dict({"query": ["0 0 q"] * 9, "positive": ["0 0 d"] * 9}), 2)) == []


def test_texts_are_compared_as_training_reads_them():
    """With the prompts of their data set and column."""
    seen = []

    def recorded(texts):
        seen.extend(texts)
        return vectors_of([text.rpartition(":")[2] for text in texts])

    dataset = Dataset.from_dict(
        {"query": ["0 1 q", "0 2 q"], "positive": ["0 1 d", "0 2 d"], "negative": ["1 1", "1 2"]}
    )
    dataset.set_transform(lambda rows: rows | {"dataset_name": ["mine"] * len(rows["query"])})
    prompts = {"mine": {"query": "Find:", "positive": "Text:", "negative": "Text:"}, "other": {"query": "Other:"}}
    assert len(list(SimilarPairs(dataset, batch_size=2, drop_last=True, word_vectors=recorded, prompts=prompts))) == 1
    assert set(seen) == {"Find:0 1 q", "Find:0 2 q", "Text:0 1 d", "Text:0 2 d", "Text:1 1", "Text:1 2"}


@pytest.mark.parametrize(("size", "columns", "considered"), [(2, 2, 8), (3, 3, 8), (8, 2, 8), (8, 3, 2), (5, 4, 1)])
def test_groups_equal_the_plain_search(size, columns, considered, monkeypatch):
    """The groups are those of a search that goes through all pairs one at a time."""
    monkeypatch.setattr(anchorvec.data.samplers, "_CONSIDERED", considered)
    generator = torch.Generator().manual_seed(size)
    vectors = F.normalize(torch.randn(columns, 61, 6, generator=generator, dtype=torch.float64), dim=2)
    texts = [{f"q{i % 50}", f"d{i % 45}"} for i in range(61)]

    def alike(a, b):
        either_way = [(a, b, own, other) for own in (0, 1) for other in range(columns)]
        either_way += [(b, a, own, other) for own in (0, 1) for other in range(columns)]
        return any(float(vectors[own, i] @ vectors[other, j]) > TOO_SIMILAR for i, j, own, other in either_way)

    sums = F.normalize(vectors[0] + vectors[1], dim=1)
    free, expected = list(range(61)), []
    while len(free) >= size:
        group = [free.pop(0)]
        by_similarity = sorted(free, key=lambda i: -float(sums[i] @ sums[group[0]]))
        n = considered * size
        for candidates, too_similar in [
            (by_similarity[:n], alike),
            (by_similarity[: -n - 1 : -1], alike),
            (by_similarity[::-1], lambda a, b: False),
        ]:
            for pair in candidates:
                if len(group) < size and not any(too_similar(pair, i) or texts[pair] & texts[i] for i in group):
                    group.append(pair)
        if len(group) == size:
            expected.append(group)
            free = [i for i in free if i not in group]
    found = similar_groups(vectors, texts, size)
    assert found == expected
    assert len(found) > 50 // size - 3


def test_pairs_that_may_answer_each_other_are_apart():
    """Neither the same text nor one with nearly the same words is a negative, unless there is nothing else (T16)."""
    e = torch.eye(20, dtype=torch.float64)
    near = F.normalize(e[0] + 0.1 * e[1], dim=0)
    different = [{f"q{i}", f"d{i}"} for i in range(4)]
    for of_first in range(3):  # the column of pair 0 with the text that is like one of pair 1
        for of_second in range(3):
            vectors = e[:12].view(3, 4, 20).clone()
            vectors[of_first, 0], vectors[of_second, 1] = e[0], near
            if of_first == of_second == 2:
                continue  # hard negatives may be alike
            assert all({0, 1} - set(group) for group in similar_groups(vectors, different, 2))
            assert similar_groups(vectors[:, :2], different[:2], 2) == [[0, 1]]
    vectors = e[:8].view(2, 4, 20)
    assert similar_groups(vectors[:, :2], [{"q0", "d"}, {"q1", "d"}], 2) == []


def test_those_that_fill_a_group_are_apart_too(monkeypatch):
    """Where the most similar pairs may not be taken, two others that may answer each other are not taken together."""
    monkeypatch.setattr(anchorvec.data.samplers, "_CONSIDERED", 1)
    e = torch.eye(20, dtype=torch.float64)
    documents = torch.stack([e[0], e[0], e[0], e[0], e[1], e[1], e[2]])
    vectors = torch.stack([e[10:17], documents])
    assert similar_groups(vectors, [{f"q{i}", f"d{i}"} for i in range(7)], 3)[0] in ([0, 4, 6], [0, 5, 6], [0, 6, 4])


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
    monkeypatch.setattr(anchorvec.data.samplers, "TOO_SIMILAR", 0.99)
    options = ["stage_one=null", "stage_two.in_batch_negatives=similar", "stage_two.pairs_per_step=4"]
    options += [f"data.train={data}", "stage_two.steps=20", "stage_two.warmup_steps=1"]
    run = tmp_path / "run"
    train(load_recipe("debug", [f"output={run}", *options]))
    kinds = [len({next(topic for topic in topics if query[0] in topic) for query in batch}) for batch in batches]
    assert len(batches) >= 20
    assert sum(kinds) / len(kinds) < 2  # 2.9 in random batches
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all("bag_of_words" not in record for record in records)
