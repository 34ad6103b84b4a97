"""Kernels of a pass over prompts without a gradient; generate/prompt.py puts them together."""
