"""Training pairs, the documentation corpus of the quickstart, and what reads them."""

from anchorvec.data.docstrings import (
    DocstringData,
    DocstringPair,
    docstring_pairs,
    quickstart_data,
    write_beir,
)
from anchorvec.data.pairs import Pairs, ReadReport, read_pairs, weighted

__all__ = [
    "DocstringData",
    "DocstringPair",
    "Pairs",
    "ReadReport",
    "docstring_pairs",
    "quickstart_data",
    "read_pairs",
    "weighted",
    "write_beir",
]
