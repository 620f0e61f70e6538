"""The text model: its interface, its outputs, its place among transformers' habits, Trainer and the auto classes."""

import copy
import inspect
import logging
import weakref

import pytest
import torch
import transformers
from configurations import make_config
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments, pipeline

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleHeadModel

LABELS = torch.tensor([0, 1, 2])


@pytest.fixture
def warnings_of_transformers(caplog):
    """Lets pytest see what transformers logs, which it does not propagate by default; returns the messages."""
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


# The interface


def test_forward_names_every_argument():
    names = list(inspect.signature(CapsuleHeadForSequenceClassification.forward).parameters)
    assert names[:2] == ["self", "input_ids"] and "labels" in names
    for cls in (CapsuleHeadForSequenceClassification, CapsuleHeadModel):
        assert cls.main_input_name == "input_ids"
        assert cls.accepts_loss_kwargs is False


def test_outputs_on_request(make_model, pad):
    model = make_model()
    outputs = model(**pad())
    assert list(outputs.keys()) == ["logits"]
    assert list(model(**pad(), labels=LABELS).keys()) == ["loss", "logits"]
    outputs = model(**pad(), output_hidden_states=True, output_capsules=True, output_routing=True)
    assert list(outputs.keys()) == ["logits", "hidden_states", "poses", "variances", "routing_probabilities"]
    assert outputs.poses.shape == outputs.variances.shape == (3, 3, 1, 2)
    assert (outputs.variances > 0).all()
    to_parts, to_classes = outputs.routing_probabilities
    assert (to_parts.shape, to_classes.shape) == ((3, 7 * 3, 6), (3, 6, 3))
    for routing in outputs.routing_probabilities:
        torch.testing.assert_close(routing.sum(-1), torch.ones(routing.shape[:-1]))
    assert torch.equal(outputs.logits, model(**pad()).logits)


def test_outputs_as_a_tuple(make_model, pad):
    model = make_model()
    loss, logits = model(**pad(), labels=LABELS, return_dict=False)
    outputs = model(**pad(), labels=LABELS)
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)
    assert len(model(**pad(), output_hidden_states=True, return_dict=False)) == 2


def test_hidden_states_by_configuration(make_model, pad):
    model = make_model(output_hidden_states=True)
    assert len(model(**pad()).hidden_states) == 3
    assert model(**pad(), output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("layers", [[0], [1, 2], [-1], [2, 0]])
def test_layers_choose_hidden_states(make_model, pad, layers):
    everything = make_model()(**pad(), output_hidden_states=True).hidden_states
    model = make_model(layers=layers)
    outputs = model(**pad(), output_hidden_states=True)
    chosen = [everything[layer] for layer in sorted(layer % 3 for layer in layers)]
    assert len(outputs.hidden_states) == len(chosen) == len(model.head.detect_parts[0].depth_emb)
    assert all(torch.equal(x, y) for x, y in zip(outputs.hidden_states, chosen))
    expected = model.head(chosen, pad()["attention_mask"].float()).a_out
    assert torch.equal(outputs.logits, expected)


def test_layers_choose_hidden_states_of_every_backbone(make_model, pad, backbone_type):
    everything = make_model(backbone_type).compute_hidden_states(**pad())[0]
    last = len(everything) - 1
    for layers in ([0], [1], [last], [0, last]):
        chosen, masks = make_model(backbone_type, layers=layers).compute_hidden_states(**pad())
        assert len(chosen) == len(masks) == len(layers)
        for layer, x in zip(layers, chosen):
            torch.testing.assert_close(x, everything[layer], rtol=0, atol=0)


@pytest.mark.parametrize("layers, kept", [([1], 1), ([0, 3], 2), (None, 5)])
def test_only_states_in_use_are_kept_while_the_backbone_runs(make_model, pad, layers, kept):
    model = make_model(changes={"num_hidden_layers": 4}, layers=layers)
    model(**pad())  # the first time, the backbone is tried
    made, alive = [], []
    model.backbone.embeddings.register_forward_hook(lambda *call: made.append(weakref.ref(call[-1])))
    for layer in model.backbone.encoder.layer:
        layer.register_forward_hook(lambda *call: made.append(weakref.ref(call[-1])))
    model.backbone.register_forward_hook(lambda *_: alive.append(sum(x() is not None for x in made)))
    model(**pad())
    model(**pad())
    assert len(made) == 10
    # Beside them, the last layer's output is what the backbone returns.
    assert alive[0] == kept + (layers is not None)


def test_hidden_states_in_the_place_of_the_backbone(make_model, pad):
    model, batch = make_model(layers=[0, 2]), pad()
    expected = model(**batch, labels=LABELS, output_hidden_states=True)
    states = torch.stack(expected.hidden_states, dim=2)
    model.backbone = None
    outputs = model(hidden_states=states, attention_mask=batch["attention_mask"], labels=LABELS)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.loss, expected.loss)
    halves = model(hidden_states=states.half(), attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(halves, expected.logits, rtol=0, atol=0.02)
    unmasked = model(hidden_states=states).logits
    assert torch.equal(unmasked, model(hidden_states=states, attention_mask=torch.ones(3, 7)).logits)


def test_wrong_inputs_are_refused(make_model, pad):
    model, batch = make_model(layers=[0, 2]), pad()
    with pytest.raises(ValueError, match=r"Pass one of input_ids, inputs_embeds \(or hidden_states"):
        model(attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match="Pass one of input_ids, inputs_embeds"):
        model(**batch, inputs_embeds=torch.zeros(3, 7, 16))
    with pytest.raises(ValueError, match=r"hidden_states has shape \(3, 7, 3, 16\); .* with 2 layers of size 16"):
        model(hidden_states=torch.zeros(3, 7, 3, 16))
    with pytest.raises(ValueError, match=r"hidden_states has shape \(3, 7, 2, 8\)"):
        model(hidden_states=torch.zeros(3, 7, 2, 8))
    with pytest.raises(ValueError, match=r"hidden_states has shape \(3, 7, 32\)"):
        model(hidden_states=torch.zeros(3, 7, 32))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 8\); expected .*, here \(3, 7\)"):
        model(hidden_states=torch.zeros(3, 7, 2, 16), attention_mask=torch.ones(3, 8))
    model.backbone = None
    with pytest.raises(ValueError, match="This model has no backbone: pass hidden_states"):
        model(**batch)


def test_a_batch_of_padding_alone_is_finite(make_model, pad):
    model, batch = make_model(mixup_alpha=0.0).train(), pad()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    outputs = model(**batch, labels=LABELS)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.head.parameters() if p.grad is not None)


# Freezing


def count_tensors_saved_in_the_backbone(model, batch):
    """How many tensors autograd keeps for a backward pass through the backbone."""
    inside, saved = [False], []
    model.backbone.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    model.backbone.register_forward_hook(lambda *_: inside.__setitem__(0, False))

    def pack(tensor):
        saved.append(inside[0])
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    assert len(saved) > 0
    return sum(saved)


def test_a_frozen_backbone_keeps_nothing_for_the_backward_pass(make_model, pad):
    assert count_tensors_saved_in_the_backbone(make_model().train(), pad()) == 0
    assert count_tensors_saved_in_the_backbone(make_model(freeze_backbone=False).train(), pad()) > 10


def test_a_frozen_backbone_passes_no_gradient_on(make_model, pad):
    embeddings = torch.randn(3, 7, 16, requires_grad=True)
    for frozen in (True, False):
        states = make_model(freeze_backbone=frozen)(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
        assert all((x.grad_fn is None) == frozen for x in states)


def test_training_mode_leaves_a_frozen_backbone_alone(make_model):
    model = make_model()
    assert not model.training
    model.train()
    assert model.training and model.head.training and not model.backbone.training
    assert not model.eval().training
    assert make_model(freeze_backbone=False).train().backbone.training


# Trainer


class Batches(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = {**batch, "labels": LABELS}

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.batch.items()}


def test_trainer_optimises_the_head_alone_and_gathers_logits_alone(make_model, pad, tmp_path):
    model = make_model(output_hidden_states=True)
    before = copy.deepcopy(model.state_dict())
    args = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=3,
        use_cpu=True,
        report_to=[],
        save_steps=2,
        learning_rate=0.1,
    )
    trainer = Trainer(model, args, train_dataset=Batches(pad()))
    assert trainer.label_names == ["labels"] and not trainer.model_accepts_loss_kwargs
    trainer.train()
    optimised = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in model.head.parameters()}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"head.{name}" for name, _ in model.head.named_parameters()}
    predictions = trainer.predict(Batches(pad())).predictions
    assert predictions.shape == (3, 3)
    # A checkpoint is a head alone, and holds what was trained.
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(loaded(**pad()).logits, model.eval()(**pad()).logits)


def test_trainer_loads_the_best_head_without_a_warning(make_model, pad, tmp_path, warnings_of_transformers):
    args = TrainingArguments(
        tmp_path, num_train_epochs=2, use_cpu=True, report_to=[], eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, learning_rate=0.1,
    )  # fmt: skip
    trainer = Trainer(make_model(), args, train_dataset=Batches(pad()), eval_dataset=Batches(pad()))
    trainer.train()
    assert not [message for message in warnings_of_transformers() if "missing" in message]
    Trainer(make_model(), args, train_dataset=Batches(pad()), eval_dataset=Batches(pad())).train(
        resume_from_checkpoint=True
    )
    assert not [message for message in warnings_of_transformers() if "missing" in message]


# The auto classes and pipelines


def test_auto_classes(make_model, pad, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is CapsuleHeadForSequenceClassification
    assert torch.equal(loaded(**pad()).logits, model(**pad()).logits)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, freeze_backbone=False, num_labels=3)
    assert not loaded.config.freeze_backbone and next(loaded.backbone.parameters()).requires_grad


@pytest.mark.parametrize("head_only", [True, False])
@pytest.mark.parametrize("fields", [{}, {"num_labels": 1}])
def test_the_headless_model_loads_a_classifiers_checkpoint(make_model, pad, tmp_path, head_only, fields):
    model, batch = make_model(**fields), pad()
    model.save_pretrained(tmp_path, head_only=head_only)
    features, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(features) is CapsuleHeadModel
    assert not info["missing_keys"] and not info["unexpected_keys"]
    outputs = features(**batch, output_routing=True, output_hidden_states=True)
    assert outputs.scores.shape == (3, 6)
    assert outputs.poses.shape == outputs.variances.shape == (3, 6, 1, 2)
    assert len(outputs.hidden_states) == 3
    expected = model(**batch, output_routing=True).routing_probabilities[0]
    assert len(outputs.routing_probabilities) == 1 and torch.equal(outputs.routing_probabilities[0], expected)
    # The classes' routing on these parts gives the classifier's own scores.
    scores, poses, _ = model.head.routings[1](outputs.scores, outputs.poses)
    if fields:
        assert torch.equal(model.regressor(poses.flatten(1)), model(**batch).logits)
    else:
        assert torch.equal(scores, model(**batch).logits)


def test_a_headless_model_from_a_backbone(make_model, pad, tmp_path):
    model = make_model(cls=CapsuleHeadModel)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**pad()).scores, model(**pad()).scores)
    assert list(model(**pad()).keys()) == ["scores", "poses", "variances"]


@torch.no_grad()
@pytest.mark.parametrize("head_only", [True, False])
def test_pipeline(make_model, tokenizer, tmp_path, warnings_of_transformers, head_only):
    model = make_model(id2label={0: "bad", 1: "mixed", 2: "good"}, label2id={"bad": 0, "mixed": 1, "good": 2})
    model.save_pretrained(tmp_path, head_only=head_only)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    texts = ["the film is good", "the plot was dull not good", "bad"]
    singles = [classify(text)[0] for text in texts]
    for text, single in zip(texts, singles):
        probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert single["label"] == model.config.id2label[int(probabilities.argmax())]
        assert single["score"] == pytest.approx(float(probabilities.max()), abs=1e-6)
    for batch_size in (1, 3):
        for single, batched in zip(singles, classify(texts, batch_size=batch_size)):
            assert batched["label"] == single["label"]
            assert batched["score"] == pytest.approx(single["score"], abs=1e-6)
    pair = classify({"text": "the film", "text_pair": "the plot"}, top_k=None)
    encoding = tokenizer("the film", "the plot", return_tensors="pt")
    assert encoding["token_type_ids"].max() == 1
    probabilities = model(**encoding).logits.softmax(-1)[0]
    expected = {label: float(probabilities[index]) for index, label in model.config.id2label.items()}
    assert {entry["label"]: entry["score"] for entry in pair} == pytest.approx(expected, abs=1e-6)
    assert warnings_of_transformers() == []


# What transformers does to any model


def test_embeddings_are_the_backbones(make_model, pad, ids, tmp_path):
    model = make_model()
    assert model.get_input_embeddings() is model.backbone.embeddings.word_embeddings
    assert model.base_model is model.backbone
    before = model(**pad()).logits
    model.resize_token_embeddings(64)
    assert model.config.head_only
    model.resize_token_embeddings(70)
    assert model.config.get_text_config().vocab_size == 70
    assert torch.equal(model(**pad()).logits, before)
    assert not model.get_input_embeddings().weight.requires_grad
    # The reference's checkpoint does not have these embeddings any more: the backbone has to be saved.
    model.save_pretrained(tmp_path)
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path)
    last = {"input_ids": torch.tensor([[69, 68]])}
    assert torch.equal(loaded(**last).logits, model(**last).logits)


def test_parameters_are_counted(make_model):
    model = make_model()
    n_head = sum(parameter.numel() for parameter in model.head.parameters())
    assert model.num_parameters(only_trainable=True) == n_head
    assert model.num_parameters() == n_head + model.backbone.num_parameters()


def test_copies_are_independent(make_model, pad):
    model = make_model()
    clone = copy.deepcopy(model)
    assert torch.equal(clone(**pad()).logits, model(**pad()).logits)
    clone.head.detect_parts[0].depth_emb.data.add_(1.0)
    assert not torch.equal(clone(**pad()).logits, model(**pad()).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # the name that all 5.x releases know
@pytest.mark.parametrize("freeze_backbone", [True, False])
def test_gradient_checkpointing(make_model, pad, freeze_backbone):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(freeze_backbone=freeze_backbone, mixup_alpha=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        model(**pad(), labels=LABELS).loss.backward()
        gradients.append(model.head.detect_parts[0].depth_emb.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casts(make_model, pad, dtype):
    model = make_model()
    expected = model(**pad()).logits
    model.to(dtype)
    outputs = model(**pad(), labels=LABELS)
    assert model.dtype == dtype
    assert outputs.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(outputs.logits.float(), expected, rtol=0, atol=1e-4 if dtype == torch.float64 else 0.3)


def test_autocast(make_model, pad):
    model = make_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**pad(), labels=LABELS)
    assert outputs.logits.dtype == torch.float32 and outputs.loss.dtype == torch.float32
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.head.parameters())


def test_attention_implementations_reach_the_backbone(make_model, pad):
    model = make_model(attn_implementation="eager")
    assert model.backbone.config._attn_implementation == "eager"
    expected = model(**pad()).logits
    model.set_attn_implementation("sdpa")
    assert model.backbone.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(**pad()).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled(make_model, pad):
    model = make_model(mixup_alpha=0.0, problem_type="single_label_classification").train()
    expected = model(**pad(), labels=LABELS)
    compiled = torch.compile(model, backend="aot_eager")
    outputs = compiled(**pad(), labels=LABELS)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.loss, expected.loss)
    outputs.loss.backward()
    assert model.head.detect_parts[0].depth_emb.grad.isfinite().all()


def test_a_configuration_can_be_built_and_run(backbone_config, pad):
    config = make_config(backbone_config("bert"), d_inp=8, n_parts=6, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config)
    assert type(model) is CapsuleHeadForSequenceClassification
    assert model(**pad()).logits.shape == (3, 3)
    for name, parameter in model.head.named_parameters():
        zeros = name.endswith(("bias", ".B", "beta_use", "beta_ign", "depth_emb"))
        assert parameter.isfinite().all() and bool((parameter == 0).all()) == zeros, name
    assert float(model.head.routings[0].W.detach().std()) == pytest.approx(1 / 8, rel=0.5)
