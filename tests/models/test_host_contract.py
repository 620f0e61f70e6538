"""What transformers' own tests of models and configurations demand, on tiny backbones; see
docs/reference/contract.md."""

import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys

import joblib
import pytest
import torch
from configurations import make_config
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.utils import logging

from capsule_heads import (
    CapsuleHeadConfig,
    CapsuleHeadForAudioClassification,
    CapsuleHeadForImageClassification,
    CapsuleHeadForSequenceClassification,
    CapsuleHeadModel,
)
from capsule_heads.backbones import Backbone
from capsule_heads.backbones.probe import selects

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_conv_pos_embedding_groups": 2}
GROUPED = {"vocab_size": 64, **SIZES, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
CONFIGS = {
    "bert": {"vocab_size": 64, **SIZES, "pad_token_id": 0},
    "gpt2": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "pad_token_id": 0},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, **EXPERTS},
    "vit": {**SIZES, "image_size": 32, "patch_size": 8},
    "wav2vec2": {**SIZES, **CONVOLUTIONS, "num_conv_pos_embeddings": 4, "feat_extract_norm": "layer"},
}
TEXT = {"input_ids": torch.arange(3, 13).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
INPUTS = {
    "vit": {"pixel_values": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
    "wav2vec2": {"input_values": torch.randn(2, 200, generator=torch.Generator().manual_seed(0))},
}
CLASSES = {"vit": CapsuleHeadForImageClassification, "wav2vec2": CapsuleHeadForAudioClassification}


def base_config(model_type, **changes):
    return AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})


@pytest.fixture(params=CONFIGS)
def model_type(request):
    return request.param


@pytest.fixture
def build(shake):
    """build(model_type, cls, attention, **fields): a model, none of whose parameters is zero, and inputs."""

    def make(model_type="bert", cls=None, attention="eager", **fields):
        torch.manual_seed(0)
        cls = cls or CLASSES.get(model_type, CapsuleHeadForSequenceClassification)
        base = base_config(model_type, attn_implementation=attention)
        fields = {"d_inp": 8, "n_parts": 6, **({} if cls is CapsuleHeadModel else {"num_labels": 3}), **fields}
        model = cls(CapsuleHeadConfig(base, **fields)).eval()
        shake(model.head)
        return model, INPUTS.get(model_type, TEXT)

    return make


# test_attention_outputs


def test_attention_outputs(build, model_type):
    model, inputs = build(model_type)
    own = model.backbone(**inputs, output_attentions=True).attentions
    assert len(own) == 2 and own[0].shape[1] == 2
    with torch.no_grad():
        outputs = model(**inputs, labels=torch.tensor([0, 1]), output_attentions=True, output_hidden_states=True)
        assert list(outputs.keys()) == ["loss", "logits", "hidden_states", "attentions"]
        for ours, theirs in zip(outputs.attentions, own, strict=True):
            torch.testing.assert_close(ours, theirs)
        plain = model(**inputs)
        assert list(plain.keys()) == ["logits"] and torch.equal(plain.logits, outputs.logits)
        model.config.output_attentions = True
        assert len(model(**inputs).attentions) == 2
        assert "attentions" not in model(**inputs, output_attentions=False)
        assert len(model(**inputs, return_dict=False)) == 2


def test_attention_outputs_of_part_capsules(build):
    model, inputs = build(cls=CapsuleHeadModel)
    assert list(model(**inputs, output_attentions=True, output_hidden_states=True).keys())[3:] == [
        "hidden_states",
        "attentions",
    ]


def test_attention_outputs_of_an_encoder_decoder(shake):
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
    for stack in ("encoder", "decoder"):
        base = AutoConfig.for_model("t5", **sizes, decoder_start_token_id=0, attn_implementation="eager")
        model = CapsuleHeadForSequenceClassification(CapsuleHeadConfig(base, stack=stack)).eval()
        attentions = model(**TEXT, output_attentions=True).attentions
        assert len(attentions) == 2
        is_causal = bool((attentions[0].triu(1) == 0).all())
        assert is_causal == (stack == "decoder")


def test_attention_that_gives_none_does_as_in_transformers(build, caplog, monkeypatch):
    model, inputs = build(attention="sdpa")
    native = AutoModelForSequenceClassification.from_config(base_config("bert", attn_implementation="sdpa"))
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)  # for caplog
    assert (
        model(**inputs, output_attentions=True).attentions == native(**inputs, output_attentions=True).attentions == ()
    )


def test_no_attentions_is_one_sentence(build):
    mamba = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = CapsuleHeadForSequenceClassification(CapsuleHeadConfig(mamba))
    with pytest.raises(ValueError, match="and the mamba backbone has no attentions; leave output_attentions out"):
        model(**TEXT, output_attentions=True)
    model, inputs = build()
    with pytest.raises(ValueError, match="output_attentions is True, and hidden_states are given"):
        model(hidden_states=model(**inputs, output_hidden_states=True).hidden_states, output_attentions=True)
    model, inputs = build(window_length=4)
    with pytest.raises(ValueError, match="output_attentions is True, and texts are longer than window_length"):
        model(**inputs, output_attentions=True)
    assert len(model(input_ids=inputs["input_ids"][:, :4], output_attentions=True).attentions) == 2


def test_requests_of_none_are_accepted(build, model_type):
    model, inputs = build(model_type)
    outputs = model(**inputs, output_attentions=None, output_hidden_states=None, return_dict=None)
    assert list(outputs.keys()) == ["logits"]


# test_hidden_states_output, test_can_capture_specific_layers_hidden_states


def test_hidden_states_output(build, model_type):
    model, inputs = build(model_type)
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 3 and all(x.shape[-1] == 16 for x in states)
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == 3


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [2], [0, 1]])
@pytest.mark.parametrize("asked", [[0, 2, -1], [0], [1], [-3], 1, (0, 1, 2)])
def test_can_capture_specific_layers_hidden_states(build, layers, asked):
    everything = build()[0](**TEXT, output_hidden_states=True).hidden_states
    model, inputs = build(layers=layers)
    indices = {index % 3 for index in ([asked] if isinstance(asked, int) else asked)}
    outputs = model(**inputs, output_hidden_states=asked)
    assert torch.equal(outputs.logits, model(**inputs).logits)
    for layer, (state, expected) in enumerate(zip(outputs.hidden_states, everything, strict=True)):
        assert state is None if layer not in indices else torch.equal(state, expected)


def test_true_gives_the_layers_in_use_and_what_is_false_none(build):
    model, inputs = build(layers=[0, 2])
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 2
    for nothing in (False, 0, []):
        assert "hidden_states" not in model(**inputs, output_hidden_states=nothing)
    model.config.output_hidden_states = [1]
    assert [x is None for x in model(**inputs).hidden_states] == [True, False, True]


def test_hidden_states_that_cannot_be_returned_are_one_sentence(build):
    model, inputs = build(layers=[0, 2])
    with pytest.raises(
        ValueError, match=r"output_hidden_states is \[3\]; the backbone has 3 hidden states, so expecte"
    ):
        model(**inputs, output_hidden_states=[3])
    for wrong in ("all", [True], [0.5]):
        with pytest.raises(TypeError, match="expected True, False, or indices of hidden states"):
            model(**inputs, output_hidden_states=wrong)
    given = model(**inputs, output_hidden_states=True).hidden_states
    assert [x is None for x in model(hidden_states=given, output_hidden_states=[2]).hidden_states] == [
        True,
        True,
        False,
    ]
    with pytest.raises(ValueError, match=r"asks for layers \[1\], and the hidden_states that are given are of layers"):
        model(hidden_states=given, output_hidden_states=[1])


# Right shapes with wrong layers are impossible


def forward_of(meaning):
    """Return a forward of BERT to which a list means something else than in transformers from 5.23 on."""

    def make(forward):
        @functools.wraps(forward)  # a backbone's inputs are known by its signature
        def patched(self, *args, output_hidden_states=None, **kwargs):
            if not isinstance(output_hidden_states, list):
                return forward(self, *args, output_hidden_states=output_hidden_states, **kwargs)
            outputs = forward(self, *args, output_hidden_states=True, **kwargs)
            outputs["hidden_states"] = meaning(outputs.hidden_states, output_hidden_states)
            return outputs

        return patched

    return make


MEANINGS = {
    "layers without the embedding output": lambda states, asked: tuple(states[(i + 1) % 3] for i in asked),
    "the same, in place": lambda states, asked: tuple(states[(i + 1) % 3] if i in asked else None for i in range(3)),
    "nothing": lambda states, asked: states,
    "the last ones": lambda states, asked: states[-len(asked) :],
}


@torch.no_grad()
@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("layers", [[0], [0, 1], [1], [2]])
def test_a_list_that_means_other_layers_is_not_used(build, monkeypatch, meaning, layers):
    expected = build()[0].compute_hidden_states(**TEXT)[0]
    model, inputs = build(layers=layers)
    cls = type(model.backbone)
    monkeypatch.setattr(cls, "forward", forward_of(MEANINGS[meaning])(cls.forward))
    for state, layer in zip(model.compute_hidden_states(**inputs)[0], layers, strict=True):
        assert torch.equal(state, expected[layer])


def test_layers_are_selected_where_a_trial_shows_that_they_are_right(build, monkeypatch):
    model, inputs = build(layers=[0, 1], freeze_backbone=False)
    asked, cls = [], type(model.backbone)
    forward = cls.forward

    @functools.wraps(forward)
    def recorded(self, *args, **kwargs):
        asked.append((kwargs["output_hidden_states"], self.training))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", recorded)
    model.train()
    model.backbone.encoder.eval()  # a mode of its own, which a trial must not lose
    state = torch.random.get_rng_state()
    assert selects(model.backbone, "encoder", [0, 1], [16] * 3)
    assert torch.equal(state, torch.random.get_rng_state())  # a resumed run draws what an unbroken one does
    assert model.backbone.training and not model.backbone.encoder.training
    assert asked == [(True, False), ([0, 1], False)]
    for _ in range(2):
        model(**inputs)
    assert asked[2:] == [([0, 1], True)] * 2  # one trial, and no more


def test_states_that_a_trial_cannot_tell_apart_are_not_selected(build):
    model, inputs = build(layers=[0, 1])
    with torch.no_grad():
        for parameter in model.backbone.encoder.parameters():
            parameter.zero_()
    assert not selects(model.backbone, "encoder", [1], [16] * 3)
    assert model(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_nothing_is_tried_while_a_program_is_traced(build):
    model, inputs = build(layers=[0, 1])
    program = torch.export.export(model, (), inputs)
    assert not hasattr(model.backbone, "_tried_selections")
    logits = model(**inputs).logits
    assert model.backbone._tried_selections == {(0, 1): True}
    torch.testing.assert_close(program.module()(**inputs).logits, logits)
    torch.testing.assert_close(torch.export.export(model, (), inputs).module()(**inputs).logits, logits)


# test_load_with_mismatched_shapes, test_can_load_ignoring_mismatched_shapes


def test_load_with_mismatched_shapes(build, tmp_path):
    model, inputs = build()
    model.save_pretrained(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"of shape \(6, 3, 1, 2\), where the configuration makes it \(6, 42, 1, 2\)"
    ):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=42)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=42, ignore_mismatched_sizes=True)
    assert loaded(**inputs).logits.shape == (2, 42)
    config = copy.deepcopy(model.config)
    config.get_text_config().vocab_size = 20
    name = "backbone.embeddings.word_embeddings.weight"
    with pytest.raises(RuntimeError, match=rf"{name} of shape \(64, 16\), where the configuration makes it \(20, 16\)"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, config=config)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    for key, parameter in loaded.named_parameters():
        assert parameter.isfinite().all() and (key == name or torch.equal(parameter, model.get_parameter(key)))
    assert AutoModel.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)(**inputs).scores is not None


# test_model_main_input_name


@pytest.mark.parametrize(
    "cls",
    [
        CapsuleHeadForAudioClassification,
        CapsuleHeadForImageClassification,
        CapsuleHeadForSequenceClassification,
        CapsuleHeadModel,
    ],
)
def test_model_main_input_name(cls):
    assert cls.main_input_name == list(inspect.signature(cls.forward).parameters)[1]


def test_main_input_name_follows_the_backbone(build, model_type):
    for model, inputs in (build(model_type), build(model_type, cls=CapsuleHeadModel)):
        assert model.main_input_name == next(iter(inputs))
        assert inputs[model.main_input_name].shape[0] == len(model(**inputs)[0])


def test_main_input_name_of_spectra():
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8}
    base = AutoConfig.for_model("whisper", **sizes, decoder_layers=1, max_source_positions=20, pad_token_id=0)
    base.decoder_attention_heads, base.vocab_size = 2, 64
    assert CapsuleHeadForAudioClassification(CapsuleHeadConfig(base)).main_input_name == "input_features"


# ConfigTester


def test_config_can_be_init_without_params(tmp_path, caplog):
    config = CapsuleHeadConfig()
    assert caplog.text == "" and config.base_config is None
    for made in (AutoConfig.for_model("capsule_head"), CapsuleHeadConfig.from_dict(config.to_dict())):
        assert made.to_dict() == config.to_dict()
    assert '"base_config": null' in repr(config) and config.to_diff_dict()["model_type"] == "capsule_head"
    config.save_pretrained(tmp_path / "sub")
    assert CapsuleHeadConfig.from_pretrained(tmp_path, subfolder="sub").to_diff_dict() == config.to_diff_dict()
    assert AutoConfig.from_pretrained(tmp_path / "sub").to_diff_dict() == config.to_diff_dict()
    assert copy.deepcopy(config).get_text_config() is not None
    config.to_json_file(tmp_path / "config.json")
    assert CapsuleHeadConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    config.num_labels = 5
    assert len(config.id2label) == len(config.label2id) == 5


def test_no_model_is_built_of_a_configuration_without_a_backbone(tmp_path):
    message = "base_config is None; expected the backbone's configuration, an object such as"
    CapsuleHeadConfig().save_pretrained(tmp_path)
    for cls in (CapsuleHeadModel, CapsuleHeadForSequenceClassification):
        for config in (CapsuleHeadConfig(), CapsuleHeadConfig(hidden_sizes=[16] * 3)):
            with pytest.raises(ValueError, match=message):
                cls(config)
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(tmp_path)


# A bare configuration


@pytest.mark.parametrize("layers", [None, [-1, 0]])
def test_a_bare_configuration_gets_hidden_sizes_where_a_model_is_built(model_type, layers, tmp_path):
    config = CapsuleHeadConfig(base_config(model_type), layers=layers)
    assert (config.hidden_sizes, config.layers) == (None, layers)
    config.save_pretrained(tmp_path)
    config = CapsuleHeadConfig.from_pretrained(tmp_path)
    assert (config.hidden_sizes, config.layers) == (None, layers)
    model = CLASSES.get(model_type, CapsuleHeadForSequenceClassification)(config)
    assert (config.hidden_sizes, config.layers) == ([16] * 3, [0, 2] if layers else [0, 1, 2])
    inputs = INPUTS.get(model_type, TEXT)
    assert model(**inputs).logits.shape == (2, 2)
    assert type(model).from_backbone(base_config(model_type)).config.hidden_sizes == [16] * 3
    with pytest.raises(ValueError, match=r"layers is \[3\]; the backbone has 3 hidden states"):
        type(model)(CapsuleHeadConfig(base_config(model_type), layers=[3]))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "jamba", "granitemoe"])
def test_mixtures_of_experts_are_probed_without_weights(kind):
    base = AutoConfig.for_model(kind, **{**GROUPED, **EXPERTS, "num_local_experts": 4})
    implementation = base._experts_implementation
    assert Backbone(base).probe().hidden_sizes == (16,) * 3
    assert base._experts_implementation == implementation
    assert make_config(base).hidden_sizes == [16] * 3


# Pickling


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def dumped_by_joblib(model):
    file = io.BytesIO()
    joblib.dump(model, file)
    return joblib.load(io.BytesIO(file.getvalue()))


def own_hook(module, args, output):
    """A user's own hook, which changes nothing."""


def hooks_of(model):
    return {name: list(module._forward_hooks.values()) for name, module in model.named_modules()}


@torch.no_grad()
@pytest.mark.parametrize("copying", [pickled, saved_by_torch, dumped_by_joblib, copy.deepcopy])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "mixtral", "vit"])
def test_a_model_that_has_run_is_pickled(build, copying, kind):
    model, inputs = build(kind, layers=[0, 1])
    model.head.register_forward_hook(own_hook)  # one of the user's own stays
    expected = model(**inputs, output_hidden_states=[2])
    before = hooks_of(model)
    copied = copying(model)
    assert hooks_of(model) == before and not hasattr(copied.backbone, "_tried_selections")
    assert sum(map(len, hooks_of(copied).values())) == 1
    for _ in range(2):
        outputs = copied(**inputs, output_hidden_states=[2])
        assert torch.equal(outputs.logits, expected.logits)
        assert torch.equal(outputs.hidden_states[2], expected.hidden_states[2])
    assert torch.equal(model(**inputs).logits, expected.logits)
    assert not any(x.data_ptr() == y.data_ptr() for x, y in zip(model.parameters(), copied.parameters()))


def test_layers_that_are_one_module_stay_one(build, shake):
    base = AutoConfig.for_model("albert", **CONFIGS["bert"], embedding_size=8)
    model = CapsuleHeadForSequenceClassification(CapsuleHeadConfig(base)).eval()
    shake(model.head)
    logits = model(**TEXT).logits
    copied = pickled(model)
    assert torch.equal(copied(**TEXT).logits, logits)
    assert len(list(copied.modules())) == len(list(model.modules()))


@torch.no_grad()
@pytest.mark.parametrize("part", ["model", "backbone"])
def test_a_model_with_adapters_is_pickled(build, part, shake):
    model, inputs = build("bert")
    lora = LoraConfig(r=2, target_modules=["query"])
    if part == "model":
        model = get_peft_model(model, lora).eval()
    else:
        inject_adapter_in_model(lora, model.backbone)
        model.eval()
    shake(model, scale=0.1)
    logits = model(**inputs).logits
    for copying in (pickled, saved_by_torch, copy.deepcopy):
        assert torch.equal(copying(model)(**inputs).logits, logits)


OTHER_PROCESS = """
import sys, torch
model, inputs, logits = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(**inputs).logits, logits)
"""


@torch.no_grad()
def test_a_pickled_model_runs_in_a_process_that_built_none(build, tmp_path):
    model, inputs = build("bert", layers=[0, 2])
    torch.save((model, inputs, model(**inputs).logits), tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, tmp_path / "model.pt"], check=True)
