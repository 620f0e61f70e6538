"""scripts/benchmarks/cache_rates.py on some texts."""

import pytest
from cache_rates import cluster_table

pytestmark = pytest.mark.slow


def test_all_cases_are_timed(run, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in ("rates", "clusters")))
    options = ("--texts", 200, "--rounds", 1, "--scratch", tmp_path / "s", "--gpu_texts_a_second", 10, "--page", page)
    done = run("benchmarks/cache_rates.py", *options)
    assert done.returncode == 0, done.stderr
    about, *tables = done.stdout.strip().split("\n\n")
    assert about.startswith("200 texts of 24 tokens, 7 layers of 384; ")
    rates, clusters = (table.splitlines()[2:] for table in tables)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rates]
    assert len(rows) == 14 and len({(what, means) for what, means, *_ in rows}) == 14
    assert all(int(texts.replace(",", "")) > 0 for _, _, texts, *_ in rows)
    assert len(clusters) == 7
    assert all(line in page.read_text() for line in done.stdout.splitlines())


def test_a_network_is_a_bound():
    lines = cluster_table(5000, 100_000).splitlines()[2:]
    assert lines[0] == "| 1 | 5,000 | 5,000 | 5,000 |"
    assert lines[3] == "| 8 | 40,000 | 12,500 (network) | 40,000 |"  # of 10 Gbit/s, 1.25 GB/s
