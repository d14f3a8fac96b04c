"""The README of an exported model: how to use it, and how it was made."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from sentence_transformers import SentenceTransformer

from anchorvec.model.end import template_of
from anchorvec.model.portable import BOTH_WAYS_READ_BY, DENSE_READ_BY, OWN_READ_BY
from anchorvec.model.readout import Readout
from anchorvec.recipe import Recipe, dump_recipe, stored_recipe
from anchorvec.recipe.description import kind_of_stage_one, kind_of_stage_two
from anchorvec.run import STAGE_TITLES, STAGES, Run

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}
{% if warning %}
**{{ warning }}**
{% endif %}
A text embedder made from `{{ base }}` with anchorvec: {{ stages }}. It maps a text of up to {{ max_tokens }} tokens to
{{ dimensions }} numbers, and similarity is the cosine. A text is {{ readout }}.
The tokenizer itself adds what stands around it.
{%- if tokens_read != max_tokens %}
The decoder reads up to {{ tokens_read }} tokens of it, both copies counted.
{%- endif %}
{%- if about %}
{{ about }}
{%- endif %}
{%- if training_tokens %}
In training, texts were cut to {{ training_tokens }} tokens.
{%- endif %}

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{{ name }}"{{ trusted }})
queries = model.encode_query(["how do I join two tables?"])
documents = model.encode_document(["Merge DataFrame objects with a database-style join."])
print(model.similarity(queries, documents))
```

Prompts stored with the model:
{% for key, prompt in prompts.items() %}
- `{{ key }}`: `{{ prompt | tojson }}`
{%- endfor %}

{{ ability }}

## Scores
{% if scores %}
| system | task | main score | 95% interval |
| --- | --- | --- | --- |
{%- for system, tasks in scores.items() %}{% for task, score in tasks.items() %}
| {{ system }} | {{ task }} | {{ "%.3f" | format(score.main_score) }} | {{ intervals(score) }} |
{%- endfor %}{% endfor %}

{{ score_set }}
{%- if chosen %}

{{ chosen }}
{%- endif %}
{% else %}
None were taken in this run.
{% endif %}
## Recipe

```yaml
{{ recipe }}
```

## Versions, machine and data

```json
{{ run }}
```
"""


def model_card(stage: Path, model: SentenceTransformer, *, name: str, readout: Readout, writes: bool) -> str:
    """The card of the model that was trained in the folder `stage` of a run, with the run's recipe, data and scores.

    `model` is what it trained, `name` what the card calls it, `readout` how it reads texts. `writes` says whether the
    folder still holds the LM head that `anchorvec decode` needs (T26).
    """
    run = Run(stage.parent)
    record = json.loads(_read(run.record) or "{}")
    record.pop("export", None)  # of an earlier export: folders of this machine, and what comes with this one
    best = record.get("best", {})
    scores = json.loads(_read(run.scores) or "{}")
    recipe = stored_recipe(run)
    trained = _trained(stage, recipe) if recipe else []
    card = ModelCard.from_template(
        ModelCardData(
            library_name="sentence-transformers",
            pipeline_tag="sentence-similarity",
            tags=["sentence-transformers", "feature-extraction", "anchorvec"],
        ),
        template_str=_TEMPLATE,
        name=name,
        base=recipe.model.base if recipe else "a decoder LLM",
        stages=", then ".join(trained) or "not trained yet",
        about=recipe.about if recipe and trained else "",
        readout=readout,
        warning=_warning(readout),
        trusted=", trust_remote_code=True" if readout.pooling == "latent_attention" else "",
        max_tokens=model.max_seq_length,
        tokens_read=template_of(model.tokenizer).tokens(model.max_seq_length or 0),
        training_tokens=recipe.data.max_tokens if recipe and trained else None,
        dimensions=model.get_embedding_dimension(),
        prompts=model.prompts,
        ability=_ability(stage, recipe, writes),
        scores=scores,
        intervals=lambda score: (
            "{:.3f} to {:.3f}".format(*score["ndcg_at_10_interval"]) if "ndcg_at_10_interval" in score else ""
        ),
        score_set=_describe_score_set(record.get("score_set")),
        chosen=_describe_choice(best) if best.get("folder") == stage.name else "",
        recipe=dump_recipe(recipe, output=False).strip() if recipe else "",
        run=json.dumps(record, indent=2, ensure_ascii=False),
    )
    return str(card)


def _trained(stage: Path, recipe: Recipe) -> list[str]:
    """What each stage up to the folder `stage` was, in words."""
    done = []
    name = _stage_of(stage)
    if recipe.stage_one is not None and name != "base":
        done.append(f"Stage I, {kind_of_stage_one(recipe.stage_one)}")
    if recipe.stage_two is not None and name not in ("base", "stage_one"):
        done.append(f"Stage II, {kind_of_stage_two(recipe.stage_two)}")
    return done


def _stage_of(folder: Path) -> str:
    """The name of the stage that has trained `folder`, at its end or on the way; else that of the folder."""
    return next((name for name in STAGES if folder.name.startswith(f"{name}_step_")), folder.name)


def _ability(stage: Path, recipe: Recipe | None, writes: bool) -> str:
    if not writes:
        return "This folder holds no LM head: it can no longer write texts back from their embeddings."
    if recipe and recipe.stage_one and recipe.stage_one.target == "text" and _stage_of(stage) == "stage_one":
        return "This folder is also a causal LM: `anchorvec decode` writes texts back from their embeddings."
    if recipe and recipe.stage_two and recipe.stage_two.generation_weight and stage.name == "stage_two":
        both_ways = recipe.model.attention_direction == "bidirectional"
        return (
            "This folder is also a causal LM: it writes a document after a query, with its prompt, and a line break"
            + (", where `model.config.is_causal = True` is set after loading." if both_ways else ".")
        )
    return "This folder is also a causal LM, but it was not trained to write texts back from their embeddings."


def _warning(readout: Readout) -> str:
    """What a reader must know before all else; empty where there is nothing."""
    both_ways = readout.attention_direction == "bidirectional"
    lines = [f"Read it with {BOTH_WAYS_READ_BY}, and gives other vectors without a word."] if both_ways else []
    if readout.pooling == "latent_attention":
        lines.append(f"It has a module of anchorvec's own (latent attention). Read it with {OWN_READ_BY}.")
    elif readout.pooling == "dense_mean":
        lines.append(f"Read it with {DENSE_READ_BY}.")
    return " ".join(lines)


def _describe_score_set(score_set: dict[str, object] | None) -> str:
    if score_set is None:
        return ""
    return (
        f"{score_set['score_queries']} docstring summaries against {score_set['score_documents']} docstring bodies "
        "of the held-out packages named below; fingerprint and versions there too."
    )


def _describe_choice(best: dict[str, Any]) -> str:
    """How the model was chosen among those on the way."""
    return (
        f"This is the model after step {best['step']} of {best['of_steps']} of {STAGE_TITLES[best['stage']]}: of the "
        f"{best['scored']} steps that were scored, the one with the best mean main score on these test sets, "
        f"{best['score']:.3f}. It was chosen by this score, which is too high for that reason; on other texts expect "
        "less."
    )


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
