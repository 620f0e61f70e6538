"""The estimator: scikit-learn's own checks, and what its tools do with it."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

from capsule_heads import HeadClassifier

TEXTS = ["a good film", "good", "so good", "a bad film", "bad", "so bad"] * 2
WORDS = ["yes", "yes", "yes", "no", "no", "no"] * 2
SMALL = {"n_parts": 4, "d_inp": 8, "max_steps": 3, "per_device_train_batch_size": 6}
LEARNS = {**SMALL, "max_steps": 60, "learning_rate": 0.2}


@pytest.fixture
def classifier(bert):
    return HeadClassifier(bert, **SMALL)


@pytest.fixture(scope="module")
def trained(bert):
    return HeadClassifier(bert, **LEARNS).fit(TEXTS, WORDS)


class OfNumbers(HeadClassifier):
    """Classifies rows of numbers by their texts: scikit-learn's checks know no texts."""

    def fit(self, X, y):
        return super().fit(self._texts(X), y)

    def predict_proba(self, X):
        return super().predict_proba(self._texts(X))

    def _texts(self, X):
        return [" ".join(f"{x:.1f}" for x in row) for row in np.asarray(X)]


# Of the checks for classifiers, those that do not ask for numbers: not those of n_features_in_ and feature names, of
# sparse inputs, complex or infinite numbers and their dtypes, of sample weights, and of accuracy on tables of numbers;
# and not those of invariance, to 1e-7: scores in float32 differ by 2e-7 between batches of other sizes.
CHECKS = (
    "check_estimator_cloneable",
    "check_valid_tag_types",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_estimators_unfitted",
    "check_fit_score_takes_y",
    "check_requires_y_none",
    "check_estimators_fit_returns_self",
    "check_estimators_overwrite_params",
    "check_dict_unchanged",
    "check_estimators_pickle",
    "check_classifiers_one_label",
    "check_classifiers_classes",
    "check_classifiers_regression_target",
    "check_fit_idempotent",
    "check_fit_check_is_fitted",
    "check_pipeline_consistency",
)


@pytest.mark.parametrize("name", CHECKS)
def test_it_passes_the_checks_of_scikit_learn(name, bert):
    options = {} if name == "check_no_attributes_set_in_init" else SMALL  # it knows no **options
    estimator = OfNumbers(bert, **options)
    getattr(estimator_checks, name)("HeadClassifier", estimator)


def test_it_learns_and_gives_classes_back_as_they_went_in(classifier):
    classifier.set_params(**LEARNS)
    for classes in (WORDS, [x == "yes" for x in WORDS], np.array([3 if x == "yes" else -1 for x in WORDS])):
        fitted = clone(classifier).fit(TEXTS, classes)
        assert fitted.classes_.tolist() == sorted(set(classes)) and fitted.classes_.dtype == np.asarray(classes).dtype
        assert fitted.predict(TEXTS[::-1]).tolist() == list(classes)[::-1]
        assert fitted.score(TEXTS, classes) == 1


def test_probabilities_are_those_of_the_pipeline(trained):
    from transformers import pipeline

    pipe = pipeline("text-classification", model=trained.model_, tokenizer=trained.tokenizer_, top_k=None)
    found = [{x["label"]: x["score"] for x in scores} for scores in pipe(TEXTS[:4])]
    expected = [[scores[name] for name in ("no", "yes")] for scores in found]
    assert abs(trained.predict_proba(TEXTS[:4]) - expected).max() < 1e-6
    assert not np.allclose(trained.predict_proba(TEXTS[:1]), 0.5, atol=0.05)
    assert trained.predict_proba([]).shape == (0, 2)


def test_texts_come_in_many_forms(trained, classifier):
    expected = trained.predict_proba(TEXTS[:3])
    for given in (np.array(TEXTS[:3]), pd.Series(TEXTS[:3]), pd.DataFrame({"a": TEXTS[:3]}), iter(TEXTS[:3])):
        assert (trained.predict_proba(given) == expected).all()
    pairs = [(text, "a film") for text in TEXTS]
    fitted = classifier.fit(pairs, WORDS)
    assert (fitted.predict_proba(np.array(pairs)) == fitted.predict_proba(pairs)).all()


def test_it_saves_and_loads(trained, tmp_path):
    trained.save(tmp_path)
    for other in (HeadClassifier.load(tmp_path), pickle.loads(pickle.dumps(trained))):
        assert (other.predict_proba(TEXTS) == trained.predict_proba(TEXTS)).all()
        assert other.get_params() == trained.get_params()
        assert (other.classes_ == trained.classes_).all() and other.classes_.dtype == trained.classes_.dtype


def test_it_goes_where_estimators_go(classifier):
    piped = make_pipeline(FunctionTransformer(lambda texts: [text.upper() for text in texts]), classifier)
    assert cross_val_score(piped, TEXTS, WORDS, cv=2).shape == (2,)
    search = GridSearchCV(classifier, {"n_parts": [2, 4], "learning_rate": [0.05]}, cv=2).fit(TEXTS, WORDS)
    assert search.best_estimator_.model_.config.n_parts == search.best_params_["n_parts"]
    assert len(search.cv_results_["params"]) == 2


def test_its_seed_makes_it_the_same(classifier):
    first, again = (clone(classifier).fit(TEXTS, WORDS).predict_proba(TEXTS) for _ in range(2))
    other = clone(classifier).set_params(random_state=1).fit(TEXTS, WORDS).predict_proba(TEXTS)
    assert (first == again).all() and not (first == other).all()


@pytest.mark.parametrize(
    ("options", "texts", "classes", "words"),
    [
        ({"n_part": 4}, TEXTS, WORDS, "Invalid parameter 'n_part' .* did you mean n_parts"),
        ({"seed": 4}, TEXTS, WORDS, "Invalid parameter 'seed'"),
        ({"backbone": ""}, TEXTS, WORDS, "backbone is not given; expected the name of a model"),
        ({}, "one text", WORDS, "X is one text; expected a list"),
        ({}, [1, 2], WORDS[:2], "Row 0 of X is 1; expected a text"),
        ({}, ["a", ("b", "c")], WORDS[:2], "X has single texts and pairs"),
        ({}, TEXTS, WORDS[:3], "X has 12 texts and y 3 classes"),
        ({}, TEXTS, ["a"] * 12, "y has 1 class; expected two classes or more"),
        ({}, TEXTS, [None] * 12, "y has a row without a class"),
        ({}, TEXTS, [0.5, 1] * 6, "y holds numbers that are not whole"),
        ({}, TEXTS, [[0, 1]] * 12, r"y has the shape \[12, 2\]; expected one class for each text"),
    ],
)
def test_mistakes_are_one_sentence(bert, options, texts, classes, words):
    with pytest.raises(ValueError, match=words):
        HeadClassifier(**{"backbone": bert, **options}).fit(texts, classes)


def test_it_has_to_be_fitted(classifier, tmp_path):
    for call in (lambda: classifier.predict(TEXTS), lambda: classifier.save(tmp_path)):
        with pytest.raises(NotFittedError):
            call()
