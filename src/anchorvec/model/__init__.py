"""The model: a decoder as an embedder, how it reads texts, and how that is computed."""
