import json
from pathlib import Path

import pytest
import yaml
from results_pages.results import collect_results, read_published, summarize_runs, write_measured

import capsule_heads
from capsule_heads.hub.results import read_runs

DOCS = Path(capsule_heads.__file__).parents[1] / "docs" / "benchmarks"
PUBLISHED_TASKS = {"sst5", "sst2_root", "smallnorb"}
MEASURED_TASKS = {"sst5", "sst2_root", "toy_norb"}


def run(seed=0, **keys):
    common = {"task": "sst5", "backbone": "b", "steps": 1000, "trained_parameters": 38464, "training_seconds": 60.0}
    return {**common, "seed": seed, "validation_accuracy": 0.5, "test_accuracy": 0.5, "test_loss": 1.0, **keys}


def test_means_and_standard_deviations():
    runs = [run(2, test_accuracy=0.48), run(0, test_accuracy=0.49), run(1, test_accuracy=0.53, training_seconds=90.0)]
    (record,) = summarize_runs(runs)
    assert record == {
        "task": "sst5",
        "backbone": "b",
        "freeze_backbone": True,
        "head_type": "token_depth",
        "head_options": "",
        "metric": "accuracy",
        "seeds": [0, 1, 2],
        "validation": {"mean": 0.5, "sd": 0.0},
        "test": {"mean": pytest.approx(0.5), "sd": pytest.approx(0.0264575)},  # sqrt((0.02^2 + 0.01^2 + 0.03^2) / 2)
        "trained_parameters": 38464,
        "steps": 1000,
        "training_seconds": 70.0,
    }


def test_one_seed_and_no_labels():
    (record,) = summarize_runs([{**run(), "test_accuracy": None}])
    assert record["validation"] == {"mean": 0.5, "sd": None}
    assert record["test"] is None


def test_runs_that_do_not_say_their_backbone():
    unnamed = {name: value for name, value in run().items() if name != "backbone"}
    assert summarize_runs([unnamed])[0]["backbone"] == ""
    assert [r["backbone"] for r in summarize_runs([unnamed, run(task="sst2_root")], "x")] == ["x", "b"]


@pytest.mark.parametrize(
    "runs, message",
    [
        ([run(0), run(0)], r"seeds \[0, 0\]; expected each seed once"),
        ([run(0), run(1, trained_parameters=5)], r"differ in trained_parameters: \[5, 38464\]; summarize them apart"),
        ([run(0), run(1, steps=2)], r"differ in steps: \[2, 1000\]"),
    ],
)
def test_runs_of_different_experiments(runs, message):
    with pytest.raises(ValueError, match=message):
        summarize_runs(runs)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[1]", ": expected keys and values, found list"),
        (b"3", ": expected keys and values, found int"),
        (b"{", " is not JSON: Expecting property name"),
        (b"\xff", " is not JSON: 'utf-8' codec"),
        (
            b'{"task": "sst5", "seed": 0}',
            " holds no results of .*: steps, trained_.*, training_.* missing",
        ),
    ],
)
def test_files_that_are_no_results(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"results\.json{message}"):
        read_runs([path])


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", "a"),
        ("seed", True),
        ("steps", None),
        ("steps", 1.5),
        ("task", ["sst5"]),
        ("backbone", 3),
        ("freeze_backbone", 1),
        ("head_type", None),
        ("head_options", {}),
        ("training_arguments", "none"),
        ("test_accuracy", "0.5"),
        ("test_accuracy", False),
    ],
)
def test_results_of_the_wrong_type(tmp_path, key, value):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**run(), key: value}))
    with pytest.raises(ValueError, match=f"holds no results of .*: {key} is .*, of the wrong type"):
        read_runs([path])


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", "1e999", "1e300", "1" + "0" * 400])
@pytest.mark.parametrize("key", ["steps", "seed", "training_seconds", "test_accuracy"])
def test_numbers_that_are_none(tmp_path, key, value):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**run(), key: "a number"}).replace('"a number"', value))
    with pytest.raises(ValueError, match=f"holds no results of .*: {key} is .*(expected a finite number|wrong type)"):
        read_runs([path])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda records: {"results": records}, r"measured\.json: expected a list, found dict"),
        (
            lambda records: [1],
            "holds no results that scripts/benchmarks/summarize.py put there: 1 stands where keys and values",
        ),
        (lambda records: [{"task": "sst5"}], "backbone, commit, date, .* missing"),
        (lambda records: [{**records[0], "date": 2026}], "date is 2026, of the wrong type"),
        (lambda records: [{**records[0], "test": {"mean": "x", "sd": None}}], "mean is 'x', of the wrong type"),
    ],
)
def test_a_file_of_measured_results_that_is_none(tmp_path, published, change, message):
    path = tmp_path / "measured.json"
    write_measured(path, summarize_runs([run()]), "aaa", "2026-01-02")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_measured(path, summarize_runs([run()]), "bbb", "2026-01-02")
    with pytest.raises(ValueError, match=message):
        collect_results("sst5", published(), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no records; expected a list of keys and values"),
        (b"a: 1", "holds no records; expected a list"),
        (b"- 1", "holds no records; expected a list"),
        (b"{", "is not YAML: while parsing"),
        (b"\xff", "is not YAML: 'utf-8' codec"),
        (b"- 1: 2", "expected the keys task, .*; got 1"),
    ],
)
def test_a_file_of_published_results_that_is_none(tmp_path, content, message):
    path = tmp_path / "published.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_published(path)


def test_measured_results_are_replaced_by_those_of_the_same_task_backbone_and_metric(tmp_path):
    path = tmp_path / "measured.json"
    write_measured(path, summarize_runs([run(), run(task="sst2_root")]), "aaa", "2026-01-02")
    write_measured(path, summarize_runs([run(test_accuracy=0.75), run(backbone="a")]), "bbb", "2026-03-04")
    found = [
        (r["task"], r["backbone"], r["test"]["mean"], r["commit"], r["date"]) for r in json.loads(path.read_text())
    ]
    assert found == [
        ("sst2_root", "b", 0.5, "aaa", "2026-01-02"),
        ("sst5", "a", 0.5, "bbb", "2026-03-04"),
        ("sst5", "b", 0.75, "bbb", "2026-03-04"),
    ]


def test_measured_results_of_different_heads_stand_beside_each_other(tmp_path):
    path = tmp_path / "measured.json"
    write_measured(path, summarize_runs([run(head_type="linear"), run(head_type="spatial_pose")]), "a", "2026-01-02")
    write_measured(path, summarize_runs([run(head_type="linear", test_accuracy=0.25)]), "b", "2026-01-02")
    found = [(record["head_type"], record["test"]["mean"]) for record in json.loads(path.read_text())]
    assert found == [("linear", 0.25), ("spatial_pose", 0.5)]


def test_runs_whose_heads_have_other_options_are_summarized_apart(tmp_path):
    runs = [run(0), run(0, head_options="n_iters=2", test_accuracy=0.25)]
    assert [record["test"]["mean"] for record in summarize_runs(runs)] == [0.5, 0.25]
    write_measured(tmp_path / "measured.json", summarize_runs(runs), "a", "2026-01-02")
    methods = {x.method for x in collect_results("sst5", DOCS / "published.yaml", tmp_path / "measured.json")}
    assert {"capsule head, frozen b", "capsule head (n_iters=2), frozen b"} <= methods


def test_measured_results_are_not_lost_where_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "measured.json"
    write_measured(path, summarize_runs([run()]), "aaa", "2026-01-02")
    before = path.read_text()

    def write_half(self, text, encoding):
        self.write_bytes(text[:99].encode(encoding))
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space left"):
        write_measured(path, summarize_runs([run(test_accuracy=0.75)]), "bbb", "2026-03-04")
    assert path.read_text() == before


@pytest.mark.parametrize(
    "commit, date, backbone, message",
    [
        ("", "2026-01-02", "b", "Expected the commit"),
        ("a", "2.1.2026", "b", "Expected the date of the runs as YYYY-MM-DD; got '2.1.2026'"),
        ("a", "2026-01-02", "", "The runs of sst5 do not say which backbone they had; give its name"),
    ],
)
def test_measured_results_that_say_too_little(tmp_path, commit, date, backbone, message):
    with pytest.raises(ValueError, match=message):
        write_measured(tmp_path / "measured.json", summarize_runs([run(backbone=backbone)]), commit, date)
    assert not (tmp_path / "measured.json").exists()


PUBLISHED = {
    "task": "sst5",
    "method": "CNN",
    "authors": "Ay et al.",
    "year": 2014,
    "accuracy": 48.0,
    "trained_parameters": None,
    "total_parameters": 5,
    "url": "https://arxiv.org/abs/1",
    "where": "Table 1",
}


@pytest.fixture
def published(tmp_path):
    def write(*records):
        path = tmp_path / "published.yaml"
        path.write_text(yaml.safe_dump(list(records)))
        return path

    return write


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"url": "arXiv 1"}, "sst5, CNN, 2014: url is 'arXiv 1'; expected the https address"),
        ({"accuracy": "48.0"}, "accuracy is '48.0', of the wrong type"),
        ({"accuracy": 480}, "accuracy is 480; expected percent"),
        ({"error": 52.0}, "expected the keys task, method"),
        ({"year": None}, "year is None, of the wrong type"),
    ],
)
def test_published_records_that_are_not_as_they_should_be(published, changes, message):
    with pytest.raises(ValueError, match=message):
        read_published(published({**PUBLISHED, **changes}))


def test_a_published_record_twice(published):
    with pytest.raises(ValueError, match="sst5, CNN, 2014: stands there twice"):
        read_published(published(PUBLISHED, {**PUBLISHED, "accuracy": 49.0}))


def test_published_and_measured_results_together(published, tmp_path):
    measured = tmp_path / "measured.json"
    write_measured(measured, summarize_runs([run(0), run(1)]), "abc", "2026-01-02")
    path = published(PUBLISHED, {**PUBLISHED, "year": 2013, "remark": "r"}, {**PUBLISHED, "task": "smallnorb"})
    results = collect_results("sst5", path, measured)
    assert [(r.year, r.authors, r.measured, r.sd) for r in results] == [
        (2013, "Ay et al.", False, None),
        (2014, "Ay et al.", False, None),
        (2026, "this project", True, 0.0),
    ]
    assert results[-1].method == "capsule head, frozen b"
    assert results[-1].accuracy == pytest.approx(50.0)
    assert results[-1].trained_parameters == 38464
    assert results[-1].source == "commit abc, 2026-01-02, seeds [0, 1]"
    assert results[0].source == "https://arxiv.org/abs/1"
    with pytest.raises(ValueError, match="No accuracies on 'glue'"):
        collect_results("glue", path, measured)


def test_other_metrics_and_splits_without_labels_are_no_accuracies(published, tmp_path):
    measured = tmp_path / "measured.json"
    write_measured(measured, summarize_runs([run(test_accuracy=None, test_f1=0.5)]), "abc", "2026-01-02")
    assert len(collect_results("sst5", published(PUBLISHED), measured)) == 1


def test_the_published_numbers_of_this_repository():
    records = read_published(DOCS / "published.yaml")
    assert {record["task"] for record in records} == PUBLISHED_TASKS
    for record in records:
        trained, total = record["trained_parameters"], record["total_parameters"]
        assert trained is None or total is None or trained <= total
        assert 2004 <= record["year"] <= 2030


def test_the_measured_numbers_of_this_repository():
    records = json.loads((DOCS / "measured.json").read_text(encoding="utf-8"))
    assert {record["task"] for record in records} <= MEASURED_TASKS
    for record in records:
        assert len(record["seeds"]) == len(set(record["seeds"])) and record["commit"] and record["date"]
        assert 0 < record["test"]["mean"] < 1
