"""Cache, train and predict with a million short texts, by the commands that a user calls, and measure them.

    python scripts/benchmarks/million_texts.py --scratch DIRECTORY --page docs/benchmarks/cache.md

The texts are made of the embedded reviews: the words of two of them, each text another. The backbone is a BERT of
random weights with 2 layers of 32 numbers, and the head has 16 parts: what is measured is all the rest. Each command is
a process of its own. Its time and the largest memory of its processes are those that the system reports.
"""

import argparse
import csv
import datetime
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kept_runs import keep_settings
from results_pages.marks import add_page_options, put_between_marks
from results_pages.tables import markdown
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast, set_seed

from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.data import load_reviews
from capsule_heads.files import read_json, write_json

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MEASURED = "measured.json"


def make_texts(n: int) -> list[tuple[str, str]]:
    """Return texts, each another, and their labels: those of the review that a text begins with."""
    rng, reviews = random.Random(0), load_reviews()["train"]
    known = [(row["text"].split(), ("no", "yes")[row["label"]]) for row in reviews]
    found: dict[str, str] = {}
    while len(found) < n:
        (first, label), (second, _) = rng.choice(known), rng.choice(known)
        words = first[: rng.randint(4, 10)] + second[-rng.randint(1, 6) :]
        found.setdefault(" ".join(words), label)
    return list(found.items())


def save_backbone(folder: Path, texts: list[tuple[str, str]]) -> None:
    """Write a small BERT with random weights, and a tokenizer that knows the texts' words."""
    words = sorted({word for text, _ in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"model_input_names": ["input_ids", "attention_mask"], "pad_token": "[PAD]", "model_max_length": 64}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    set_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **SIZES)
    AutoModel.from_config(config).save_pretrained(folder)


def run(name: str, arguments: list[Any]) -> dict[str, Any]:
    """Run a command of capsule-heads, and return its seconds and the largest memory of its processes, in bytes.

    Raises:
        RuntimeError: If it fails.
    """
    start = time.perf_counter()
    command = [sys.executable, "-m", "capsule_heads", name, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=sys.stderr.fileno())  # standard output is for the table
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"capsule-heads {name} failed with status {os.waitstatus_to_exitcode(status)}.")
    return {"command": name, "seconds": time.perf_counter() - start, "bytes": usage.ru_maxrss * 1024}


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Run the commands, one after another, on what `make_texts` makes, and keep what was measured in the folder."""
    data, backbone, states, trained = (folder / name for name in ("texts.csv", "backbone", "states", "run"))
    texts = make_texts(options.texts)
    with open(data, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *texts])
    save_backbone(backbone, texts)
    given = ["--data", data, "--backbone", backbone, "--use_cpu", "--cache_dir", states, "--disable_tqdm", "true"]
    batches = ["--per_device_train_batch_size", 256, "--per_device_eval_batch_size", 256, "--num_train_epochs", 1]
    kept = ["--n_parts", 16, "--save_strategy", "no", "--eval_strategy", "no", "--output_dir", trained]
    answers = folder / "answers.csv"
    found = [
        run("cache", [*given, "--batch_tokens", 16384]),
        run("train", [*given, *batches, *kept]),
        run("predict", [trained, "--data", data, "--output", answers, "--batch_size", 256, "--hidden_states", states]),
    ]
    with open(answers, encoding="utf-8", newline="") as file:
        n_rows = sum(1 for _ in csv.reader(file)) - 1
    if n_rows != len(texts):
        raise RuntimeError(f"{answers} has {n_rows:,} rows of {len(texts):,}.")
    size = sum(path.stat().st_size for path in states.rglob("*.safetensors"))
    accuracy = read_json(trained / "results.json")["validation_accuracy"]
    about = {"texts": len(texts), "states": size, "accuracy": accuracy, "machine": platform.machine()}
    write_json(folder / MEASURED, {**about, "date": str(datetime.date.today()), "runs": found})


def make_table(found: dict[str, Any]) -> str:
    """Return a Markdown table of the commands."""
    rows = [
        [
            f"`{x['command']}`",
            f"{x['seconds']:,.0f}",
            f"{found['texts'] / x['seconds']:,.0f}",
            f"{x['bytes'] / 1e9:.2f}",
        ]
        for x in found["runs"]
    ]
    return markdown(["command", "seconds", "texts a second", "largest memory of a process, GB"], rows)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=at_least(100), default=1_000_000)
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder for all files; what was measured stays there"
    )
    add_page_options(parser)
    options = parser.parse_args()
    try:
        keep_settings(options.scratch, texts=options.texts)
        if not (options.scratch / MEASURED).exists():
            measure(options, options.scratch)
        found = read_json(options.scratch / MEASURED)
        table = make_table(found)
        if options.page is not None:
            about = f"{found['texts']:,} texts, {found['states'] / 1e9:.1f} GB of states"
            where = f"{options.machine}, {found['date']}. Accuracy on the validation rows: {found['accuracy']:.3f}."
            put_between_marks(options.page, "million", f"{about}; {where}\n\n{table}")
    except (OSError, RuntimeError, ValueError) as error:
        fail(error)
    print(table)


if __name__ == "__main__":
    main()
