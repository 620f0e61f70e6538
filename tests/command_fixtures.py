"""What tests of commands and scripts share: a tiny backbone with its tokenizer, and an environment for processes."""

import io
import os
import sys

import pytest

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "was", "and", "it", "good", "bad", "food", "film", "long"]


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Directory of a BERT of hidden size 16 with 2 layers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

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


@pytest.fixture(scope="module")
def classifier(backbone, tmp_path_factory):
    """An untrained classifier of texts with its tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from capsule_heads import CapsuleHeadForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    fields = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    model = CapsuleHeadForSequenceClassification.from_backbone(backbone, d_inp=8, n_parts=6, **fields)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stereo_model(tmp_path_factory):
    """The smallNORB network with random weights, none of them zero."""
    import torch

    from capsule_heads.paper.checkpoints import build_network
    from capsule_heads.paper.image_processing_stereo import StereoImageProcessor

    folder = tmp_path_factory.mktemp("stereo")
    torch.manual_seed(0)
    model = build_network("smallnorb")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    StereoImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture
def call(monkeypatch, capfd):
    """call(command, *arguments): status, output and errors of a command, in this process: it spares it the imports."""

    from capsule_heads.cli import main

    def call_command(*arguments, stdin=""):
        given = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        capfd.readouterr()
        status = 0
        try:
            main([str(x) for x in arguments])
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return call_command


@pytest.fixture
def fails(call):
    """fails(command or script, *arguments): the line that it ends with, where the user made a mistake."""

    def call_failing(*arguments):
        status, out, err = call(*arguments)
        assert (status, out) == (2, "")
        line = err.rstrip("\n").splitlines()[-1]
        assert line.startswith("error: ")
        return line

    return call_failing


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray cluster of two CPUs on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: the extra ray")
    sizes = {"num_cpus": 2, "object_store_memory": 10**8}
    found = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}  # where actors find what tests import
    ray.init("local", **sizes, runtime_env=found, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()
