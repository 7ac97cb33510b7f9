"""The rewards `Math` and `ReasoningGym`, each as a callable like the user's own.

Their libraries are imported when a reward is made: reasoning-gym takes seconds.
"""

import json
import logging
import re
from decimal import Decimal
from functools import cache, partial
from typing import Any

from asyncrl_api.protocols import Row, Score


class MathAnswer:
    """The reward `Math`: 1 if math-verify finds the response's final answer equal to the row's, else 0.

    math-verify's own time limits are off: they need SIGALRM, and they count a comparison that was too slow as
    a wrong answer. The pool's limit makes it an error.
    """

    def __init__(self, answer_field: str) -> None:
        import math_verify

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its time limits are off
        self._parse = partial(math_verify.parse, parsing_timeout=None)
        self._verify = partial(math_verify.verify, timeout_seconds=None)
        self._answer_field = answer_field
        self("", "$1$", {answer_field: 1})  # builds the grammar, so that the first sample need not

    def __call__(self, prompt: str, response: str, row: Row, /) -> float | Score:
        reference = self._parse(as_latex(row[self._answer_field]))
        if not reference:
            raise ValueError(f"no answer in the row's {self._answer_field}: {row[self._answer_field]!r:.100}")
        answer = self._parse(response)
        if not answer:
            return Score(0.0, "The response holds no answer.")
        return 1.0 if self._verify(reference, answer) else 0.0


def as_latex(answer: object) -> str:
    r"""Return a row's reference answer in a form that math-verify takes as a whole.

    Only what follows `####` counts, as in GSM8K. A bare answer is put between dollar signs: in running text,
    `2\sqrt{3}` would be searched for a number, and 2 would be found.
    """
    text = str(answer).rpartition("####")[2].strip()
    if re.fullmatch(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?", text, re.IGNORECASE):
        text = f"{Decimal(text.replace(',', '')):f}"  # 1e-5 would be read as a product with Euler's number
    return text if re.search(r"\$|\\\(|\\\[|\\boxed", text) else f"${text}$"


class ReasoningGymAnswer:
    """The reward `ReasoningGym`: the score of the data set that made the row and that its `metadata` names.

    The answer is the content of the last `<answer>` of the response, or the whole response. Some data sets
    give parts of a point, and a few look at their parameters when they score: those that differ from the
    defaults are in the row as `metadata.dataset_parameters`.
    """

    def __init__(self) -> None:
        from reasoning_gym import create_dataset
        from reasoning_gym.utils import extract_answer

        self._extract_answer = extract_answer

        @cache
        def dataset(name: str, parameters: str) -> Any:
            return create_dataset(name, **json.loads(parameters))

        self._dataset = dataset

    def __call__(self, prompt: str, response: str, row: Row, /) -> float:
        metadata = row["metadata"]
        parameters = json.dumps(metadata.get("dataset_parameters", {}), sort_keys=True)
        dataset = self._dataset(metadata["source_dataset"], parameters)
        answer = self._extract_answer(response)
        return float(dataset.score_answer(response.strip() if answer is None else answer, row))
