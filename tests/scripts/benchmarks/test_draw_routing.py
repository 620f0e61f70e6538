"""scripts/benchmarks/draw_routing.py on a tiny head."""

import pytest
from PIL import Image

NAMES = ("overview", "parts", "iterations", "padding")


@pytest.fixture
def save(make_model, tokenizer, tmp_path):
    """save(**fields): the folder of a tiny model with its tokenizer."""

    def save_model(**fields):
        model = make_model(**fields)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save_model


def test_the_pictures(call, save, tmp_path):
    options = ("--text", "the film is good", "--output_dir", tmp_path / "pictures")
    status, out, err = call("benchmarks/draw_routing.py", save(n_parts=10), *options)
    assert status == 0, err
    files = [tmp_path / "pictures" / f"routing_{name}.png" for name in NAMES]
    assert out.splitlines()[1:] == [str(file) for file in files]
    assert all(Image.open(file).size[0] == 900 for file in files)
    changes = float(out.splitlines()[0].split(" by ")[1].split()[0])
    assert changes < 1e-5


def test_heads_that_are_not_drawn(fails, save, tmp_path):
    options = ("--output_dir", tmp_path / "pictures")
    assert "The head is linear; expected token_depth" in fails(
        "benchmarks/draw_routing.py", save(head_type="linear"), *options
    )
    assert "expected (1, 2)" in fails("benchmarks/draw_routing.py", save(d_cap=3), *options)
    assert not (tmp_path / "pictures").exists()
