"""Words in every script, and their runs."""

from __future__ import annotations

import pytest

from megatron_iwsft.data.prepare.ngrams import Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't STOP: x_1 = 3.5e-2!", "don t stop x 1 3 5e 2"),
        ("x² ﬁne Ⅳ ｆｕｌｌ", "x2 fine iv full"),
        ("Straße STRASSE ΣΊΣΥΦΟΣ", "strasse strasse σίσυφοσ"),
        ("cafe\u0301 soft\u00adhyphen می\u200cخواهم \ufeffword", "café softhyphen میخواهم word"),
        ("हिन्दी में संख्या", "हिन्दी में संख्या"),
        ("한국어 단어", "한국어 단어"),
        ("共12个 ラーメン ﾗｰﾒﾝ", "共 12 个 ラ ー メ ン ラ ー メ ン"),
        ("ที่นี่", "ที่ นี่"),
        ("😀 ∑ — …", ""),
    ],
)
def test_words_are_without_case_punctuation_and_form(text: str, words: str) -> None:
    assert str(Words(text)) == words


def test_runs_of_words() -> None:
    assert Words("a b c d").runs(3) == ["a b c", "b c d"]
    assert Words("é b c d").runs(3) == ["é b c", "b c d"]
    assert Words("a b").runs(3) == []


def test_two_characters_count_as_a_word() -> None:
    assert Words("一二三四五").runs(2) == ["一 二 三 四", "二 三 四 五"]
    assert Words("一x二三y").runs(2) == ["一 x 二", "x 二 三", "二 三 y"]
    assert Words("一二三").runs(2) == []
