"""Training, explaining, saving and every routing strategy on a CUDA device."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from oracle import INF, NAMES, OUTPUTS, P_MODELS, as_torch, draw, random_cotangents, relative
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run_program
from tiny_backbones import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast, TrainerCallback

from capsule_heads import (
    CapsuleHeadForAudioClassification,
    CapsuleHeadForImageClassification,
    CapsuleHeadForSequenceClassification,
    CapsuleTrainer,
    CapsuleTrainingArguments,
)
from capsule_heads.data.hidden_states import CapsuleCollator, HiddenStateCache
from capsule_heads.explain import explain
from capsule_heads.ops import STRATEGIES, route
from capsule_heads.paper.configuration_stereo_conv import StereoConvConfig

DEVICE = "cuda"
ON_CUDA = ("auto", *(name for name in STRATEGIES if name not in ("kept", "cpu")))
N_LABELS, N_EXAMPLES, N_TOKENS = 3, 12, 9
HEAD = {"num_labels": N_LABELS, "d_inp": 8, "n_parts": 6}
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "film", "plot", "is", "was", "good", "bad", "not", "dull"]


def test_other_tests_see_no_cuda_device():
    """What is not marked `gpu` runs on the CPU on every machine, and so does what it starts."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()


# ---------------------------------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------------------------------


def values_and_gradients(tensors, strategy, device, **options):
    """Route on a device, and return outputs, and gradients of a random combination of them, on the CPU."""
    tensors = [x.detach().to(device).requires_grad_() for x in tensors]
    outputs = route(*tensors, strategy=strategy, return_R=True, **options)
    assert all(x.device.type == device for x in outputs)
    differentiable = [x for x in outputs if x.requires_grad]  # R of the first iteration is constant
    cotangents = [x.to(device) for x in random_cotangents(differentiable)]
    return [x.detach().cpu() for x in (*outputs, *torch.autograd.grad(differentiable, tensors, cotangents))]


@pytest.mark.gpu
@pytest.mark.parametrize("p_model", P_MODELS)
@pytest.mark.parametrize("n_iters", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": (2,), "n_inp": 300, "n_out": 20, "d_cov": 1, "d_inp": 64, "d_out": 2},
        {"batch": (2,), "n_inp": 300, "n_out": 10, "d_cov": 4, "d_inp": 4, "d_out": 4},
        {"batch": (), "n_inp": 33, "n_out": 3, "d_cov": 3, "d_inp": 5, "d_out": 2},
    ],
    ids=["text", "poses", "odd"],
)
@pytest.mark.parametrize("strategy", ON_CUDA)
def test_every_strategy_is_as_exact_as_the_literal_loop(strategy, sizes, masked, n_iters, p_model):
    tensors = as_torch(draw(own_inp=False, **sizes), torch.float32)
    if masked:
        tensors[0][..., ::3] = -INF
    options = {"n_out": sizes["n_out"], "n_iters": n_iters, "p_model": p_model}
    exact = values_and_gradients([x.double() for x in tensors], "reference", "cpu", **options)
    literal = values_and_gradients(tensors, "reference", DEVICE, **options)
    actual = values_and_gradients(tensors, strategy, DEVICE, **options)
    literal_errors = [relative(x, e) for x, e in zip(literal, exact, strict=True)]
    unit = torch.finfo(torch.float32).eps
    for name, a, e, literal_error in zip((*OUTPUTS, *NAMES), actual, exact, literal_errors, strict=True):
        assert a.dtype == torch.float32
        # As in ops/test_strategies.py: twice the literal loop's error, with room for one that is small by chance.
        limit = 2 * (literal_error + max(literal_errors) / 10 + 10 * unit)
        assert relative(a, e) <= limit, f"{name}: {relative(a, e):.1e} > {limit:.1e}"
    if masked:
        assert not actual[len(OUTPUTS)][..., ::3].any()  # the gradient of a_inp


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Directory of a tiny BERT."""
    folder = str(tmp_path_factory.mktemp("bert"))
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config("bert")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fields = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **fields)


def away_from_zero(model):
    """Add noise to the head: all scores are 0 where betas are, and most gradients too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def make_text_model(backbone, **fields):
    torch.manual_seed(0)
    return away_from_zero(CapsuleHeadForSequenceClassification.from_backbone(backbone, **{**HEAD, **fields}))


def make_model(kind):
    """Build a tiny model of that kind, and the inputs of its training examples."""
    torch.manual_seed(0)
    if kind == "text":
        model = CapsuleHeadForSequenceClassification.from_backbone(tiny_config("bert"), **HEAD)
        inputs = {"input_ids": torch.randint(3, 100, (N_EXAMPLES, N_TOKENS))}
        inputs["attention_mask"] = (torch.arange(N_TOKENS) < torch.arange(N_EXAMPLES)[:, None] % 6 + 3).long()
    elif kind == "image":
        config = tiny_config("vit")
        model = CapsuleHeadForImageClassification.from_backbone(config, **HEAD)
        inputs = {"pixel_values": torch.randn(N_EXAMPLES, 3, config.image_size, config.image_size)}
    elif kind == "stereo pair":
        fields = {"head_type": "spatial_pose", "freeze_backbone": False, "num_labels": N_LABELS}
        model = CapsuleHeadForImageClassification.from_backbone(StereoConvConfig(hidden_sizes=[8] * 6), **fields)
        inputs = {"pixel_values": torch.rand(N_EXAMPLES, 2, 96, 96)}
    else:
        model = CapsuleHeadForAudioClassification.from_backbone(tiny_config("wav2vec2"), **HEAD)
        inputs = {"input_values": torch.randn(N_EXAMPLES, 2000)}
    return away_from_zero(model), inputs


class Losses(TrainerCallback):
    """The loss of each step."""

    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []


def train(model, data, folder, collator=None, **fields):
    """Train on the device, and check that the loss falls and weights are finite."""
    losses = Losses()
    arguments = CapsuleTrainingArguments(
        str(folder),
        recipe="paper",
        use_cpu=DEVICE == "cpu",
        max_steps=60,
        per_device_train_batch_size=N_EXAMPLES,
        train_sampling_strategy="sequential",
        learning_rate=0.2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        **fields,
    )
    CapsuleTrainer(model, arguments, data_collator=collator, train_dataset=data, callbacks=[losses]).train()
    assert len(losses.losses) == 60
    assert losses.losses[-1] < 0.8 * losses.losses[0]
    for parameter in model.parameters():
        assert parameter.device.type == DEVICE and parameter.isfinite().all()


def examples(inputs):
    """One dictionary for each example, as a data loader takes them, with labels to learn by heart."""
    rows = zip(*inputs.values())
    return [{**dict(zip(inputs, row)), "labels": n % N_LABELS} for n, row in enumerate(rows)]


def logits_of(model, inputs):
    """Compute logits where the model is, and return them on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return model.eval()(**{name: x.to(device) for name, x in inputs.items()}).logits.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["text", "image", "stereo pair", "audio"])
def test_training(kind, bf16, tmp_path):
    model, inputs = make_model(kind)
    train(model, examples(inputs), tmp_path, bf16=bf16)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["text", "image", "stereo pair", "audio"])
def test_a_loss_and_its_gradients_are_those_on_the_cpu(kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions keep ten bits otherwise
    model, inputs = make_model(kind)
    batch = {**inputs, "labels": torch.arange(N_EXAMPLES) % N_LABELS}
    results = []
    for device in ("cpu", DEVICE):
        on_device = copy.deepcopy(model).eval().to(device)  # no dropout, and no statistics of batches
        loss = on_device(**{name: x.to(device) for name, x in batch.items()}).loss
        loss.backward()
        gradients = {name: x.grad.cpu() for name, x in on_device.named_parameters() if x.grad is not None}
        results.append({"loss": loss.detach().cpu(), **gradients})
    on_cpu, on_device = results
    assert len(on_cpu) > 5 and on_cpu.keys() == on_device.keys()
    for name, expected in on_cpu.items():
        assert relative(on_device[name], expected) < 1e-3, name


@pytest.fixture
def texts(tokenizer):
    """Tokenized texts of different lengths, with labels to learn by heart."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(4, len(WORDS), (3 + n % 5,), generator=generator) for n in range(N_EXAMPLES)]
    rows = [tokenizer(" ".join(WORDS[i] for i in ids)) for ids in drawn]
    names = ("input_ids", "attention_mask")
    columns = {name: [row[name] for row in rows] for name in names}
    return Dataset.from_dict({**columns, "labels": [n % N_LABELS for n in range(N_EXAMPLES)]})


@pytest.mark.gpu
def test_hidden_states_are_cached_and_trained_from(bert, tokenizer, texts, tmp_path):
    caches = []
    for device in ("cpu", DEVICE):
        model = make_text_model(bert).to(device)
        caches.append(HiddenStateCache(texts, model, tokenizer, cache_dir=tmp_path / device))
    for n in range(N_EXAMPLES):  # kept in half precision: half of its last digit, and one more where rounding differs
        on_cpu, on_device = (torch.tensor(cache[n]["hidden_states"]).float() for cache in caches)
        torch.testing.assert_close(on_device, on_cpu, rtol=2e-3, atol=2e-3)
    train(model, caches[-1], tmp_path / "run", CapsuleCollator(tokenizer))


@pytest.mark.gpu
@pytest.mark.parametrize("through_backbone", [False, True])
def test_explanations_are_those_on_the_cpu(bert, tokenizer, through_backbone):
    model = make_text_model(bert).eval()
    given = ["the film was good", "a plot", "not bad not dull is the film"]
    on_cpu = explain(model, given, tokenizer, through_backbone=through_backbone)
    on_device = explain(model.to(DEVICE), given, tokenizer, through_backbone=through_backbone)
    for found, expected in zip(on_device, on_cpu, strict=True):
        assert found.tokens == expected.tokens
        for name in ("logits", "probabilities", "parts", "baseline"):
            actual = getattr(found, name).cpu()
            torch.testing.assert_close(actual, getattr(expected, name), rtol=1e-4, atol=1e-4)
        actual = found.by_token_and_layer().cpu()
        torch.testing.assert_close(actual, expected.by_token_and_layer(), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("head_only", [True, False])
def test_what_is_saved_on_the_device_is_loaded_on_the_cpu_and_back(bert, head_only, tmp_path):
    _, inputs = make_model("text")
    model = make_text_model(bert).to(DEVICE)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path, head_only=head_only)
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path)
    assert {x.device.type for x in loaded.parameters()} == {"cpu"}
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.cpu()), name
    torch.testing.assert_close(logits_of(loaded, inputs), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(loaded.to(DEVICE), inputs), expected)


@pytest.mark.gpu
def test_adapters_of_peft(bert, tmp_path):
    _, inputs = make_model("text")
    options = {"target_modules": ["query", "value"], "modules_to_save": ["head"]}
    torch.manual_seed(0)
    model = get_peft_model(make_text_model(bert), LoraConfig(r=4, **options))
    train(model, examples(inputs), tmp_path / "run")
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_text_model(bert), tmp_path / "adapter").to(DEVICE)
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_run_under_ddp_is_the_same_run(bert, tmp_path):
    """One process by itself, and one that is the only one of its group."""
    run_program(Path(__file__).with_name("gpu_ddp_run.py"), DEVICE, bert, tmp_path)
    alone, of_group = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "ddp"))
    assert (alone["wrapper"], of_group["wrapper"]) == (
        "CapsuleHeadForSequenceClassification",
        "DistributedDataParallel",
    )
    assert of_group["backend"] == "nccl" and of_group["device"] == DEVICE
    assert of_group["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert of_group["losses"][-1] < of_group["losses"][0]


@pytest.mark.gpu
def test_a_compiled_model_is_the_same_model(bert):
    model = make_text_model(bert).to(DEVICE).eval()
    compiled = torch.compile(model)
    for n_tokens in (N_TOKENS, 5, 7):
        _, inputs = make_model("text")
        batch = {name: x[:, :n_tokens].to(DEVICE) for name, x in inputs.items()}
        labels = torch.arange(N_EXAMPLES, device=DEVICE) % N_LABELS
        results = []
        for run in (model, compiled):
            outputs = run(**batch, labels=labels)
            parameters = [x for x in model.parameters() if x.requires_grad]
            results.append([outputs.logits, *torch.autograd.grad(outputs.loss, parameters)])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
