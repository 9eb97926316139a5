"""Loops around score -> plan -> prune -> recover."""
