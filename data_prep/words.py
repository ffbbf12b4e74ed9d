"""Words and sentences of English texts for datatrove's filters: by spaCy's rules, as its own class has them, but faster.

Its class finds the sentences also where words are asked for, forgets all words after each text, and splits a text once more for
every filter. Imported only where datatrove and spaCy are needed.
"""

from functools import cache
from typing import Any

import spacy
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer, strip_strings

WORDS_HELD = 1 << 18
"""Different words that spaCy remembers (about 130 MB) before it begins anew."""
DROPPED = "IS_ALPHA"
"""Left out of every text; datatrove's class leaves it out where spaCy fails for it, which depends on the texts before."""


class EnglishWords(WordTokenizer):
    """To be given to a filter as its `language`."""

    def __init__(self) -> None:
        super().__init__("en")
        self._begin()
        self._text, self._words = "", list[str]()

    def _begin(self) -> None:
        self._rules = spacy.blank("en")
        self._sentencizer = self._rules.add_pipe("sentencizer")

    def _split(self, text: str) -> Any:
        if len(self._rules.vocab.strings) > WORDS_HELD:
            self._begin()
        return self._rules.tokenizer(text.replace(DROPPED, ""))

    def word_tokenize(self, text: str) -> list[str]:
        if text != self._text:  # several filters ask for the words of one text
            self._words = strip_strings([token.text for token in self._split(text)])
            self._text = text
        return list(self._words)

    def sent_tokenize(self, text: str) -> list[str]:
        return strip_strings([sentence.text for sentence in self._sentencizer(self._split(text)).sents])

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return load_word_tokenizer("en").span_tokenize(text)


@cache
def english_words() -> EnglishWords:
    """The one of this process."""
    return EnglishWords()
