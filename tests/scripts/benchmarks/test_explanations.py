"""scripts/benchmarks/explanations.py, as a user runs it."""

import json

from capsule_heads.explain.methods import METHODS


def test_faithfulness(call, classifier, tiny_set, tmp_path):
    options = ("--set", "cr", "--data", tiny_set, "--max_texts", 3)
    files = ("--json", tmp_path / "f.json", "--picture", tmp_path / "f.png")
    status, out, err = call("benchmarks/explanations.py", classifier, classifier, *options, *files)
    assert status == 0, err
    rows = [line for line in out.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0][2:] for row in rows] == list(METHODS)
    found = json.loads((tmp_path / "f.json").read_text())
    assert len(found["texts"]) == 3 and len(found["models"]) == 2
    of_ours = [x["masked"]["comprehensiveness"] for x in found["models"][0]["methods"]["credits"]]
    assert f"| credits | {sum(of_ours) / 3:.3f} ±" in out
    assert all(row.split(" | ")[4] == "-" for row in rows)  # the tokenizer has no mask token
    assert (tmp_path / "f.png").exists()
    status, again, err = call("benchmarks/explanations.py", "--table", tmp_path / "f.json")
    assert (status, again) == (0, out), err


def test_mistakes(fails, classifier, tmp_path):
    message = "error: Expected models to measure, or --table with files of earlier runs: one of them."
    assert fails("benchmarks/explanations.py") == message
    assert fails("benchmarks/explanations.py", classifier, "--table", "x.json") == message
    assert "models without --set" in fails("benchmarks/explanations.py", classifier)
    assert "--data" in fails("benchmarks/explanations.py", classifier, "--set", "cr")
