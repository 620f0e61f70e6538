"""Uneven classes: 13 examples of one among 151 of the other, which look alike in part."""

import pytest
from sklearn.metrics import f1_score, recall_score

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments, load_processor
from capsule_heads.data import CapsuleCollator, load_data, tokenize

# Of "a film", most are common; of the texts with "bad", all are rare.
TEXTS = ["a film"] * 9 + ["bad"] * 4 + ["a film"] * 40 + ["good"] * 111
NAMES = ["rare"] * 13 + ["common"] * 151


def train(bert, folder, class_weights=None, **options):
    data = load_data({"text": TEXTS, "label": NAMES}, validation={"text": TEXTS, "label": NAMES})
    tokenizer = load_processor(bert)
    rows = tokenize(data, tokenizer)
    fields = {"d_inp": 8, "n_parts": 4, "class_weights": class_weights, **data.model_fields}
    trainer = CapsuleTrainer(
        CapsuleHeadForSequenceClassification.from_backbone(bert, **fields),
        CapsuleTrainingArguments(folder, report_to="none", **{"save_strategy": "no", "num_train_epochs": 5} | options),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        data_collator=CapsuleCollator(tokenizer),
    )
    trainer.train()
    predicted = trainer.predict(rows["validation"]).predictions.argmax(-1)
    return trainer, data, rows["validation"]["labels"][:], predicted


@pytest.mark.parametrize(("class_weights", "recall"), [(None, 4 / 13), ("balanced", 1.0)])
def test_balanced_weights_find_the_rare_class(bert, tmp_path, class_weights, recall):
    _, data, labels, predicted = train(bert, tmp_path, class_weights)
    rare = data.class_names.index("rare")
    assert recall_score(labels, predicted, pos_label=rare) == pytest.approx(recall)


def test_the_best_model_is_that_of_the_highest_macro_f1(bert, tmp_path, caplog):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer, _, labels, predicted = train(bert, tmp_path / "open", **options)
    assert "The best model is the one with the highest macro F1, as the classes are uneven." in caplog.messages
    evaluated = [x["eval_f1_macro"] for x in trainer.state.log_history if "eval_f1_macro" in x]
    assert trainer.state.best_metric == max(evaluated) == f1_score(labels, predicted, average="macro")
    trainer, *_ = train(bert, tmp_path / "named", **options, metric_for_best_model="accuracy")
    assert trainer.args.metric_for_best_model == "accuracy"
