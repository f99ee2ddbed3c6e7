"""Every metric against the library or the definition it stands for.

metric_cases.json holds texts and what the libraries give for them; `python -m tests.test_metrics` computes that anew.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score import tokenize
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from loramix.errors import ConfigError
from loramix.evaluation import text_overlap
from loramix.evaluation.metrics import METRICS, perplexity_measured, value_of
from loramix.evaluation.scoring import Score, perplexity
from loramix.evaluation.text_overlap import CharactersAndWords, language_of, text_metric

FILE = Path(__file__).parent / "metric_cases.json"
CASES: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))

# ---- what the libraries themselves say ---------------------------------------------------------------------------


def _library_bleu(language: str, answers: list[str], references: list[str]) -> float:
    return BLEU(tokenize="zh" if language == "zh" else "13a").corpus_score(answers, [references]).score


def _library_rouge_l(language: str, answers: list[str], references: list[str]) -> float:
    """rouge-score with its own tokenizer, which knows ASCII only: each token is first given an ASCII name."""
    names: dict[str, str] = {}

    def named(text: str) -> str:
        spaced = re.sub(r"([\u3400-\u9fff])", r" \1 ", text.lower())
        tokens = "".join(c if c.isalnum() else " " for c in spaced).split()
        return " ".join(names.setdefault(token, f"t{len(names)}") for token in tokens)

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(answers, references, strict=True)
    return 100 * _mean([scorer.score(named(wanted), named(said))["rougeL"].fmeasure for said, wanted in pairs])


def _library_glm_bleu_4(language: str, answers: list[str], references: list[str]) -> float:
    how = {"smoothing_function": SmoothingFunction().method3}
    pairs = zip(answers, references, strict=True)
    return 100 * _mean([sentence_bleu([list(wanted)], list(said), **how) for said, wanted in pairs])


def _library_glm_rouge_l(language: str, answers: list[str], references: list[str]) -> float:
    jieba = pytest.importorskip("jieba")
    rouge = pytest.importorskip("rouge_chinese").Rouge()
    jieba.setLogLevel(60)
    found = []
    for said, wanted in zip(answers, references, strict=True):
        cut, cut_wanted = " ".join(jieba.cut(said)), " ".join(jieba.cut(wanted))
        comparable = cut.split() and cut_wanted.split()
        found.append(rouge.get_scores(cut, cut_wanted)[0]["rouge-l"]["f"] if comparable else 0.0)
    return 100 * _mean(found)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


LIBRARIES = {
    "bleu": _library_bleu,
    "rouge_l": _library_rouge_l,
    "glm_bleu_4": _library_glm_bleu_4,
    "glm_rouge_l": _library_glm_rouge_l,
}


@pytest.mark.filterwarnings("ignore::UserWarning:nltk")
@pytest.mark.parametrize("metric", LIBRARIES)
@pytest.mark.parametrize("name", CASES)
def test_text_metrics_are_what_the_libraries_say(name, metric):
    case = CASES[name]
    language, answers, references = case["language"], case["answers"], case["references"]
    from_library = LIBRARIES[metric](language, answers, references)
    assert case[metric] == from_library, "the library changed: look why, then run python -m tests.test_metrics"
    measured = text_metric(metric, answers, references, language)
    assert len(measured.stats) == len(answers)
    ours = value_of(metric, measured.stats)
    if metric == "bleu":
        assert ours == from_library
    else:
        assert ours == pytest.approx(from_library, rel=1e-12, abs=1e-12)


def test_the_cases_are_not_all_alike():
    """A metric that gave 0 or 100 everywhere would pass anything."""
    for metric in LIBRARIES:
        assert len({round(case[metric], 3) for case in CASES.values()}) > 6, metric
        assert CASES["chinese"][metric] > 20


# ---- BLEU ----------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from([*"abcd", "the", "cat", "3.5", "don't", "你", "好", "\uff0c", "."]), max_size=12).map(
    " ".join
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8), st.sampled_from(["en", "zh"]))
def test_the_sum_of_sentence_statistics_is_exactly_the_corpus_score(pairs, language):
    answers, references = [said for said, _ in pairs], [wanted for _, wanted in pairs]
    measured = text_metric("bleu", answers, references, language)
    assert value_of("bleu", measured.stats) == _library_bleu(language, answers, references)


@pytest.mark.parametrize(("language", "tokenizer"), [("en", "13a"), ("zh", "zh")])
def test_bleu_carries_sacrebleus_own_signature(language, tokenizer):
    bleu = BLEU(tokenize=tokenizer)
    bleu.corpus_score(["a"], [["a"]])
    signature = text_metric("bleu", ["a"], ["a"], language).signature
    assert signature == str(bleu.get_signature())
    assert f"tok:{tokenizer}|" in signature


# ---- ROUGE-L -------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=126, min_codepoint=9), max_size=60))
def test_plain_english_has_the_tokens_of_rouge_score(text):
    assert CharactersAndWords().tokenize(text) == tokenize.tokenize(text, None)


def test_chinese_characters_are_tokens_and_words_stay_whole():
    wanted = ["用", "python", "3", "11", "写", "代", "码", "naïve", "ウ"]
    assert CharactersAndWords().tokenize("用Python 3.11写代码\uff1anaïve_ウ") == wanted
    plain = RougeScorer(["rougeL"]).score("机器学习", "机器学习")["rougeL"].fmeasure
    ours = text_metric("rouge_l", ["机器学习"], ["机器学习"], "zh")
    assert (plain, value_of("rouge_l", ours.stats)) == (0.0, 100.0)


# ---- which language --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["机器学习"], "zh"),
        (["用 Python 写一个循环语句"], "zh"),
        (["The word 猫 means cat, and 狗 means dog."], "en"),
        (["", "12 + 3 = 15"], "en"),
        ([], "en"),
        (["English only", "另外一个例子是中文的"], "zh"),
    ],
)
def test_languages_are_told_by_their_letters(texts, language):
    assert language_of(texts) == language


# ---- the recipe's libraries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["jieba", "rouge_chinese"])
def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r'pip install "loramix\[chinese\]"'):
        text_metric("glm_rouge_l", ["a"], ["a"], "en")


def test_jieba_says_nothing(capfd):
    jieba = pytest.importorskip("jieba")
    jieba.setLogLevel(10)
    text_overlap._segmenter.cache_clear()
    text_metric("glm_rouge_l", ["机器学习"], ["机器学习"], "zh")
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")


# ---- all metrics -----------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_scores():
    scores = [Score(2.0, 1), Score(1.0, 5), Score(0.25, 7)]
    measured = perplexity_measured(scores, "smollm2")
    assert value_of("perplexity", measured.stats) == perplexity(scores) == math.exp(3.25 / 13)
    assert "smollm2" in measured.signature
    assert "response" in measured.signature


@pytest.mark.parametrize("metric", LIBRARIES)
def test_statistics_can_be_written_and_their_signature_tells_the_choices(metric):
    measured = text_metric(metric, ["机器 a", ""], ["机器 b", "x"], "zh")
    assert json.loads(json.dumps(measured.stats)) == measured.stats
    assert len({len(vector) for vector in measured.stats}) == 1
    words = {"bleu": "smooth:exp", "rouge_l": "stem:no", "glm_bleu_4": "method3", "glm_rouge_l": "jieba"}
    assert words[metric] in measured.signature


def test_shares_are_percentages_of_examples():
    for metric in ("choice", "choice_generated", "exact_number", "rouge_l"):
        assert value_of(metric, [[1.0, 1.0], [0.0, 1.0], [0.5, 1.0], [1.0, 1.0]]) == 62.5
    assert {name for name, metric in METRICS.items() if metric.better == "lower"} == {"perplexity"}


def _generate() -> None:
    import warnings

    warnings.simplefilter("ignore")
    for case in CASES.values():
        texts = case["language"], case["answers"], case["references"]
        case.update({metric: library(*texts) for metric, library in LIBRARIES.items()})
    FILE.write_text(json.dumps(CASES, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _generate()
