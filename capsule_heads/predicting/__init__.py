"""Predictions: scores of inputs, and files of rows with the answers beside them."""

from .answers import Answers
from .files import Prediction, predict_file, unfinished_rows
from .scoring import Scorer, score_inputs

__all__ = ["Answers", "Prediction", "Scorer", "predict_file", "score_inputs", "unfinished_rows"]
