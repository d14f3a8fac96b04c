# ruff: noqa: E402 - the packages must be missing before anything else is imported
"""Trains the tiny model for a step of each stage, in a folder that is given, where three packages are missing."""

import sys
from pathlib import Path
from typing import Any

ABSENT = ("datasets", "mteb", "pydantic", "pydantic_core")


class Without:
    """A finder of modules that does not find them."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """None for what is missing, also to those that only ask whether it is there."""
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

    def find_distributions(self, *args: Any, **options: Any) -> list[Any]:
        """The installed distributions but for those that are missing."""
        found = getattr(self.finder, "find_distributions", lambda *_, **__: [])(*args, **options)
        return [one for one in found if one.metadata["Name"].replace("-", "_") not in ABSENT]


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainingArguments

from anchorvec.model.embedder import build_embedder, load_causal_lm
from anchorvec.model.packing import use_packed_texts
from anchorvec.model.working_weights import WorkingWeights
from anchorvec.objectives.bag_of_words import BagOfWordsLoss, BagOfWordsReconstruction
from anchorvec.objectives.contrastive import contrastive_loss
from anchorvec.objectives.pairs import TokenPair
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.training.engine import choose_engine
from anchorvec.training.lora import lora_config
from anchorvec.training.trainers import ReconstructionTrainer

assert choose_engine
folder = Path(sys.argv[1])
base = build_embedder("tiny", folder / "base", max_tokens=32)
pairs = [TokenPair([7, 8 + i, 0], [9, 10 + i, 11, 0], [8 + i, 0], [10 + i, 11, 0]) for i in range(4)]


def changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Whether a weight is another than `before`; all are finite."""
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    return any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# Stage I
for objective_class in (TextReconstruction, BagOfWordsReconstruction):
    model = load_causal_lm(base).train()
    objective = objective_class(model, packed=True)
    if isinstance(objective, BagOfWordsReconstruction):
        texts = [[p.query_targets[:-1] for p in pairs], [p.document_targets[:-1] for p in pairs]]
        objective.bag_of_words = BagOfWordsLoss(model.get_input_embeddings().weight, *texts)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        remove_unused_columns=False, use_cpu=True, bf16=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = ReconstructionTrainer(
        model=objective, args=arguments, train_dataset=pairs, micro_batch_tokens=20,
        data_collator=lambda rows: {"pairs": rows},
    )  # fmt: skip
    trainer.train()
    assert changed(model, before)

# Stage II
embedder = SentenceTransformer(str(base), device="cpu").train()
assert use_packed_texts(embedder)
embedder.add_adapter(lora_config(embedder[0].model, r=2, alpha=4, dropout=0.0))
before = {name: weight.clone() for name, weight in embedder.state_dict().items()}
loss = contrastive_loss(embedder, micro_batch_tokens=None)
working = WorkingWeights(embedder)
optimizer = torch.optim.AdamW([p for p in embedder.parameters() if p.requires_grad], lr=1e-2)
with working.in_use():
    with torch.autocast("cpu", torch.bfloat16):
        value = loss([dict(embedder.preprocess(texts)) for texts in (["a", "b"], ["aa", "bb"])], torch.empty(0))
    value.backward()
optimizer.step()
assert changed(embedder, before)
assert not set(ABSENT) & set(sys.modules)
