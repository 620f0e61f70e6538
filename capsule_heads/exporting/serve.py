"""Classify texts with the model in this folder: python serve.py TEXT ... (a tab separates the two texts of a pair).

It needs numpy, onnxruntime and tokenizers, but neither torch nor transformers.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, texts = Path(__file__).parent, sys.argv[1:]
labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # cuts texts as in training, and pads them
encodings = tokenizer.encode_batch([tuple(text.split("\t")) if "\t" in text else text for text in texts])
session = onnxruntime.InferenceSession(folder / "model.onnx")
columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
inputs = {x.name: np.array([getattr(row, columns[x.name]) for row in encodings]) for x in session.get_inputs()}
(scores,) = session.run(None, inputs)  # logits, or the values of a regression
if labels["problem_type"] == "multi_label_classification":
    scores = 1 / (1 + np.exp(-scores))
elif labels["problem_type"] != "regression":
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
for row in scores.tolist():
    print(json.dumps(dict(zip(labels["labels"], row)), ensure_ascii=False))
