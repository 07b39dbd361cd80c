"""How near a written text is to the one that was expected.

ROUGE, BLEU and the word error rate are those of the packages ``rouge-score``, ``sacrebleu`` and
``jiwer``, which come with the optional part ``suites``.
"""

import importlib
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from compress.bench.metrics._classification import influence
from compress.core.errors import EnvironmentFault

ROUGE: Final = ("rouge1", "rouge2", "rougeL")
_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION: Final = frozenset(string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without punctuation, English articles and superfluous white space.

    The normalization of SQuAD's own evaluation (Rajpurkar et al. 2016, section 6.1).
    """
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 where a normalized answer is one of the right ones, else 0."""
    return float(normalized(answer) in {normalized(one) for one in right})


def token_f1(answer: str, right: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over words, for the best of the right answers.

    Where one of the two has no word at all, 1 if both have none, else 0.
    """
    return max(_word_f1(normalized(answer).split(), normalized(one).split()) for one in right)


def _word_f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F-measures of each answer by name (Lin 2004), without stemming.

    Raises:
        EnvironmentFault: the package is not installed.
    """
    scorer = _package("rouge_score.rouge_scorer").RougeScorer(list(ROUGE), use_stemmer=False)
    scores = [scorer.score(one, answer) for one, answer in zip(references, answers, strict=True)]
    return {name: [float(score[name].fmeasure) for score in scores] for name in ROUGE}


def bleu(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002; settings of Post 2018), as `influence` gives it.

    Raises:
        EnvironmentFault: the package is not installed.
    """
    package: Any = _package("sacrebleu")
    parts = []
    for answer, reference in zip(answers, references, strict=True):
        score = package.sentence_bleu(answer, [reference])
        parts.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    table = np.array(parts, dtype=np.int64)
    whole = table.sum(0)
    score = _corpus_bleu(package, whole)
    if len(table) < 2:
        return [score]
    return influence(score, np.array([_corpus_bleu(package, whole - row) for row in table]))


def _corpus_bleu(package: Any, sums: Any) -> float:
    *counts, sys_len, ref_len = (int(value) for value in sums)
    half = len(counts) // 2
    score = package.BLEU.compute_bleu(
        correct=counts[:half], total=counts[half:], sys_len=sys_len, ref_len=ref_len, smooth_method="exp"
    )
    return float(score.score)


def word_errors(answers: Sequence[str], references: Sequence[str]) -> tuple[list[float], list[float]]:
    """Word error rate of each answer, and its weight: the words of its reference.

    Raises:
        EnvironmentFault: the package is not installed.
    """
    package = _package("jiwer")
    rates, words = [], []
    for answer, reference in zip(answers, references, strict=True):
        found = package.process_words(reference, answer)
        count = found.hits + found.substitutions + found.deletions
        rates.append((found.substitutions + found.deletions + found.insertions) / count)
        words.append(float(count))
    return rates, words


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentFault(
            f"the package {name.partition('.')[0]} is missing: install compress-models[suites]",
            "pip install 'compress-models[suites]'",
        ) from error
