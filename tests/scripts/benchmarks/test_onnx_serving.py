"""The benchmark of exported models, with a tiny one."""

import csv

import pytest

pytestmark = pytest.mark.slow


def test_three_models_on_the_same_texts(call, classifier, tmp_path):
    data, page = tmp_path / "texts.csv", tmp_path / "page.md"
    rows = [("text", "label"), ("good food", "positive"), ("a bad film", "negative"), ("it was long", "negative")]
    with open(data, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    page.write_text("Before\n<!-- serving: begin -->\n<!-- serving: end -->\n")
    given = (classifier, "--data", data, "--rounds", 1, "--page", page, "--machine", "a test")
    status, out, err = call("benchmarks/onnx_serving.py", *given)
    assert status == 0, err
    table = [line.split(" | ") for line in out.splitlines()[2:]]
    assert [row[0] for row in table] == ["| torch", "| ONNX", "| ONNX, 8 bits"]
    assert table[1][1] == table[0][1] and table[1][3] == "3 of 3"
    assert "1 thread; a test, " in page.read_text() and out.strip() in page.read_text()
