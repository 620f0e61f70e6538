"""`capsule-heads predict`: one line for each input, in order, and nothing that was not meant as a text."""

import json

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from capsule_heads import CapsuleHeadForSequenceClassification


def answers(result):
    status, out, err = result
    assert status == 0, err
    return [json.loads(line) for line in out.removesuffix("\n").split("\n")]  # not at U+2028


@pytest.fixture
def saved(backbone, tmp_path, shake):
    """saved(**fields): directory of a classifier with such fields, whose scores are not all alike."""

    def save(change=lambda tokenizer: None, **fields):
        model = CapsuleHeadForSequenceClassification.from_backbone(backbone, d_inp=8, n_parts=6, **fields)
        shake(model.head, scale=0.5)
        model.save_pretrained(tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(backbone)
        change(tokenizer)
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def test_every_line_has_its_answer(call, classifier):
    lines = ["good", "", "  bad film ", "\t", "   ", "the food\tit was long"]
    found = answers(call("predict", classifier, stdin="\n".join(lines) + "\n"))
    assert [line["text"] for line in found] == lines
    model = CapsuleHeadForSequenceClassification.from_pretrained(classifier)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    for line in found:
        pair = line["text"].split("\t")
        expected = model(**tokenizer(*pair, return_tensors="pt")).logits.softmax(-1)[0]
        assert line["label"] == model.config.id2label[int(expected.argmax())]
        assert line["score"] == pytest.approx(expected.max().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"good\r\nbad\r\n", ["good", "bad"]),
        (b"good\nbad", ["good", "bad"]),
        (b"\xef\xbb\xbfgood\n", ["good"]),
        (b"\n", [""]),
        ("caf\u00e9 \u2028 bad\x0cfilm\n".encode(), ["caf\u00e9 \u2028 bad\x0cfilm"]),  # no other line ends
        (b'"good", he said\ntext, label\n[1] film\n', ['"good", he said', "text, label", "[1] film"]),
        (b"reviews.txt\n", ["reviews.txt"]),  # meant as a text, here
    ],
)
def test_lines_are_what_stands_between_line_ends(call, classifier, content, texts):
    assert [line["text"] for line in answers(call("predict", classifier, stdin=content))] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "There is nothing to classify; expected texts"),
        (b"good\ncaf\xe9\n", "Standard input, line 2, is not UTF-8 text ("),
        ("good\n".encode("utf-16"), "Standard input, line 1, is not UTF-8 text ("),
        (b'{"text": "good"}\n{"text": "bad"}\n', "Standard input begins with JSON; expected one text a line"),
        (b'["good", "bad"]\n', "Standard input begins with JSON"),
        (b'{\n  "text": "good"\n}\n', "Standard input begins with JSON"),
        (b"text,label\ngood,1\n", "Standard input begins with the header of a table, 'text,label'; expected one text"),
        (b'"id";"Text"\n1;good\n', "Standard input begins with the header of a table"),
        (b"sentence\tlabel\ngood\t1\n", "Standard input begins with the header of a table"),
    ],
)
def test_lines_that_are_no_texts(fails, call, classifier, content, message, monkeypatch):
    status, out, err = call("predict", classifier, stdin=content)
    assert (status, out) == (2, "")
    assert err.rstrip("\n").splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.parametrize("name", ["none.txt", "data/none.CSV", "none.jsonl", "none.parquet", "none.tsv.gz"])
def test_the_name_of_a_file_is_no_text(fails, classifier, name):
    line = fails("predict", classifier, "good", name)
    assert line.startswith(f"error: {name} is the name of a file that does not exist, and the model classifies texts")
    assert f"< {name}" in line


def test_texts_that_only_end_like_files(call, classifier):
    texts = ["see data.txt", "Node.js", "good.", "v1.0"]
    assert [line["text"] for line in answers(call("predict", classifier, *texts))] == texts


def test_arguments_that_are_not_utf8(fails, classifier):
    assert fails("predict", classifier, "good", "caf\udce9").startswith(
        "error: Input 2 is not UTF-8 text: 'caf\\udce9'"
    )


def test_texts_that_are_cut_are_counted(call, classifier, saved):
    long = "good film " * 50
    status, out, err = call("predict", classifier, "bad", long, long)
    assert len(answers((status, out, err))) == 3
    assert "Cut to 64 tokens: 2 of 3 texts, the longest of which has 102 tokens." in err.splitlines()
    assert "Cut to" not in call("predict", classifier, "bad")[2]
    windows = saved(num_labels=2, window_length=16, window_overlap=2, window_special_tokens=[1, 1])
    assert "Cut to" not in call("predict", windows, long)[2]


def test_a_tokenizer_that_does_not_say_what_the_backbone_takes(call, saved):
    model = saved(lambda tokenizer: setattr(tokenizer, "model_max_length", 10**30), num_labels=2)
    status, out, err = call("predict", model, "good " * 200)
    assert len(answers((status, out, err))) == 1
    assert "Cut to 64 tokens: 1 of 1 texts" in err


def test_a_text_without_a_token(call, saved):
    def without_special_tokens(tokenizer):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A", pair="$A $B:1", special_tokens=[]
        )

    model = saved(without_special_tokens, num_labels=2)
    status, out, err = call("predict", model, stdin="good\n\nbad\n")
    assert (status, out) == (2, "")
    assert "error: The text of standard input, line 2 is '', and the tokenizer makes no token of it" in err
    assert "The text of input 1 is ' '" in call("predict", model, " ")[2]


def test_several_labels_and_numbers(call, saved):
    names = {0: "long", 1: "good", 2: "odd"}
    model = saved(id2label=names, problem_type="multi_label_classification")
    (found,) = answers(call("predict", model, "the food was good"))
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(model)
    inputs = AutoTokenizer.from_pretrained(model)("the food was good", return_tensors="pt")
    with torch.no_grad():
        scores = dict(zip(names.values(), loaded(**inputs).logits.sigmoid()[0].tolist()))
    assert found["scores"] == pytest.approx(scores, rel=1e-5)
    assert set(found["labels"]) == {name for name, score in scores.items() if score > 0.5}
    assert list(found) == ["text", "labels", "scores"]


def test_a_regression_prints_its_value(call, saved):
    model = saved(num_labels=1, label_mean=3.0)
    (found,) = answers(call("predict", model, "the food was good"))
    inputs = AutoTokenizer.from_pretrained(model)("the food was good", return_tensors="pt")
    with torch.no_grad():
        value = CapsuleHeadForSequenceClassification.from_pretrained(model)(**inputs).logits.item()
    assert found == {"text": "the food was good", "value": pytest.approx(value, rel=1e-5)}


@pytest.mark.slow
def test_the_output_is_nothing_but_the_answers(run, classifier):
    done = run("predict", classifier, stdin="good\n\nbad\n")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["good", "", "bad"]
    assert "%|" not in done.stderr and "Loading" not in done.stderr
