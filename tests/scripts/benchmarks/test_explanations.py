"""scripts/benchmarks/explanations.py, as a user runs it."""

import json


def test_faithfulness(call, classifier, tmp_path):
    options = ("--task", "reviews", "--max_texts", 3, "--json", tmp_path / "f.json", "--picture", tmp_path / "f.png")
    status, out, err = call("benchmarks/explanations.py", classifier, *options)
    assert status == 0, err
    rows = [line for line in out.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0][2:] for row in rows] == [
        "credits (this package)",
        "integrated gradients, 50 steps",
        "gradient x input",
        "leave one out",
        "attention rollout",
        "random",
    ]
    found = json.loads((tmp_path / "f.json").read_text())
    assert len(found["texts"]) == 3 and len(found["methods"]["random"]) == 3
    of_ours = [x["comprehensiveness"] for x in found["methods"]["credits (this package)"]]
    assert f"| credits (this package) | {sum(of_ours) / 3:.3f} ±" in out
    assert (tmp_path / "f.png").exists()
