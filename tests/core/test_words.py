"""What a word is."""

from __future__ import annotations

from tunesmith.core.words import fold, pieces, words


def test_letters_and_digits_make_words_and_cjk_characters_stand_alone_even_beside_latin_ones():
    assert words("Don't, GPT4中文!") == ["don", "t", "gpt4", "中", "文"]
    assert words("カナ한글 snake_case") == ["カ", "ナ", "한", "글", "snake", "case"]


def test_combining_marks_stay_with_their_letters_and_wide_forms_are_folded():
    assert words("हिन्दी cafe\u0301") == ["हिन्दी", "café"]
    assert fold("ＡＢ１") == "AB1" and words("Ａ１") == ["a1"]
    assert pieces("a-b 中c") == ["a-b", "中", "c"]
