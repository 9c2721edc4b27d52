"""Moirai inside other frameworks: one module each, which imports its framework and nothing else."""
