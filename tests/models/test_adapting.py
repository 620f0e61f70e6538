"""A backbone that is adapted as the head trains: LoRA, gradient checkpointing; and one that is quantised."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.data import HiddenStateCache

LABELS = torch.tensor([0, 2, 1])


def load(directory, **kwargs):
    return CapsuleHeadForSequenceClassification.from_pretrained(directory, **kwargs)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


# LoRA


def adapt(model, **options):
    torch.manual_seed(0)
    options = {"target_modules": ["query", "value"], "modules_to_save": ["head"], **options}
    return get_peft_model(model, LoraConfig(r=4, **options))


def train(model, inputs, n_steps=5):
    optimizer = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], lr=0.05)
    model.train()
    losses = []
    for _ in range(n_steps):
        loss = model(**inputs, labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture
def trained(make_model, pad):
    """A PEFT model whose adapters and head were trained; what it scores; and the base it was made from, made again."""

    def make(freeze_backbone=True, **options):
        def base():
            return make_model(freeze_backbone=freeze_backbone, mixup_alpha=0.0)

        model = adapt(base(), **options)
        losses = train(model, pad())
        assert losses[-1] < losses[0]
        return model, model(**pad()).logits, base

    return make


@pytest.mark.parametrize("freeze_backbone", [True, False])
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_adapters_and_head_train_and_nothing_else(make_model, pad, freeze_backbone, task_type):
    model = adapt(make_model(freeze_backbone=freeze_backbone, mixup_alpha=0.0), task_type=task_type)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    train(model, pad())
    for name, x in model.named_parameters():
        should_train = "lora_" in name or "head.modules_to_save" in name
        assert x.requires_grad == should_train, name
        assert torch.equal(x, before[name]) != should_train, name


def test_adapters_train_with_the_backbones_dropout_as_peft_has_it(make_model):
    model = adapt(make_model(), lora_dropout=0.5)
    assert model.train().base_model.model.backbone.training
    assert not model.eval().base_model.model.backbone.training


@pytest.mark.parametrize("freeze_backbone", [True, False])
def test_adapter_and_head_are_saved_and_loaded_on_a_fresh_base(trained, pad, tmp_path, freeze_backbone):
    model, expected, base = trained(freeze_backbone)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20_000
    fresh = base()
    assert not torch.allclose(fresh(**pad()).logits, expected, atol=1e-2)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(**pad()).logits, expected)
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert torch.equal(again(**pad()).logits, expected)
    train(again, pad())
    changed = [not torch.equal(x, y) for x, y in zip(again.parameters(), loaded.parameters()) if x.requires_grad]
    assert len(changed) > 10 and all(changed)


@pytest.mark.parametrize("freeze_backbone", [True, False])
@pytest.mark.parametrize("loaded_first", [True, False])
def test_a_merged_model_is_saved_whole(trained, pad, tmp_path, freeze_backbone, loaded_first):
    model, expected, base = trained(freeze_backbone)
    if loaded_first:  # no step and no pass is made between loading and merging
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match="head_only=True would lose the backbone"):
        merged.save_pretrained(tmp_path / "head", head_only=True)
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert not loaded.config.head_only
    assert torch.equal(loaded(**pad()).logits, merged(**pad()).logits)
    torch.testing.assert_close(loaded(**pad()).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_unloaded_model_is_a_head_again(trained, pad, tmp_path):
    model, *_ = trained()
    base_model = model.unload()  # the adapters are thrown away; the head was trained
    base_model.save_pretrained(tmp_path)
    assert load(tmp_path).config.head_only
    assert torch.equal(load(tmp_path)(**pad()).logits, base_model(**pad()).logits)
    assert not base_model.train().backbone.training


def test_a_model_with_adapters_is_not_saved_without_them(trained, tmp_path):
    model, *_ = trained()
    with pytest.raises(ValueError, match=r"has adapters of PEFT in it.*save the PeftModel.*merge_and_unload\(\) first"):
        model.base_model.model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_changed_by_hand_are_saved(make_model, pad, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.backbone.encoder.layer[1].output.dense.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(**pad()).logits, model(**pad()).logits)


def test_states_that_adapters_change_are_not_cached(make_model, tokenizer, tmp_path):
    dataset = Dataset.from_dict({"input_ids": [[1, 5, 2]], "attention_mask": [[1, 1, 1]]})
    with pytest.raises(ValueError, match="The backbone is not frozen: its hidden states change in training"):
        HiddenStateCache(dataset, adapt(make_model()), tokenizer, cache_dir=tmp_path)


# Gradient checkpointing


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # the name that all 5.x releases know
@pytest.mark.parametrize("how", ["whole", "adapters"])
def test_gradients_with_checkpointing_are_those_without(make_model, pad, how):
    def gradients(checkpointing):
        model = make_model(freeze_backbone=how == "adapters", mixup_alpha=0.0)
        if how == "adapters":
            model = adapt(model)
            for name, x in model.named_parameters():  # a LoRA starts from zero: all but one matrix would have none
                if "lora_B" in name:
                    torch.nn.init.normal_(x, generator=torch.Generator().manual_seed(0))
        without_dropout(model)
        calls = []
        layer = model.get_submodule("base_model.model.backbone" if how == "adapters" else "backbone").encoder.layer[1]
        layer.attention.register_forward_hook(lambda *_: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(**pad(), labels=LABELS).loss.backward()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}, len(calls)

    (found, n_with), (expected, n_without) = gradients(True), gradients(False)
    assert (n_with, n_without) == (2, 1)  # each layer is computed again
    assert any("backbone" in name for name in expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# A quantised backbone. Real quantisers need packages, and most of them a CUDA device: this one needs neither.


@register_quantization_config("rounding")
class RoundingConfig(QuantizationConfigMixin):
    def __init__(self, steps=8, **kwargs):
        self.quant_method, self.steps = "rounding", steps

    def to_dict(self):
        return {"quant_method": self.quant_method, "steps": self.steps}


@register_quantizer("rounding")
class RoundingQuantizer(HfQuantizer):
    """Rounds the weights of all linear layers of a model to some steps, once they are loaded."""

    requires_calibration = False

    def _process_model_after_weight_loading(self, model, **kwargs):
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_((module.weight * self.quantization_config.steps).round())
        return model

    def is_serializable(self, **kwargs):
        return True

    @property
    def is_trainable(self):
        return False


def is_rounded(module):
    weights = [x.weight for x in module.modules() if isinstance(x, torch.nn.Linear)]
    return len(weights) > 0 and all(torch.equal(x, x.round()) for x in weights)


def test_the_backbone_alone_is_quantised_also_when_it_is_loaded_again(make_model, pad, tmp_path):
    plain, model = make_model(), make_model(quantization_config=RoundingConfig())
    assert is_rounded(model.backbone) and not is_rounded(model.head) and not is_rounded(plain.backbone)
    assert not torch.allclose(model(**pad()).logits, plain(**pad()).logits, atol=1e-3)
    train(model, pad())  # the head
    model.save_pretrained(tmp_path / "head")
    loaded = load(tmp_path / "head")
    assert is_rounded(loaded.backbone) and not is_rounded(loaded.head)
    assert torch.equal(loaded(**pad()).logits, model(**pad()).logits)
    loaded.save_pretrained(tmp_path / "again")
    load(tmp_path / "again", load_backbone=False).save_pretrained(tmp_path / "without")
    assert torch.equal(load(tmp_path / "without")(**pad()).logits, model(**pad()).logits)


def test_a_backbone_is_quantised_or_not_as_it_is_loaded(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "plain")
    quantised = load(tmp_path / "plain", quantization_config=RoundingConfig())
    assert is_rounded(quantised.backbone) and not is_rounded(quantised.head)
    quantised.save_pretrained(tmp_path / "quantised")
    assert not is_rounded(load(tmp_path / "quantised", quantization_config=None).backbone)


def test_adapters_in_a_quantised_backbone(make_model, pad, tmp_path):
    def base():
        return make_model(quantization_config=RoundingConfig(), mixup_alpha=0.0)

    model = adapt(base())
    losses = train(model, pad())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(**pad()).logits, model(**pad()).logits)


def test_what_is_refused_of_a_quantised_backbone(make_model, tmp_path):
    with pytest.raises(ValueError, match="A quantised backbone cannot be trained: leave it frozen"):
        make_model(quantization_config=RoundingConfig(), freeze_backbone=False)
    model = make_model(quantization_config=RoundingConfig())
    with pytest.raises(ValueError, match="weights of a quantised backbone are not saved; save the head alone"):
        model.save_pretrained(tmp_path, head_only=False)
    make_model().save_pretrained(tmp_path / "whole", head_only=False)
    with pytest.raises(
        ValueError, match=r"quantization_config is for a backbone, and .* has the weights of backbone and head"
    ):
        load(tmp_path / "whole", quantization_config=RoundingConfig())
