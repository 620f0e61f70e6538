"""Logistic regressions on pooled hidden states: what a head on all tokens at all layers has to beat."""

from collections.abc import Sequence

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from capsule_heads.data import HiddenStateCache

Labelled = tuple[np.ndarray, Sequence[int]]  # features `[texts, size]` and class indices


def pool_states(cache: HiddenStateCache) -> np.ndarray:
    """Return mean, maximum and first token at each layer, `[texts, 3, layers, hidden_size]`, in float32."""
    rows = (np.asarray(cache[row]["hidden_states"], np.float32) for row in range(len(cache)))
    return np.stack([np.stack([x.mean(0), x.max(0), x[0]]) for x in rows])


def choose_regression(
    scaler: BaseEstimator | str, cs: Sequence[float], train: Labelled, validation: Labelled, max_iter: int = 1000
) -> tuple[Pipeline, dict[float, float]]:
    """Fit a regression for each C, and return the best on the validation split, with the accuracies of all by C.

    Args:
        scaler: of features, before the regression; "passthrough" for none.
        cs: inverse strengths of the penalty. Of equally good ones, the first is taken.
        train: what is fitted.
        validation: what C is chosen by.
        max_iter: the most iterations of LBFGS.
    """
    found = {c: make_pipeline(scaler, LogisticRegression(C=c, max_iter=max_iter)).fit(*train) for c in cs}
    accuracies = {c: float(model.score(*validation)) for c, model in found.items()}
    return found[max(accuracies, key=accuracies.__getitem__)], accuracies
