"""Names clusters by the words that tell their prompts from the others'."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from loramix.data.domains import name_problem
from loramix.data.overlap import normal_words

_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff]")
_JOINING = frozenset("的了是在和有为以与中下列其对这那不也就都而及或一个们我你他它什么怎请吗呢の")
"""Characters that join others and tell no subject."""
_PLAIN = frozenset(
    [
        "did",
        "does",
        "doing",
        "get",
        "gets",
        "got",
        "gotten",
        "use",
        "used",
        "uses",
        "using",
        "want",
        "wants",
        "need",
        "needs",
        "like",
        "just",
    ]
)
"""English words of the same kind that scikit-learn's list of function words does not have."""
_LONGEST = 24


def salient_words(prompts: Sequence[str], clusters: Sequence[int], k: int, *, count: int = 8) -> list[list[str]]:
    """Returns each cluster's most telling words, the most telling first; none where no word tells it from the others.

    A word tells a cluster by its mean tf-idf weight there less its mean weight elsewhere. Words are those of
    data/overlap.py without numbers, single letters and English function words; of Chinese and Japanese, pairs of
    neighbouring characters.

    Args:
        prompts: texts.
        clusters: each one's cluster, 0 to k - 1.
        k: how many clusters there are.
        count: words of a cluster at most.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = [list(telling_words(prompt)) for prompt in prompts]
    if not any(words):
        return [[] for _ in range(k)]
    vectorizer = TfidfVectorizer(analyzer=list, sublinear_tf=True)
    weights_NV = vectorizer.fit_transform(words)
    vocabulary = vectorizer.get_feature_names_out()
    # A word of one prompt tells that prompt, not its cluster.
    rare = weights_NV.getnnz(axis=0) < min(2, len(prompts) / (2 * k))
    members = np.asarray(clusters)
    found = []
    for one in range(k):
        here, there = (np.asarray(weights_NV[rows].sum(axis=0)).ravel() for rows in (members == one, members != one))
        more = here / max(1, (members == one).sum()) - there / max(1, (members != one).sum())
        more[rare] = 0
        order = np.lexsort((vocabulary, -more.round(9)))[:count]
        found.append([str(vocabulary[at]) for at in order if more[at] > 0])
    return found


def telling_words(text: str) -> Iterator[str]:
    """Yields the words of a text that may tell its subject."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    empty = ENGLISH_STOP_WORDS | _PLAIN
    for piece in re.findall(r"\w+", text):
        words = normal_words(piece)
        for word in words:
            if len(word) > 1 and not _CJK.search(word) and not word.isdecimal() and word not in empty:
                yield word
        for first, second in pairwise(words):
            joined = first + second
            if len(joined) == 2 and all(_CJK.match(c) for c in joined) and not _JOINING & set(joined):
                yield joined


def names_of(words: Sequence[Sequence[str]]) -> list[str]:
    """Returns a distinct name for each cluster that is valid as the name of a domain: its first two words, more where
    two clusters would be called the same, a number where there are no words.

    Args:
        words: of each cluster, the most telling first.
    """
    names: list[str] = []
    for number, own in enumerate(words, 1):
        usable = [word[:_LONGEST] for word in own if not name_problem(word[:_LONGEST])]
        candidates = ["-".join(usable[:most]) for most in (2, 3) if usable] or [f"cluster-{number}"]
        name = next((one for one in candidates if one not in names), f"{candidates[0]}-{number}")
        while name in names:
            name += "+"
        assert name_problem(name) is None, name
        names.append(name)
    return names
