"""scripts/benchmarks/million_texts.py on some texts."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_all_commands_are_measured(call, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Above.\n<!-- million: begin -->\nold\n<!-- million: end -->\nBelow.\n")
    given = ("--texts", 600, "--scratch", tmp_path / "scratch", "--page", page, "--machine", "1 core")
    status, out, err = call("benchmarks/million_texts.py", *given)
    assert status == 0, err
    found = json.loads((tmp_path / "scratch" / "measured.json").read_text())
    assert [x["command"] for x in found["runs"]] == ["cache", "train", "predict"]
    assert all(x["seconds"] > 0 and x["bytes"] > 1e8 for x in found["runs"])
    assert out.count("| `") == 3
    text = page.read_text()
    assert text.startswith("Above.\n<!-- million: begin -->\n600 texts, 0.0 GB of states; 1 core, ")
    assert out.strip() in text and text.endswith("<!-- million: end -->\nBelow.\n")
    again = call("benchmarks/million_texts.py", *given)
    assert again[:2] == (0, out)  # nothing is measured again
    assert "have texts 600, not 700" in call("benchmarks/million_texts.py", *given[2:], "--texts", 700)[2]
