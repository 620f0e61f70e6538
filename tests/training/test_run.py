import math

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.data import load_data
from capsule_heads.tasks import get_task, own_task
from capsule_heads.training.run import (
    DataArguments,
    ModelArguments,
    align_special_tokens,
    build_model,
    check_backbone,
    check_cache_options,
    check_data_options,
    check_labels_match,
    check_reporting,
    describe_head,
    describe_own_data,
    evaluation_splits,
    find_task,
    windows_for,
)

REVIEWS = get_task("reviews")
SMALL = {"d_inp": 8, "n_parts": 4}


def labelled(values, names=("no", "yes")):
    feature = Value("float32") if names is None else ClassLabel(names=list(names))
    columns = {"text": ["good"] * len(values), "label": values}
    return Dataset.from_dict(columns, features=Features({"text": Value("string"), "label": feature}))


def test_build_model_for_classes(bert):
    arguments = ModelArguments(bert, layers=[0, -1], freeze_backbone=False, mixup_alpha=0.5)
    model = build_model(REVIEWS, arguments, SMALL, DatasetDict(train=labelled([0, 1], ["no", "yes"])))
    config = model.config
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.label2id == {"no": 0, "yes": 1}
    assert config.layers == [0, 2]
    assert (config.d_inp, config.n_parts, config.freeze_backbone, config.mixup_alpha) == (8, 4, False, 0.5)
    assert config.base_model_name_or_path == bert
    assert model.head.routings[1].n_out == 2


def test_build_model_for_balanced_classes(bert):
    model = build_model(
        REVIEWS, ModelArguments(bert, class_weights=["balanced"]), SMALL, DatasetDict(train=labelled([0, 1, 1]))
    )
    assert model.config.class_weights == "balanced"
    with pytest.raises(
        ValueError, match=r'class_weights is 1 balance; expected a number for each class, or "balanced"'
    ):
        ModelArguments(bert, class_weights=["1", "balance"])


def test_build_model_for_numbers(bert):
    model = build_model(REVIEWS, ModelArguments(bert), SMALL, DatasetDict(train=labelled([1.0, 2.0, 6.0], names=None)))
    assert model.config.problem_type == "regression"
    assert model.config.label_mean == pytest.approx(3.0)
    assert model.config.label_std == pytest.approx(math.sqrt(14 / 3))


def test_every_option_of_the_model_reaches_it(bert):
    options = {
        "layers": [1],
        "head_type": "linear",
        "mixup_alpha": 0.3,
        "class_weights": [1.0, 3.0],
        "freeze_backbone": False,
    }
    arguments = ModelArguments(bert, **options)
    assert set(vars(arguments)) == {"backbone", "backbone_revision", "adapt", *options}
    config = build_model(REVIEWS, arguments, {"pooling": "last"}, DatasetDict(train=labelled([0, 1]))).config
    assert {name: getattr(config, name) for name in options} == options
    assert config.pooling == "last"


def test_a_head_refuses_the_options_of_another(bert):
    arguments = ModelArguments(bert, head_type="linear")
    with pytest.raises(ValueError, match=r'n_iters is 2, and head_type="linear" has no such option; expected one of'):
        build_model(REVIEWS, arguments, {"n_iters": 2}, DatasetDict(train=labelled([0, 1])))


def test_what_tells_heads_apart():
    assert describe_head(ModelArguments("x"), {}) == ""
    given = {"n_iters": 2, "d_inp": 64, "strategy": "reference"}  # the second is the default, the third changes nothing
    arguments = ModelArguments("x", layers=[0, -1], freeze_backbone=False, mixup_alpha=0.2, class_weights=[1.0, 2.0])
    found = describe_head(arguments, given)
    assert found == "layers=[0, -1], n_iters=2, mixup_alpha=0.2, class_weights=[1.0, 2.0]"
    with pytest.raises(TypeError, match="linear heads have no option n_iters; expected one of pooling"):
        describe_head(ModelArguments("x", head_type="linear"), given)
    with pytest.raises(ValueError, match=r"head_type is 'cube'; expected one of token_depth, "):
        describe_head(ModelArguments("x", head_type="cube"), {})


def test_windows_of_texts(bert):
    tokenizer = REVIEWS.load_processor(bert)  # its BERT takes 32 tokens
    assert windows_for(DataArguments("reviews"), REVIEWS, tokenizer) == {}
    fields = windows_for(DataArguments("reviews", window_overlap=4), REVIEWS, tokenizer)
    assert fields == {"window_length": 32, "window_overlap": 4, "window_special_tokens": [1, 1]}
    model = build_model(REVIEWS, ModelArguments(bert), SMALL, DatasetDict(train=labelled([0, 1])), **fields)
    assert model.config.windowing == (32, 4, 1, 1)
    shorter = windows_for(DataArguments("reviews", window_overlap=4, window_length=16), REVIEWS, tokenizer)
    assert shorter == {**fields, "window_length": 16}


def test_windows_that_make_no_sense(bert):
    toys = get_task("toy_norb")
    with pytest.raises(ValueError, match="window_length needs window_overlap"):
        windows_for(DataArguments("reviews", window_length=16), REVIEWS, REVIEWS.load_processor(bert))
    with pytest.raises(ValueError, match="window_overlap is for texts, and toy_norb is of images"):
        windows_for(DataArguments("toy_norb", window_overlap=16), toys, toys.load_processor("new:stereo_conv"))


def test_evaluation_splits():
    splits = DatasetDict(
        train=labelled([0, 1]),
        validation_matched=labelled([0, 1]),
        validation_mismatched=labelled([1, 1]),
        test_matched=labelled([-1, -1]),
        test_mismatched=labelled([-1, 1]),
    )
    assert list(evaluation_splits(splits, "validation")) == ["validation_matched", "validation_mismatched"]
    assert list(evaluation_splits(splits, "test")) == ["test_mismatched"]
    numbers = DatasetDict(validation=labelled([0.0, 5.0], None), test=labelled([math.nan] * 2, None))
    assert list(evaluation_splits(numbers, "validation")) == ["validation"]
    assert evaluation_splits(numbers, "test") == {}


def test_check_labels_match(bert):
    def model(labels):
        return build_model(REVIEWS, ModelArguments(bert), SMALL, DatasetDict(train=labels))

    classes, numbers = labelled([0, 1]), labelled([0.5, 1.0], None)
    assert isinstance(model(classes), CapsuleHeadForSequenceClassification)
    check_labels_match(model(classes), classes)
    check_labels_match(model(numbers), numbers)
    with pytest.raises(
        ValueError, match=r"for \['no', 'yes'\], and the dataset has \['yes', 'no'\]; expected the same"
    ):
        check_labels_match(model(classes), labelled([0, 1], ["yes", "no"]))
    with pytest.raises(ValueError, match=r"for \['no', 'yes'\], and the dataset has numbers"):
        check_labels_match(model(classes), numbers)
    with pytest.raises(ValueError, match=r"for numbers, and the dataset has \['no', 'yes'\]"):
        check_labels_match(model(numbers), classes)


def test_a_cache_is_kept_on_the_device_only_where_it_can_be():
    check_cache_options(DataArguments("reviews", cache_hidden_states=True, cache_on_device=True), n_workers=0)
    check_cache_options(DataArguments("reviews", cache_hidden_states=True), n_workers=2)
    with pytest.raises(ValueError, match=r"cache_on_device is true and cache_hidden_states is false; .* to true\."):
        check_cache_options(DataArguments("reviews", cache_hidden_states=False, cache_on_device=True), n_workers=0)
    with pytest.raises(ValueError, match="dataloader_num_workers is 2; cache_on_device expects 0"):
        check_cache_options(DataArguments("reviews", cache_hidden_states=True, cache_on_device=True), n_workers=2)


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("toy_norb", {"max_length": 8}, "max_length is 8, which is for texts, and toy_norb is of images"),
        ("audio_folder", {"max_length": 8}, "max_length is 8, which is for texts, and audio_folder is of audio"),
        ("image_folder", {"cache_hidden_states": True}, "cache_hidden_states is True, which is for texts"),
        ("toy_norb", {"pad_token": "[PAD]"}, r"pad_token is \[PAD\], which is for texts"),
        ("reviews", {"phrases": False}, "phrases is false, and reviews has no phrases"),
        ("sst5", {"early_stopping_patience": 0}, "early_stopping_patience is 0; expected 1 or more"),
        ("sst5", {"early_stopping_patience": -1}, "early_stopping_patience is -1; expected 1 or more"),
    ],
)
def test_options_of_the_data_without_effect(task, options, said):
    with pytest.raises(ValueError, match=said):
        check_data_options(DataArguments(task, **options), get_task(task))


def test_options_of_the_data_with_an_effect():
    check_data_options(DataArguments("sst5", phrases=False, max_length=8, early_stopping_patience=1), get_task("sst5"))
    check_data_options(DataArguments("toy_norb"), get_task("toy_norb"))


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        (
            "reviews",
            {"backbone": "new:vit"},
            "reviews is of texts, and the backbone new:vit, a vit model, takes images",
        ),
        ("reviews", {"backbone": "new:wav2vec2"}, "wav2vec2 model, takes audio; expected a backbone that takes texts"),
        ("reviews", {"backbone": "new:whisper"}, "whisper model, takes audio; expected"),
        ("image_folder", {"backbone": "new:bert"}, "image_folder is of images, .* a bert model, takes texts"),
        ("image_folder", {"backbone": "new:wav2vec2"}, "takes audio; expected a backbone that takes images"),
        ("audio_folder", {"backbone": "new:bert"}, "audio_folder is of audio, .* takes texts"),
        ("audio_folder", {"backbone": "new:resnet"}, "audio_folder is of audio, .* takes images"),
        ("image_folder", {"backbone": "new:resnet"}, "new:resnet has random weights and no image processor"),
        ("reviews", {"backbone": "new:bert"}, "new:bert has random weights and no tokenizer"),
        ("reviews", {"backbone": "new:bret"}, r"The backbone is new:bret; .* did you mean new:bert\?"),
        ("toy_norb", {"backbone": "new:zzzzzz"}, "The backbone is new:zzzzzz; expected new: and a model type"),
        (
            "toy_norb",
            {"backbone": "new:stereo_conv", "backbone_revision": "main"},
            "backbone_revision is main, and the",
        ),
        ("reviews", {"backbone": "package:a/b", "backbone_revision": "main"}, "backbone_revision is main, and the"),
    ],
)
def test_backbones_that_do_not_fit_a_task(task, options, said):
    with pytest.raises(ValueError, match=said):
        check_backbone(ModelArguments(**options), get_task(task))


def test_backbones_that_fit_a_task(bert):
    check_backbone(ModelArguments(bert), REVIEWS)
    check_backbone(ModelArguments("new:stereo_conv"), get_task("toy_norb"))
    for task in ("reviews", "image_folder"):  # CLIP has a tower for both: only the processor is missing
        with pytest.raises(ValueError, match="new:clip has random weights and no"):
            check_backbone(ModelArguments("new:clip"), get_task(task))
    with pytest.raises(ValueError, match=r"backbone_revision is main, and the backbone .* is not from the Hub"):
        check_backbone(ModelArguments(bert, backbone_revision="main"), REVIEWS)


def test_where_to_report_to():
    check_reporting([])
    with pytest.raises(ValueError, match="report_to is nowhere: nowhere is not supported"):
        check_reporting(["nowhere"])
    with pytest.raises(ImportError, match="report_to is dvclive: "):
        check_reporting(["dvclive"])


def test_special_tokens_are_those_of_the_tokenizer(bert, caplog):
    from transformers.trainer_utils import align_special_tokens as align_loudly

    tokenizer = REVIEWS.load_processor(bert)
    tokenizer.pad_token, tokenizer.eos_token = "[SEP]", "[CLS]"
    model = build_model(REVIEWS, ModelArguments(bert), SMALL, DatasetDict(train=labelled([0, 1])))
    config = model.config.get_text_config()
    config.eos_token_id = [5]
    align_special_tokens(config, tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.eos_token_id == [tokenizer.eos_token_id, 5]
    before = config.to_dict()
    align_loudly(model, tokenizer)  # as the Trainer does: nothing is left to it
    assert config.to_dict() == before and caplog.text == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "data is None and task is None; expected one of them"),
        ({"data": "a.csv", "task": "reviews"}, "data is a.csv and task is reviews; expected one of them"),
        ({"task": "reviews", "text": "a"}, "text is a, which is for data of your own"),
        ({"task": "reviews", "data_split": "a"}, "data_split is a, which is for data of your own"),
        ({"data": "a.csv", "source": "b"}, "source is b, which is for tasks"),
        ({"data": "a.csv"}, "There is no file or folder a.csv"),
    ],
)
def test_data_is_a_users_own_or_a_tasks(given, words):
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        find_task(DataArguments(**given), seed=0)


def test_own_data_names_classes_and_problem(bert):
    columns = {"text": ["a", "b"] * 5, "label": [["x"], ["x", "y"]] * 5}
    task = own_task(load_data(columns))
    splits = task.load()
    config = build_model(task, ModelArguments(bert), SMALL, splits).config
    assert (config.problem_type, config.class_names) == ("multi_label_classification", ["x", "y"])
    assert (task.metric, task.dataset) == ("multilabel", None)
    assert describe_own_data(splits) == {"inputs_from": ["text"], "labels_from": ["label"]}
