"""Encoding: an embedder that reads packed texts against `SentenceTransformer.encode`, on the same texts, in one run.

python benchmarks/encode.py --json encode.json
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from anchorvec.device import default_device, resolve_precision
from anchorvec.model.packing import use_packed_texts
from common import in_process, parser, report, survived, timed
from stage_two import draw_texts, save_base


def side(ours: bool, base: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds and vectors of one side."""
    dtype = torch.bfloat16 if resolve_precision(settings["precision"]) == "bf16" else torch.float32
    model = SentenceTransformer(base, device=str(default_device()), model_kwargs={"dtype": dtype})
    if ours and not use_packed_texts(model):
        return {"failed": "this model cannot be packed here"}
    texts = draw_texts(settings["texts"], settings)[1]
    found: dict[str, Any] = {}

    def encode() -> None:
        found["vectors"] = model.encode(texts, batch_size=settings["batch_size"], normalize_embeddings=True)

    seconds = timed(encode, settings["repeats"])
    tokens = sum(len(text.split()) + 1 for text in texts)
    return {"seconds": seconds, **found, "tokens": tokens}


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--texts", type=int, default=256)
    options.add_argument("--longest", type=int, default=512, help="tokens of the longest text")
    options.add_argument("--batch-size", type=int, default=32)
    chosen = vars(options.parse_args())
    file = chosen.pop("json")
    with tempfile.TemporaryDirectory() as scratch:
        base = str(save_base(Path(scratch), chosen))
        library, ours = (in_process(side, mine, base, chosen) for mine in (False, True))
    survived(library, ours)
    cosines = torch.cosine_similarity(torch.from_numpy(ours["vectors"]), torch.from_numpy(library["vectors"]))
    if not cosines.min() >= 0.999:  # nan is a difference too
        raise SystemExit(f"the sides differ: a cosine of {cosines.min():.5f}")
    rows = {
        name: {
            "seconds": result["seconds"],
            "tokens/s": result["tokens"] / result["seconds"],
            "peak GB": result["peak_memory"] / 1e9,
        }
        for name, result in [("sentence-transformers", library), ("anchorvec", ours)]
    }
    figures = {
        "tokens": ours["tokens"],
        "speedup": library["seconds"] / ours["seconds"],
        "memory_ratio": ours["peak_memory"] / library["peak_memory"],
        "least_cosine": float(cosines.min()),
    }
    report(f"Encoding {chosen['texts']} texts", rows, figures, chosen, file)


if __name__ == "__main__":
    main()
