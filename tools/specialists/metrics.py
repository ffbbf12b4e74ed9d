"""How right an answer is, beside what sacrebleu and rouge-score measure; and how much two groupings have in common."""

import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence


def normalised_mutual_information(these: Sequence[Hashable], those: Sequence[Hashable]) -> float:
    """Of two groupings of the same things, over the mean of their entropies: 1 for the same, 0 for unrelated ones.

    Strehl and Ghosh 2002 with the arithmetic mean. Two groupings of one group each are the same.
    """
    if len(these) != len(those) or not these:
        raise ValueError(f"two groupings of the same things are compared, not of {len(these)} and {len(those)}")
    total = len(these)

    def entropy(counts: Counter) -> float:
        return -sum(count / total * math.log(count / total) for count in counts.values())

    first, second, both = Counter(these), Counter(those), Counter(zip(these, those, strict=True))
    mean = (entropy(first) + entropy(second)) / 2
    return (entropy(first) + entropy(second) - entropy(both)) / mean if mean else 1.0


def plain_words(text: str) -> list[str]:
    """In lower case, without punctuation and articles, as answers are compared (Rajpurkar et al. 2016, SQuAD)."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact_match(answer: str, reference: str) -> float:
    return float(plain_words(answer) == plain_words(reference))


def word_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words (Rajpurkar et al. 2016)."""
    ours, theirs = plain_words(answer), plain_words(reference)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * shared / (len(ours) + len(theirs))
