"""Training pairs, the documentation corpus of the quickstart, and what reads them."""

from anchorvec.data.docstrings import (
    DocstringData,
    DocstringPair,
    docstring_pairs,
    quickstart_data,
)
from anchorvec.data.negatives import ContrastiveRows, contrastive_rows, documents_twice
from anchorvec.data.pairs import Pairs, ReadReport, drawn_rows, read_pairs

__all__ = [
    "ContrastiveRows",
    "DocstringData",
    "DocstringPair",
    "Pairs",
    "ReadReport",
    "contrastive_rows",
    "docstring_pairs",
    "documents_twice",
    "drawn_rows",
    "quickstart_data",
    "read_pairs",
]
