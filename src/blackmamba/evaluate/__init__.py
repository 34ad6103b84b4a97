"""How good a model is: on a text, on questions, on tasks of lm-evaluation-harness."""

from blackmamba.evaluate.likelihood import (
    Likelihood,
    continuation_likelihoods,
    document_likelihoods,
)
from blackmamba.evaluate.perplexity import perplexity
from blackmamba.evaluate.suite import Score, evaluate
from blackmamba.evaluate.tasks import TASK_LISTS

__all__ = [
    "TASK_LISTS",
    "Likelihood",
    "Score",
    "continuation_likelihoods",
    "document_likelihoods",
    "evaluate",
    "perplexity",
]
