"""What the stages of a recipe train, in words: for the plan and the model card."""

from anchorvec.recipe.stages import StageOne, StageTwo

_KINDS = {
    "text": "bidirectional reconstruction",
    "bag_of_words": "bidirectional reconstruction of bags of words",
    "masked": "masked next-token prediction",
}


def kind_of_stage_one(stage: StageOne) -> str:
    """What Stage I with the settings `stage` is called."""
    return _KINDS[stage.target] + " over the vocabulary" * (stage.candidates == "vocabulary")


def describe_stage_one(stage: StageOne) -> str:
    """What Stage I with the settings `stage` trains."""
    trained = "all parameters" if stage.lora is None else f"LoRA of rank {stage.lora.r}, then merged"
    if stage.target == "masked":
        share = f"{stage.masking.mlm_probability:.0%} of each text's tokens, from those on both sides"
        return f"{kind_of_stage_one(stage)}: {share}; {trained}"
    verb = "writes" if stage.target == "text" else "tells the words of"
    directions = [("query", "document", stage.alpha), ("document", "query", 1 - stage.alpha)]
    whose = {"other": "the {told}", "own": "its own text", "both": "its own text and the {told}"}[stage.source]
    parts = [
        f"the {read}'s embedding {verb} {whose.format(told=told)} (weight {w:g})" for read, told, w in directions if w
    ]
    if stage.candidates == "vocabulary" and stage.lm_weight:
        parts.append(f"the texts are predicted token by token (weight {stage.lm_weight:g})")
    return f"{kind_of_stage_one(stage)}: {', and '.join(parts)}; {trained}"


def kind_of_stage_two(stage: StageTwo) -> str:
    """What Stage II with the settings `stage` is called."""
    beside = [name for name, weight in _beside(stage).items() if weight]
    if stage.positives == "dropout":
        return "contrastive learning of each document with itself under dropout (SimCSE)"
    return "contrastive learning" + f" with {' and '.join(beside)} beside it" * bool(beside)


def describe_stage_two(stage: StageTwo) -> str:
    """What Stage II with the settings `stage` trains."""
    weights = [f"{weight:g}" for weight in _beside(stage).values() if weight]
    weight = f" (weight {' and '.join(weights)})" if weights else ""
    trained = "all parameters" if stage.lora is None else f"LoRA of rank {stage.lora.r}"
    return f"{kind_of_stage_two(stage)}{weight}, temperature {stage.temperature:g}; {trained}"


def _beside(stage: StageTwo) -> dict[str, float]:
    """What may stand beside the contrastive loss, with its weight."""
    return {
        "bag-of-words reconstruction": stage.bag_of_words_weight,
        "generation of documents after queries": stage.generation_weight,
    }
