"""Explanations: which tokens and layers a score came from, as numbers, pictures and a page."""

from .attributions import Credits, Explanation, Word, compute_credits, explain

__all__ = ["Credits", "Explanation", "Word", "compute_credits", "explain"]
