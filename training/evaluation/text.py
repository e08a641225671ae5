"""How answers are cut into words before they are compared.

Owns: normalisation. Two ways, both for any script: SQuAD's for token F1, ROUGE's for ROUGE-L. For English they
are the originals'; in addition, letters beyond ASCII count as letters, and writing without spaces (Chinese,
Japanese, Thai, ...) is cut into single characters, since no blank tells its words apart.
"""

from __future__ import annotations

import re
import string
import unicodedata
from typing import Final

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_WORDS: Final = re.compile(r"[^\W_]+")
_UNSPACED: Final = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff])"
)
"""Thai, Lao, Burmese, Khmer, kana, Han."""
_PUNCTUATION: Final = frozenset(string.punctuation)


def plain(text: str) -> str:
    """What exact match compares: outer blanks off, composed (NFC). Case and punctuation count."""
    return unicodedata.normalize("NFC", text).strip()


def squad_tokens(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no English articles, blanks joined; then split at blanks.

    Punctuation is ASCII's, as in the original script, and Unicode's category P besides.
    """
    lowered = unicodedata.normalize("NFKC", text).lower()
    bare = "".join(char for char in lowered if not _is_punctuation(char))
    return _UNSPACED.sub(r" \1 ", _ARTICLES.sub(" ", bare)).split()


def rouge_tokens(text: str) -> list[str]:
    """ROUGE's words: lower case, runs of letters and digits; no stemming."""
    lowered = unicodedata.normalize("NFKC", text).lower()
    return _WORDS.findall(_UNSPACED.sub(r" \1 ", _without_marks(lowered)))


def _is_punctuation(char: str) -> bool:
    return char in _PUNCTUATION or unicodedata.category(char).startswith("P")


def _without_marks(text: str) -> str:
    """Combining marks are no letters to a regular expression: they would cut the words of Indic scripts."""
    return "".join(char for char in text if not unicodedata.category(char).startswith("M"))
