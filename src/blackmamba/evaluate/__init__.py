"""How good a model is."""

from blackmamba.evaluate.perplexity import perplexity

__all__ = ["perplexity"]
