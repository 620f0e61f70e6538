"""The page, served on loopback and driven in a real browser."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModel, AutoTokenizer, BertConfig, PreTrainedTokenizerFast, ViTConfig, ViTImageProcessor

from capsule_heads import CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification
from capsule_heads.cli import demo, main
from capsule_heads.cli.demo import build_demo
from capsule_heads.explain import explain
from capsule_heads.hub.space import write_space

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModel.from_config(BertConfig(vocab_size=32, **sizes)).save_pretrained(folder / "backbone")
    words = ["[PAD]", "[UNK]", "good", "bad", "film"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    fields = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    model = CapsuleHeadForSequenceClassification.from_backbone(str(folder / "backbone"), d_inp=8, n_parts=6, **fields)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its driver on this machine")
def test_in_a_browser(classifier, tmp_path, monkeypatch):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    page = build_demo(str(classifier))
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", server_port=None)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"):
        options.add_argument(flag)
    for flag in ("--disable-component-update", "--no-first-run", "--window-size=1000,1600"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.get(address)
        wait = WebDriverWait(browser, 60)
        wait.until(lambda b: b.find_elements(By.TAG_NAME, "textarea"))
        box = browser.find_element(By.TAG_NAME, "textarea")

        def click():
            next(x for x in browser.find_elements(By.TAG_NAME, "button") if x.text == "Explain").click()

        def results():
            return browser.find_elements(By.CSS_SELECTOR, ".explanation")

        box.send_keys("good")
        click()
        wait.until(lambda b: results())
        box.send_keys(" <b>film</b>")  # another text: what is shown is of the last one
        wait.until(lambda b: not results())
        click()
        words = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".explanation .text span[title]"))
        assert browser.find_elements(By.CSS_SELECTOR, ".explanation img[src]")
        assert [word.text for word in words if word.get_attribute("style").startswith("background")] == [
            "good", "<", "b", ">", "film", "</", "b", ">",
        ]  # fmt: skip
        text = browser.find_element(By.TAG_NAME, "body").text
        (explanation,) = explain(
            CapsuleHeadForSequenceClassification.from_pretrained(classifier),
            "good <b>film</b>",
            AutoTokenizer.from_pretrained(classifier),
        )
        for label, probability in zip(explanation.labels, explanation.probabilities.tolist()):
            assert label in text and f"{probability:.3f}" in text
        assert f"{max(explanation.probabilities.tolist()):.0%}" in text
        if "DEMO_SCREENSHOT" in os.environ:
            browser.save_screenshot(os.environ["DEMO_SCREENSHOT"])
        box.clear()
        box.send_keys(" ")
        click()
        wait.until(lambda b: "expected a text." in b.find_element(By.TAG_NAME, "body").text)
        assert not results()
        browser.set_window_size(500, 900)  # the least that Chromium takes
        box.send_keys("good " * 300)
        click()
        wait.until(lambda b: results())
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        browser.quit()
        page.close()


def explain_input(page):
    """What a click on the button shows, the last of what it yields."""
    (function,) = [x.fn for x in page.fns.values() if x.fn is not None and x.fn.__name__ == "explain_input"]
    return lambda *given: list(function(*given))[-1]


def save_variant(classifier, folder, **fields):
    """Save a classifier with another head or kind of problem beside the first one's tokenizer."""
    shutil.copytree(classifier, folder)
    torch.manual_seed(0)
    model = CapsuleHeadForSequenceClassification.from_backbone(str(classifier / "backbone"), **fields)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    return folder


def components(page, kind):
    return [x for x in page.blocks.values() if type(x).__name__ == kind]


def test_the_page_asks_by_its_classes_and_has_an_example(classifier):
    page = build_demo(str(classifier))
    assert page.title == "negative or positive?" and classifier.name not in str(components(page, "HTML")[0].value)
    first, second = components(page, "Textbox")
    assert first.placeholder and "pairs" in second.placeholder
    examples = next(x.samples for x in components(page, "Dataset"))
    assert len(examples) == 3 and all("<b>" in explain_input(page)(*example) for example in examples)


def test_a_text_without_an_end(classifier):
    show = explain_input(build_demo(str(classifier)))
    for n_words in (330, 500):  # a picture of the second was once wider than its format allows
        page = show("good film " * (n_words // 2), None)
        assert page.count("data:image/webp") == 1 and len(page) < 500_000


def test_a_pair(classifier):
    page = explain_input(build_demo(str(classifier)))("good film", "bad film")
    first, second = page[page.index('class="text"') :].split('<span class="pair"')
    assert ">good<" in first and ">bad<" in second


def test_there_is_nothing_of_an_input_before(classifier):
    page = build_demo(str(classifier))
    (function,) = [x.fn for x in page.fns.values() if x.fn is not None and x.fn.__name__ == "explain_input"]
    shown = function(" ", "")
    sentence = "There is nothing to explain yet; expected a text."
    assert next(shown) == "" and f">{sentence}</p>" in next(shown)
    assert [x.js for x in page.fns.values() if x.fn is None] == ["() => ''"]  # at each change of an input


def test_a_model_without_credits_shows_its_scores(classifier, tmp_path):
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    folder = save_variant(classifier, tmp_path / "routing", head_type="vector_routing", **labels)
    page = explain_input(build_demo(str(folder)))("good film", "")
    model = CapsuleHeadForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**tokenizer("good film", return_tensors="pt")).logits.softmax(-1)[0].tolist()
    for label, probability in zip(labels["id2label"].values(), expected):
        assert label in page and f"{probability:.3f}" in page
    assert "A VectorRoutingHead has no credits to explain" in page and "legend" not in page.split("</style>")[1]


def test_a_regression_shows_its_value(classifier, tmp_path):
    fields = {"id2label": {0: "stars"}, "label2id": {"stars": 0}, "problem_type": "regression"}
    folder = save_variant(classifier, tmp_path / "regression", num_labels=1, d_inp=8, n_parts=6, **fields)
    page = build_demo(str(folder))
    assert page.title == "stars: how much?"
    shown = explain_input(page)("good film", "")
    model = CapsuleHeadForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        value = model(**AutoTokenizer.from_pretrained(folder)("good film", return_tensors="pt")).logits.item()
    assert f"<b>stars</b> {value:.4g}" in shown and "this model is a regression" in shown


def test_all_labels_that_apply_are_shown(classifier, tmp_path):
    names = ["new", "long", "sad", "loud", "late"]
    fields = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    fields["problem_type"] = "multi_label_classification"
    folder = save_variant(classifier, tmp_path / "labels", num_labels=5, d_inp=8, n_parts=6, **fields)
    page = build_demo(str(folder))
    assert page.title == "new, long, sad and 2 others: which of them?"
    shown = explain_input(page)("good film", "")
    (explanation,) = explain(CapsuleHeadForSequenceClassification.from_pretrained(folder), ["good film"])
    above = [name for name, p in zip(names, explanation.probabilities.tolist()) if p > 0.5]
    assert len(above) > 1 and all(f"Credits for <b>{name}</b>" in shown for name in above)
    assert shown.count("Credits for") == len(above)


def test_an_image_is_read_as_on_the_command_line(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTConfig(image_size=16, patch_size=8, **sizes)
    AutoModel.from_config(vit).save_pretrained(tmp_path / "vit")
    fields = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    model = CapsuleHeadForImageClassification.from_backbone(str(tmp_path / "vit"), d_inp=8, n_parts=6, **fields)
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    page = build_demo(str(tmp_path / "model"))
    assert not list(Path(demo.__file__).parent.glob("*.pyi"))  # Gradio writes one where a component is a subclass
    image = components(page, "Image")[0]
    path = tmp_path / "image.png"
    Image.effect_noise((20, 20), 60).save(path)  # a grey one
    given = image.data_model(path=str(path), orig_name="image.png")
    assert image.preprocess(given) == str(path)  # no colours or bits are lost on the way
    assert explain_input(page)(str(path)).count("data:image/webp") == 1
    path.write_text("no image")
    assert image.preprocess(given) == str(path)  # Gradio would open it, and fail without a sentence
    message = explain_input(page)(str(path))
    assert "image.png" in message and str(tmp_path) not in message and "alert" in message


def test_a_space(tmp_path, capsys):
    main(["demo", "me/sst2-capsules", "--write_space", str(tmp_path / "space")])
    assert capsys.readouterr().out == f"{tmp_path / 'space'}\n"
    assert "build_demo('me/sst2-capsules').launch(show_error=True)" in (tmp_path / "space" / "app.py").read_text()
    assert (tmp_path / "space" / "requirements.txt").read_text().startswith("capsule-heads[demo]==")
    assert "app_file: app.py" in (tmp_path / "space" / "README.md").read_text()
    write_space("2024", tmp_path / "year")  # a name that YAML would take for a number
    card = yaml.safe_load((tmp_path / "year" / "README.md").read_text().split("---")[1])
    assert (card["title"], card["models"]) == ("2024", ["2024"])


def test_a_space_cannot_load_a_directory(classifier, tmp_path):
    with pytest.raises(ValueError, match=f"{classifier} is a directory here, and a Space loads its model from the Hub"):
        write_space(str(classifier), tmp_path / "space")
    assert not (tmp_path / "space").exists()


def test_mistakes(classifier, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["demo", str(tmp_path / "nowhere")])
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]
    for options, message in (
        (("--port", "9000", "--write_space", str(tmp_path / "x")), "--port is 9000, but a Space has a port of its own"),
        (("--port", "70000"), "--port is 70000; expected a number from 1 to 65535."),
    ):
        with pytest.raises(SystemExit):
            main(["demo", "me/sst2-capsules", *options])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    for module in ("gradio", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=r'needs Gradio and matplotlib: pip install "capsule-heads\[demo\]"'):
                build_demo(str(classifier))
