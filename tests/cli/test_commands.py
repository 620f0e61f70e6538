"""The commands: each once in a process of its own, as a user runs it, and beyond that in this one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

import capsule_heads
from capsule_heads import CapsuleHeadForSequenceClassification

ROOT = Path(capsule_heads.__file__).parents[1]
pytestmark = pytest.mark.slow

TREES = {
    "train.txt": "(3 (2 it) (4 (2 was) (3 fun)))\n(1 (2 it) (1 (2 was) (0 long)))\n(2 (2 a) (2 film))\n",
    "dev.txt": "(1 (2 not) (1 fun))\n(4 (2 a) (4 (3 good) (2 film)))\n",
    "test.txt": "(4 (2 great) (4 fun))\n(0 (2 awful) (0 film))\n(1 (2 too) (1 long))\n",
}
OF_TEST = ("--task", "reviews", "--split", "test")
SMALL = {"d_inp": 8, "n_parts": 4, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


def evaluated(out):
    """What evaluate wrote into the file that its last line names."""
    return json.loads(Path(out.splitlines()[-1]).read_text())


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    for name, content in TREES.items():
        (folder / name).write_text(content)
    return folder


def write(path, **keys):
    path.write_text(yaml.safe_dump({**SMALL, **keys}))
    return path


@pytest.fixture(scope="session")
def reviews_model(run, backbone, tmp_path_factory):
    """Directory of a model that `capsule-heads train` made, on cached hidden states."""
    folder = tmp_path_factory.mktemp("reviews")
    config = write(folder / "run.yaml", task="reviews", backbone=backbone, output_dir=str(folder / "run"), max_steps=3)
    done = run(
        "train", "--config", config, "--cache_hidden_states", "--max_steps", 4, "--seed", 7, "--learning_rate", 0.1
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_train_writes_results(reviews_model, backbone):
    results = json.loads((reviews_model / "results.json").read_text())
    assert (results["task"], results["backbone"], results["seed"], results["steps"]) == ("reviews", backbone, 7, 4)
    fields = {"repository": None, "config": None, "license": "MIT"}
    assert results["dataset"] == {"name": "the 735 reviews in capsule_heads", **fields}
    layers, hidden_size, d_inp, n_parts, n_classes = 3, 16, 8, 4, 2
    assert (results["head_type"], results["head_options"]) == ("token_depth", f"n_parts={n_parts}, d_inp={d_inp}")
    affine_and_norm = layers * hidden_size + (hidden_size + 1) * d_inp + 2 * d_inp
    routings = n_parts * (2 * d_inp + 2 + 2) + n_parts * n_classes * (2 * 2 + 2 + 2)
    assert results["trained_parameters"] == pytest.approx(affine_and_norm + routings, abs=4)  # B_brk
    assert results["training_seconds"] > 0
    for split in ("validation", "test"):
        assert 0 <= results[f"{split}_accuracy"] <= 1
        assert 0.1 < results[f"{split}_loss"] < 2


def test_early_stopping_and_the_best_model(call, backbone, trees, tmp_path):
    folder = tmp_path / "run"
    keys = {"task": "sst5", "backbone": backbone, "source": str(trees), "output_dir": str(folder)}
    keys |= {"num_train_epochs": 6, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "early_stopping_patience": 2}
    keys |= {"learning_rate": 0.0, "min_learning_rate": 0.0}
    status, out, err = call("train", "--config", write(tmp_path / "run.yaml", **keys))
    assert status == 0
    assert "early stopping" not in out + err
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 3  # nothing is learned at a rate of 0: best in the first of 6 epochs, then patience
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert {"validation_accuracy", "test_accuracy"} <= results.keys()

    status, out, _ = call("evaluate", folder, "--task", "sst5", "--source", trees, "--split", "test")
    assert status == 0
    assert evaluated(out)["accuracy"] == results["test_accuracy"]


RELOAD = """
import json, sys, warnings, logging
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
import capsule_heads
folder, text = sys.argv[1:]
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()
answers = pipeline("text-classification", model=folder)(text, top_k=None)
json.dump([model.config.id2label, probabilities, answers], sys.stdout)
"""


def test_a_trained_model_is_loaded_in_a_new_process(reviews_model, environment, call):
    text = "the food was bad and it was long"
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, reviews_model, text], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "not supported" not in done.stderr
    labels, probabilities, answers = json.loads(done.stdout.splitlines()[-1])
    assert labels == {"0": "negative", "1": "positive"}
    expected = dict(zip(labels.values(), probabilities))
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(expected, rel=1e-5)

    status, out, _ = call("predict", reviews_model, text)
    best = max(expected, key=expected.get)
    assert status == 0
    assert json.loads(out) == {"text": text, "label": best, "score": pytest.approx(expected[best], rel=1e-5)}


def test_predict(run, call, reviews_model):
    texts = ["the food was bad", "a good book\tthe good film", "“good”, très bien"]
    model = CapsuleHeadForSequenceClassification.from_pretrained(reviews_model)
    tokenizer = AutoTokenizer.from_pretrained(reviews_model)
    assert tokenizer(*texts[1].split("\t"))["token_type_ids"] == [0] * 5 + [1] * 4
    scores = [model(**tokenizer(*t.split("\t"), return_tensors="pt")).logits.softmax(-1).max().item() for t in texts]
    assert len({round(score, 4) for score in scores}) == 3

    status, out, _ = call("predict", reviews_model, *texts)
    assert status == 0
    assert "très" in out  # not \u00e8
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["text"] for line in lines] == texts
    assert [line["score"] for line in lines] == pytest.approx(scores, rel=1e-5)
    assert {line["label"] for line in lines} <= {"negative", "positive"}

    done = run("predict", reviews_model, "--batch_size", 2, stdin="\n".join(texts) + "\n")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == texts
    assert [line["score"] for line in lines] == pytest.approx(scores, rel=1e-5)


def test_evaluate(run, call, reviews_model):
    trained = json.loads((reviews_model / "results.json").read_text())
    done = run("evaluate", reviews_model, "--task", "reviews", "--batch_size", 50)
    assert done.returncode == 0, done.stderr
    outputs = {"validation": done.stdout, "test": call("evaluate", reviews_model, *OF_TEST)[1]}
    for split, out in outputs.items():
        found = evaluated(out)
        assert found["accuracy"] == trained[f"{split}_accuracy"]
        assert found["negative_log_likelihood"] == pytest.approx(trained[f"{split}_loss"], rel=1e-5)
        assert out.startswith(f"reviews, {split}\nexamples ") and f"accuracy  {found['accuracy']:.4f}" in re.sub(
            " +", "  ", out
        )
        folder = reviews_model / f"evaluation-reviews-{split}"
        assert {x.name for x in folder.iterdir()} == {"evaluation.json", "confusion.png", "reliability.png"}


def test_long_texts_in_windows(call, backbone, tmp_path):
    folder = tmp_path / "run"
    keys = {"task": "reviews", "backbone": backbone, "output_dir": str(folder), "max_steps": 3, "learning_rate": 0.1}
    config = write(tmp_path / "run.yaml", **keys, window_overlap=4, window_length=12)
    status, *_ = call("train", "--config", config, "--cache_hidden_states")
    assert status == 0
    model = CapsuleHeadForSequenceClassification.from_pretrained(folder)
    assert model.config.windowing == (12, 4, 1, 1)
    trained = json.loads((folder / "results.json").read_text())
    out = call("evaluate", folder, *OF_TEST)[1]
    assert evaluated(out)["negative_log_likelihood"] == pytest.approx(trained["test_loss"], rel=1e-5)

    long = " ".join(["the food was good and it was a long film"] * 20)
    inputs = AutoTokenizer.from_pretrained(folder)(long, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 202  # the backbone takes 64
    expected = model(**inputs).logits.softmax(-1).max().item()
    status, out, _ = call("predict", folder, "good", long)
    assert status == 0
    assert json.loads(out.splitlines()[1])["score"] == pytest.approx(expected, rel=1e-5)


def test_a_mistake_is_one_line_without_traceback(run, backbone, tmp_path):
    config = write(tmp_path / "run.yaml", task="sst5", backbone=backbone, source=str(tmp_path / "none"))
    done = run("train", "--config", config)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: No SST at {tmp_path}/none: give a directory")


def test_mistakes_in_training(fails, backbone, trees, tmp_path):
    keys = {"task": "sst5", "backbone": backbone, "source": str(trees), "output_dir": str(tmp_path / "run")}
    config = write(tmp_path / "run.yaml", **keys)
    unknown = write(tmp_path / "unknown.yaml", **keys, n_prats=3)
    error = fails("train", "--config", unknown)
    assert error == f"error: {unknown}: unknown key n_prats; did you mean n_parts?"
    error = fails("train", "--config", tmp_path / "none.yaml")
    assert error == f"error: {tmp_path}/none.yaml: No such file or directory"
    assert f"No SST at {tmp_path}/none" in fails("train", "--config", config, "--source", tmp_path / "none")
    assert f"{tmp_path}/none" in fails("train", "--config", config, "--backbone", tmp_path / "none")
    error = fails("train", "--config", config, "--backbone", "no/such")
    assert error.startswith(
        "error: There is no directory no/such here, and no such model is in the cache, while the Hub"
    )
    error = fails("train", "--config", config, "--backbone", tmp_path)
    assert error == f"error: {tmp_path} has no config.json; expected the directory or Hub name of a model."
    error = fails("train", "--config", config, "--backbone", "new:vit")
    assert error.startswith("error: sst5 is of texts, and the backbone new:vit, a vit model, takes images; expected a ")
    error = fails("train", "--config", config, "--report_to", "dvclive")
    assert error.startswith("error: report_to is dvclive: ")
    error = fails("train", "--config", config, "--optim", "lomo")
    assert error.startswith("error: optim is OptimizerNames.LOMO: ") or error.startswith("error: optim is lomo: ")
    assert "package 'none_such', which is not installed" in fails(
        "train", "--config", config, "--backbone=package:none_such/a"
    )
    error = fails("train", "--config", config, "--cache_hidden_states", "--no_freeze_backbone")
    assert error.startswith("error: The backbone is not frozen")
    error = fails("train", "--config", config, "--early_stopping_patience", "2")
    assert error == "error: early_stopping_patience is 2 without load_best_model_at_end; set both, or neither."
    error = fails("train", "--config", config, "--resume_from_checkpoint", tmp_path / "none")
    assert error.startswith(
        f"error: resume_from_checkpoint is {tmp_path}/none, which is not a directory; expected the "
    )
    error = fails("train", "--config", config, "--metric_for_best_model", "acuracy")
    assert error == "error: metric_for_best_model is acuracy; expected one of loss, accuracy."
    error = fails("train", "--config", config, "--max_length", "2")
    assert error == "error: max_length is 2; expected more: the tokenizer adds 2 special tokens to each input."
    assert f"'{config}/run'" in fails("train", "--config", config, "--output_dir", f"{config}/run")  # inside a file
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_run_is_resumed_from_its_last_whole_checkpoint(call, fails, backbone, trees, tmp_path, caplog):
    keys = {"task": "sst5", "backbone": backbone, "source": str(trees), "num_train_epochs": 6, "learning_rate": 0.1}
    keys |= {"save_strategy": "steps", "save_steps": 2}
    config = write(tmp_path / "run.yaml", **keys, output_dir=str(tmp_path / "run"))
    options = ("--resume_from_checkpoint", "last")
    status, _, err = call("train", "--config", config, *options)  # there is none yet
    assert status == 0, err
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    state = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-1])
    error = fails("train", "--config", config, "--resume_from_checkpoint", state.parent)
    assert error.startswith(f"error: {state.parent} is not complete: optimizer.pt has ")

    (tmp_path / "run" / "model.safetensors").unlink()
    status, _, err = call("train", "--config", config, *options)
    assert status == 0, err
    assert caplog.text.count(f"{state.parent} is not complete, and is skipped") == 1
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 6
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights


def test_accelerate_starts_two_processes_on_the_cpu(environment, backbone, tmp_path):
    config = write(tmp_path / "run.yaml", task="reviews", backbone=backbone, output_dir=str(tmp_path / "run"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml"]
    options = ["--num_train_epochs", "1", "--per_device_train_batch_size", "33"]
    done = subprocess.run(
        [*launch, "scripts/train.py", "--config", config, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 8  # 495 reviews, 66 at a step


def test_numbers_that_are_not_finite_end_a_training(fails, backbone, tmp_path):
    shutil.copytree(backbone, tmp_path / "backbone")
    broken = AutoModel.from_pretrained(backbone)
    with torch.no_grad():
        broken.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "backbone")
    keys = {"task": "reviews", "backbone": str(tmp_path / "backbone"), "output_dir": str(tmp_path / "run")}
    error = fails("train", "--config", write(tmp_path / "run.yaml", **keys, freeze_backbone=True, use_cpu=True))
    assert error.startswith(
        "error: Step 1: the loss is not finite. Not finite: backbone.encoder.layer.0.output.dense.weight"
    )
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_nothing_to_predict(fails, reviews_model):
    assert fails("predict", reviews_model).startswith("error: There is nothing to classify; expected texts")


def test_mistakes_in_evaluation(fails, backbone, reviews_model, trees, tmp_path):
    error = fails("evaluate", reviews_model, "--task", "sst5", "--source", trees)
    assert "trained for ['negative', 'positive'], and the dataset has ['very negative'," in error
    header = "index\tsentence1\tsentence2"
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(f"{header}\tlabel\n0\tA cat sat.\tA cat.\tentailment\n")
    (tmp_path / "test.tsv").write_text(f"{header}\n0\tA dog sat.\tA dog.\n")
    error = fails("evaluate", reviews_model, "--task", "rte", "--source", tmp_path, "--split", "test")
    assert error == "error: rte has no labelled split 'test'; it has train, validation, test."
    error = fails("evaluate", reviews_model, "--task", "reviews", "--split", "")
    assert error == "error: reviews has no labelled split ''; it has train, validation, test."
    error = fails("evaluate", reviews_model, "--task", "reviews", "--batch_size", "0")
    assert error == "error: command line: argument --batch_size: 0 is not a whole number of at least 1"
    assert f"{tmp_path}/none" in fails("evaluate", tmp_path / "none", "--task", "reviews")
    assert "bert model, not of a capsule-head model" in fails("evaluate", backbone, "--task", "reviews")
    error = fails("evaluate", reviews_model, "--task", "toy_norb")
    assert error == "error: toy_norb is of images, and the model classifies texts; expected a task of texts."
    assert "--task" in fails("evaluate", reviews_model)


def test_a_file_of_texts_is_no_text(call, fails, reviews_model, tmp_path):
    file = tmp_path / "reviews.txt"
    file.write_text("good food\na long film\n")
    said = (
        f"{file} is a file, and the model classifies texts; expected a text: pass the lines of a file by standard input"
    )
    assert said in fails("predict", reviews_model, "good", file)
    assert said in fails("explain", reviews_model, file)
    status, out, _ = call("predict", reviews_model, stdin=file.read_text())
    assert (status, len(out.splitlines())) == (0, 2)


def test_mistakes_in_prediction(fails, backbone, tmp_path):
    assert f"{tmp_path}/none" in fails("predict", tmp_path / "none", "a text")
    assert "bert model, not of a capsule-head model" in fails("predict", backbone, "a text")
    assert "model" in fails("predict")


@pytest.mark.parametrize(
    "arguments", [["predict", "a text"], ["explain", "a text"], ["evaluate", "--task", "reviews"], ["demo"]]
)
def test_models_that_are_not_there(fails, tmp_path, arguments):
    command, *others = arguments
    error = fails(command, "no/such", *others)
    assert error.startswith(
        "error: There is no directory no/such here, and no such model is in the cache, while the Hub"
    )
    assert error.endswith("; expected a directory with a model, or a name on the Hub.")
    assert fails(command, "./none", *others).startswith("error: There is no directory ./none; expected one that holds")
    assert fails("push", tmp_path / "none", "a/b").startswith(f"error: There is no directory {tmp_path}/none; expected")


CODE = """
from pathlib import Path

from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

Path({marker!r}).touch()


class OwnConfig(BertConfig):
    model_type = "own_type_of_the_test"


class OwnModel(BertModel):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def add_code(folder, marker, file, auto_map, **fields):
    """Let a JSON file of a model's folder name code that leaves a marker when it runs."""
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, "auto_map": auto_map, **fields}))


@pytest.mark.parametrize("answer", ["y\n" * 9, "n\n", ""])
def test_no_code_of_a_model_runs_and_nobody_is_asked(call, backbone, classifier, tmp_path, answer):
    marker = tmp_path / "it_ran"
    own, head = tmp_path / "own", tmp_path / "head"
    shutil.copytree(backbone, own)
    shutil.copytree(classifier, head)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    add_code(own, marker, "config.json", auto_map, model_type="own_type_of_the_test")
    fields = {"tokenizer_class": "OwnTokenizer"}
    add_code(
        head, marker, "tokenizer_config.json", {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}, **fields
    )
    options = ("--task", "reviews", "--use_cpu", "--output_dir", tmp_path / "run", "--max_steps", 1)
    for arguments, of in (
        (
            ("train", "--backbone", own, *options),
            f"{own} comes with Python code of its own, which runs only with your consent",
        ),
        (
            ("predict", head, "a text"),
            f"The tokenizer of {head} comes with Python code of its own, which runs only with your",
        ),
        (("evaluate", head, "--task", "reviews"), f"The tokenizer of {head} comes with Python code of its own"),
    ):
        status, out, err = call(*arguments, stdin=answer)
        assert (status, out) == (2, "")
        assert err.startswith(f"error: {of}") and "trust_remote_code=True" in err and err.count("\n") == 1
        assert not marker.exists()


@pytest.fixture
def small_run(backbone, tmp_path):
    """The arguments of a training run of five steps, with a checkpoint after two."""
    keys = {"task": "reviews", "backbone": backbone, "output_dir": str(tmp_path / "run"), "max_steps": 5}
    return ("train", "--config", write(tmp_path / "run.yaml", **{**keys, "save_strategy": "steps", "save_steps": 2}))


@pytest.mark.parametrize("step", [1, 4])
def test_an_interrupted_training_says_what_is_saved(call, small_run, tmp_path, monkeypatch, step):
    from capsule_heads.training import CapsuleTrainer

    training_step = CapsuleTrainer.training_step

    def interrupt(self, *args):
        if self.state.global_step == step - 1:
            raise KeyboardInterrupt
        return training_step(self, *args)

    monkeypatch.setattr(CapsuleTrainer, "training_step", interrupt)
    status, _, err = call(*small_run)
    assert status == 130
    said = {
        1: "there is no checkpoint yet, and nothing is saved.",
        4: f"{tmp_path}/run/checkpoint-2 is saved, and --resume_from_checkpoint last continues from there.",
    }
    assert err.split("\n")[-2] == f"error: interrupted; {said[step]}"


@pytest.mark.parametrize("kind", [ValueError, OSError, KeyboardInterrupt])
def test_an_evaluation_that_ends_after_training_says_where_the_model_is(call, small_run, tmp_path, monkeypatch, kind):
    from capsule_heads.training import CapsuleTrainer

    def end(self, *args, **kwargs):
        raise kind("cat.png is damaged")

    monkeypatch.setattr(CapsuleTrainer, "evaluate", end)
    status, _, err = call(*small_run)
    line = err.split("\n")[-2]
    if kind is KeyboardInterrupt:
        said = f"error: interrupted; the trained model is saved in {tmp_path}/run, and was not evaluated to the end."
        assert (status, line) == (130, said)
    else:
        said = f"error: The trained model is saved in {tmp_path}/run, but its evaluation failed: cat.png is damaged"
        assert (status, line) == (2, said)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def shown(err):
    """What stands on stderr beside progress bars, of which there is one at a time."""
    assert "\x1b[A" not in err  # a bar below another
    pieces = [piece.strip() for piece in re.split(r"[\r\n]", err)]
    return [piece for piece in pieces if piece and not re.match(r"(\w+( \w+)*: )?( *\d+%\|| *\d+it )", piece)]


def test_commands_are_quiet(run, backbone, tmp_path):
    keys = {"task": "reviews", "backbone": backbone, "output_dir": str(tmp_path / "run"), "max_steps": 4}
    keys |= {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": False,
    }
    done = run("train", "--config", write(tmp_path / "run.yaml", **keys), "--cache_hidden_states", "--max_length", 11)
    assert done.returncode == 0, done.stderr
    cut, line, *others = shown(done.stderr)
    assert all(x.startswith(("Recipe: ", "Probabilities ")) for x in others), others
    assert cut.startswith("Cut to 11 tokens: ") and line.startswith("Computing the hidden states of ")
    for bar in ("Tokenizing", "Computing hidden states", "Evaluating"):
        assert f"{bar}: " in done.stderr
    done = run("evaluate", tmp_path / "run", "--task", "reviews")
    assert done.returncode == 0 and shown(done.stderr) == [] and "Tokenizing" not in done.stderr
    done = run("predict", tmp_path / "run", "good food")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_damaged_model(fails, reviews_model, tmp_path):
    shutil.copytree(reviews_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for arguments in (["predict", tmp_path / "model", "a text"], ["evaluate", tmp_path / "model", *OF_TEST]):
        assert f"The weights in {tmp_path}/model cannot be read: a file is damaged" in fails(*arguments)
