"""Words of a text in any script, and runs of them: what decontamination and near-duplicate removal compare.

Case, punctuation, symbols, white space and the form of Unicode make no difference. Text in scripts without spaces between words is
compared by character, each of which counts as half a word.
"""

from __future__ import annotations

import re
import unicodedata

import regex

# Scripts whose writing puts no spaces between words. Tibetan marks syllables, Korean and Ethiopic words.
_UNSPACED = (
    r"\p{Script_Extensions=Han}\p{Script_Extensions=Hiragana}\p{Script_Extensions=Katakana}\p{Script_Extensions=Bopomofo}"
    r"\p{Script=Yi}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}\p{Script=Tai_Le}\p{Script=New_Tai_Lue}"
    r"\p{Script=Tai_Tham}\p{Script=Tai_Viet}\p{Script=Javanese}\p{Script=Balinese}"
)
# One character of such a script with its marks, or a word: letters, marks and digits of other scripts.
_WORD = regex.compile(
    rf"(?V1)([\p{{L}}\p{{Nl}}&&[{_UNSPACED}]]\p{{M}}*)|[[\p{{L}}\p{{M}}\p{{N}}]--[\p{{L}}\p{{Nl}}&&[{_UNSPACED}]]]+"
)
_ASCII_WORDS = re.compile(r"[a-z0-9]+").findall
# Soft hyphens, joiners, byte order marks, variation selectors: they change how text looks, not what it says.
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")

WORD, CHARACTER = 2, 1  # what a word and a character count for in a run's length


class Words:
    """The words of a text, in order, as `texts`; `sizes` says what each counts for, None if all of them are words."""

    def __init__(self, text: str) -> None:
        self.sizes: list[int] | None = None
        if text.isascii():
            self.texts: list[str] = _ASCII_WORDS(text.lower())
            return
        folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
        self.texts, self.sizes = [], []
        for found in _WORD.finditer(unicodedata.normalize("NFKC", folded)):
            self.texts.append(found[0])
            self.sizes.append(WORD if found[1] is None else CHARACTER)
        if CHARACTER not in self.sizes:
            self.sizes = None

    def __len__(self) -> int:
        return len(self.texts)

    def runs(self, words: int) -> list[str]:
        """All runs of `words` words in a row, in order, joined by spaces; none if the text is shorter.

        With characters: from each word or character, the shortest run that is that long.
        """
        texts = self.texts
        if self.sizes is None:
            return [" ".join(texts[i : i + words]) for i in range(len(texts) - words + 1)]
        out, end, held = [], 0, 0
        for start, size in enumerate(self.sizes):
            while held < WORD * words and end < len(texts):
                held += self.sizes[end]
                end += 1
            if held < WORD * words:
                break
            out.append(" ".join(texts[start:end]))
            held -= size
        return out

    def __str__(self) -> str:
        return " ".join(self.texts)
