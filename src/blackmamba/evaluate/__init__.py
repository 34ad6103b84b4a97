"""How good a model is."""

from blackmamba.evaluate.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
