"""scripts/benchmarks/state_encodings.py on a tiny backbone and a few texts."""


def test_encodings_are_compared(call, backbone, tiny_set, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- encodings: begin -->\n<!-- encodings: end -->\n")
    options = ("--set", "cr", "--data", tiny_set, "--backbone", backbone, "--steps", 2, "--runs", tmp_path / "runs")
    status, out, err = call("benchmarks/state_encodings.py", *options, "--seeds", 2, "--page", page)
    assert status == 0, err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["float16", "96"], ["bfloat16", "96"], ["int8", "60"]]  # of three layers of 16
    assert rows[0][4] == "" and all("±" in row[4] for row in rows[1:])
    assert "cr, 10 test texts, 2 seeds, 2 steps; " in page.read_text() and out.strip() in page.read_text()
    again = call("benchmarks/state_encodings.py", *options, "--seeds", 2)
    assert again[:2] == (0, out)  # nothing is measured again
    assert "have seeds 2, not 3" in call("benchmarks/state_encodings.py", *options, "--seeds", 3)[2]


def test_mistakes(fails, tmp_path):
    options = ("--set", "cr", "--data", tmp_path / "nowhere", "--runs", tmp_path / "runs")
    assert "nowhere" in fails("benchmarks/state_encodings.py", *options)
