"""scripts/benchmarks/explanations.py, as a user runs it."""

import json

from capsule_heads.explain.methods import CREDITS, LEAVE_ONE_OUT, METHODS


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
    assert found["models"][0]["accuracy"] is None and "accuracy, %" not in out  # of one head: nothing to compare

    # Two heads, of a known accuracy, in one table.
    for model in found["models"]:
        model["accuracy"] = 0.75
    (tmp_path / "g.json").write_text(json.dumps(found))
    status, out, err = call("benchmarks/explanations.py", "--table", tmp_path / "f.json", tmp_path / "g.json")
    assert status == 0, err
    _, _, unknown, known, *_ = out.splitlines()
    assert unknown.startswith("| cr | token_depth | - |") and known.startswith("| cr | token_depth | 75.0 |")
    ours, theirs = (
        [x["masked"]["comprehensiveness"] for x in found["models"][0]["methods"][name]]
        for name in (CREDITS, LEAVE_ONE_OUT)
    )
    assert f"| {(sum(ours) - sum(theirs)) / 3:.3f} ±" in known

    # Of one text there is a mean, and no standard error.
    for model in found["models"]:
        model["methods"] = {name: rows[:1] for name, rows in model["methods"].items()}
    (tmp_path / "h.json").write_text(json.dumps(found))
    status, of_one, err = call("benchmarks/explanations.py", "--table", tmp_path / "h.json")
    assert status == 0 and f"| credits | {ours[0]:.3f} (one text) |" in of_one, err

    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nAfter.\n")
    status, nothing, err = call(
        "benchmarks/explanations.py", "--table", tmp_path / "f.json", tmp_path / "g.json", "--page", page
    )
    assert (status, nothing) == (0, ""), err
    expected = f"Before.\n<!-- measured: begin -->\n{out.rstrip()}\n<!-- measured: end -->\nAfter.\n"
    assert page.read_text() == expected
    page.write_text("Without marks.")
    status, _, err = call("benchmarks/explanations.py", "--table", tmp_path / "f.json", "--page", page)
    assert status == 2 and "lacks marks; expected the lines <!-- measured: begin --> and" in err


def test_mistakes(fails, classifier, tmp_path):
    message = "error: Expected models to measure, or --table with files of earlier runs: one of them."
    assert fails("benchmarks/explanations.py") == message
    assert fails("benchmarks/explanations.py", classifier, "--table", "x.json") == message
    page = ("--table", "x.json", "--page", tmp_path / "page.md")
    assert "x.json" in fails("benchmarks/explanations.py", *page)
    assert "--page without --table" in fails("benchmarks/explanations.py", *page[2:], classifier, "--set", "cr")
    given = ("--table", "x.json", "--picture", tmp_path / "x.png")
    assert "--picture with --table, which measures nothing" in fails("benchmarks/explanations.py", *given)
    assert "models without --set" in fails("benchmarks/explanations.py", classifier)
    assert "--data" in fails("benchmarks/explanations.py", classifier, "--set", "cr")
