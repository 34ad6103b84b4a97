"""Figures about models and runs: scaling.py says what a run on many GPUs takes."""
