"""The page, served on loopback and driven in a real browser."""

import os
import shutil
import sys

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.cli import main
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
        browser.find_element(By.TAG_NAME, "textarea").send_keys("good <b>film</b>")
        next(x for x in browser.find_elements(By.TAG_NAME, "button") if x.text == "Explain").click()
        wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "img[src]")) >= 2)
        words = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "span[title]"))
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
            assert label in text and f"{probability:.0%}" in text
        if "DEMO_SCREENSHOT" in os.environ:
            browser.save_screenshot(os.environ["DEMO_SCREENSHOT"])
    finally:
        browser.quit()
        page.close()


def test_a_space(tmp_path, capsys):
    main(["demo", "me/sst2-capsules", "--write_space", str(tmp_path / "space")])
    assert capsys.readouterr().out == f"{tmp_path / 'space'}\n"
    assert "build_demo('me/sst2-capsules').launch()" in (tmp_path / "space" / "app.py").read_text()
    assert (tmp_path / "space" / "requirements.txt").read_text().startswith("capsule-heads[demo]==")
    assert "app_file: app.py" in (tmp_path / "space" / "README.md").read_text()


def test_a_space_cannot_load_a_directory(classifier, tmp_path):
    with pytest.raises(ValueError, match=f"{classifier} is a directory here, and a Space loads its model from the Hub"):
        write_space(str(classifier), tmp_path / "space")
    assert not (tmp_path / "space").exists()


def test_mistakes(classifier, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["demo", str(tmp_path / "nowhere")])
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r'The page needs Gradio: pip install "capsule-heads\[demo\]"'):
        build_demo(str(classifier))
