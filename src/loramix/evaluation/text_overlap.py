"""How much of a reference an answer has: BLEU, ROUGE-L, and the recipe of Chinese fine-tuning code.

BLEU is sacrebleu's corpus BLEU with the tokenizer of the language. ROUGE-L is rouge-score's, with a tokenizer that
keeps Chinese: its own drops every character that is not a Latin letter or digit, and scores 0.0 on Chinese. The GLM
recipe (ChatGLM's p-tuning script, copied by LLaMA-Factory and others; methods.md 4.2) is run by the libraries it names.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU

from loramix.errors import ConfigError
from loramix.evaluation.metrics import Measured, Stats

TextMetric = Literal["bleu", "rouge_l", "glm_bleu_4", "glm_rouge_l"]
_CJK = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_ONE_CJK = re.compile(rf"[{_CJK}]")


def language_of(texts: Sequence[str]) -> str:
    """Returns "zh" where more than a fifth of all letters are Chinese characters, else "en"."""
    chinese = sum(len(_ONE_CJK.findall(text)) for text in texts)
    letters = sum(sum(character.isalpha() for character in text) for text in texts)
    return "zh" if chinese > letters / 5 else "en"


class CharactersAndWords(Tokenizer):  # type: ignore[misc]
    """Lower-cased words of letters and digits, and each Chinese (or Japanese) character by itself. On text in plain
    ASCII the same tokens as rouge-score's own tokenizer without stemming."""

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.lower())


def text_metric(metric: TextMetric, answers: Sequence[str], references: Sequence[str], language: str) -> Measured:
    """Returns a text metric on some answers.

    Args:
        metric: its name.
        answers, references: one each for every example.
        language: "en" or "zh".

    Raises:
        ConfigError: the GLM recipe's libraries are not installed.
    """
    if metric == "bleu":
        return _bleu(answers, references, language)
    if metric == "rouge_l":
        return _rouge_l(answers, references)
    return _glm_bleu_4(answers, references) if metric == "glm_bleu_4" else _glm_rouge_l(answers, references)


def _bleu(answers: Sequence[str], references: Sequence[str], language: str) -> Measured:
    bleu = BLEU(tokenize="zh" if language == "zh" else "13a")
    stats: Stats = []
    signature = ""
    for answer, reference in zip(answers, references, strict=True):
        one = bleu.corpus_score([answer], [[reference]])
        signature = str(bleu.get_signature())
        stats.append([float(n) for n in (*one.counts, *one.totals, one.sys_len, one.ref_len)])
    return Measured("bleu", signature, stats)


def _rouge_l(answers: Sequence[str], references: Sequence[str]) -> Measured:
    scorer = RougeScorer(["rougeL"], tokenizer=CharactersAndWords())
    stats: Stats = [
        [scorer.score(reference, answer)["rougeL"].fmeasure, 1.0]
        for answer, reference in zip(answers, references, strict=True)
    ]
    return Measured(
        "rouge_l", f"rougeL.f1|mean|tok:characters+words|stem:no|rouge-score:{version('rouge-score')}", stats
    )


def _glm_bleu_4(answers: Sequence[str], references: Sequence[str]) -> Measured:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smooth = SmoothingFunction().method3
    stats: Stats = []
    for answer, reference in zip(answers, references, strict=True):
        with warnings.catch_warnings():  # nltk warns where no n-gram of an answer occurs; smoothing is for that
            warnings.simplefilter("ignore", UserWarning)
            stats.append([float(sentence_bleu([list(reference)], list(answer), smoothing_function=smooth)), 1.0])
    return Measured("glm_bleu_4", f"sentence_bleu|mean|tok:characters|smooth:method3|nltk:{version('nltk')}", stats)


def _glm_rouge_l(answers: Sequence[str], references: Sequence[str]) -> Measured:
    jieba, rouge = _chinese_libraries()
    stats: Stats = []
    for answer, reference in zip(answers, references, strict=True):
        said, wanted = list(jieba.cut(answer)), list(jieba.cut(reference))
        # Without words on one side the library has nothing to compare and the recipe counts 0.
        empty = not " ".join(said).split() or not " ".join(wanted).split()
        score = 0.0 if empty else rouge.get_scores(" ".join(said), " ".join(wanted))[0]["rouge-l"]["f"]
        stats.append([float(score), 1.0])
    signature = f"rouge-l.f|mean|tok:jieba-{version('jieba')}|rouge-chinese:{version('rouge-chinese')}"
    return Measured("glm_rouge_l", signature, stats)


def _chinese_libraries() -> tuple[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba imports pkg_resources, which is deprecated
            import jieba
            from rouge_chinese import Rouge
    except ImportError as error:
        raise ConfigError(
            'metric glm_rouge_l needs jieba and rouge-chinese: pip install "loramix[chinese]".'
        ) from error
    jieba.setLogLevel(60)
    return _segmenter(), Rouge()


@cache
def _segmenter() -> Any:
    """Returns jieba's tokenizer, ready; made once, for it takes a second."""
    import jieba

    segmenter = jieba.Tokenizer()
    # By default jieba reads a marshalled file from the shared temporary folder, which anybody may have written.
    with TemporaryDirectory() as segmenter.tmp_dir:
        segmenter.initialize()
    return segmenter
