"""A tiny random backbone with its tokenizer, and a way to run the scripts as a user does."""

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

import capsule_heads

ROOT = Path(capsule_heads.__file__).parents[1]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "was", "and", "it", "good", "bad", "food", "film", "long"]


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Directory of a BERT of width 16 with 2 layers."""
    folder = str(tmp_path_factory.mktemp("backbone"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModel.from_config(BertConfig(vocab_size=32, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fields = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 64}
    fields["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Offline, with a cache of its own, and one thread: more do not help so small a model."""
    home = str(tmp_path_factory.mktemp("hf_home"))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": home, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run(environment):
    """run(script, *arguments): the finished process, run from the repository's root."""

    def run_script(script, *arguments, stdin=None):
        return subprocess.run(
            [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run_script


@pytest.fixture
def call(monkeypatch, capfd):
    """call(script, *arguments): status, output and errors of a script, in this process: it spares it the imports."""

    def call_script(script, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return call_script


@pytest.fixture
def fails(call):
    """fails(script, *arguments): the line that a script ends with, where the user made a mistake."""

    def call_failing(script, *arguments):
        status, out, err = call(script, *arguments)
        assert (status, out) == (2, "")
        line = err.rstrip("\n").splitlines()[-1]
        assert line.startswith("error: ")
        return line

    return call_failing
