"""Texts longer than the backbone takes, in overlapping windows."""

import pytest
import torch
from transformers import AutoModel, FunnelConfig, T5Config, ViTConfig, pipeline

from capsule_heads import CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification, CapsuleHeadModel
from capsule_heads.backbones.windows import Windowing, cut

LENGTH, OVERLAP = 8, 2
WINDOWS = {"window_length": LENGTH, "window_overlap": OVERLAP, "window_special_tokens": [1, 1]}


@pytest.fixture
def make_windowed(make_model):
    return lambda model_type="bert", **fields: make_model(model_type, **{**WINDOWS, **fields})


def text(n_tokens, seed=0):
    """A text's tokens: a 1, others, a 2."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (n_tokens,), generator=generator)
    ids[0], ids[-1] = 1, 2
    return ids


def batch(texts, side="right"):
    n_tokens = max(map(len, texts))
    ids, mask = (torch.zeros(len(texts), n_tokens, dtype=torch.long) for _ in range(2))
    for row, ids_of_text in enumerate(texts):
        place = slice(0, len(ids_of_text)) if side == "right" else slice(n_tokens - len(ids_of_text), n_tokens)
        ids[row, place], mask[row, place] = ids_of_text, 1
    return {"input_ids": ids, "attention_mask": mask}


def test_how_a_text_is_cut():
    windows = cut(torch.ones(1, 17), Windowing(LENGTH, OVERLAP, 1, 1))
    # Token 0 and 16 are special. The last window begins early, to be full.
    assert windows.tokens.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 16],
        [0, 5, 6, 7, 8, 9, 10, 16],
        [0, 9, 10, 11, 12, 13, 14, 16],
        [0, 10, 11, 12, 13, 14, 15, 16],
    ]
    kept = [tokens[keep].tolist() for tokens, keep in zip(windows.tokens, windows.is_kept)]
    assert kept == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16]]
    assert windows.mask.all()


@pytest.mark.parametrize("special", [(0, 0), (1, 1), (0, 2), (2, 0)])
@pytest.mark.parametrize("overlap", [0, 1, 3, 5])
@pytest.mark.parametrize("side", ["left", "right", "a hole"])
def test_every_token_is_kept_once_with_its_special_tokens_around_it(special, overlap, side):
    length = 8
    lengths = [0, 1, 7, 8, 9, 10, 14, 31]
    mask = torch.zeros(len(lengths), 40, dtype=torch.long)
    for row, n in enumerate(lengths):
        place = {"left": range(40 - n, 40), "right": range(n), "a hole": [i for i in range(n + 1) if i != n // 2]}
        mask[row, list(place[side])] = 1
    windows = cut(mask, Windowing(length, overlap, *special))
    for row, n in enumerate(lengths):
        places = mask[row].nonzero()[:, 0].tolist()
        own = [(tokens[m].tolist(), k) for t, tokens, m, k in zip(*windows) if t == row]
        kept = torch.cat([windows.tokens[w][windows.is_kept[w]] for w in (windows.texts == row).nonzero()[:, 0]])
        assert kept.tolist() == places  # each once, and in order
        for tokens, _ in own:
            assert len(tokens) == min(n, length)
            assert tokens[: special[0]] == places[: special[0]]
            assert tokens[len(tokens) - special[1] :] == places[len(places) - special[1] :]
        assert len(own) == 1 or n > length


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_those_of_the_windows(make_windowed, backbone_dir, side):
    backbone = AutoModel.from_pretrained(backbone_dir("bert")).eval()
    texts = [text(17), text(5, 1), text(8, 2), text(11, 3)]
    inputs = batch(texts, side)
    states, masks = make_windowed().compute_hidden_states(**inputs)
    for mask in masks:
        assert torch.equal(mask, inputs["attention_mask"].float())
    windows = cut(inputs["attention_mask"], Windowing(LENGTH, OVERLAP, 1, 1))
    assert len(windows.texts) == 4 + 1 + 1 + 2
    with torch.no_grad():
        for window in range(len(windows.texts)):
            row, is_token = windows.texts[window], windows.mask[window]
            tokens, is_kept = windows.tokens[window][is_token], windows.is_kept[window][is_token]
            own = backbone(inputs["input_ids"][row, tokens][None], output_hidden_states=True).hidden_states
            for x, expected in zip(states, own):
                torch.testing.assert_close(x[row, tokens[is_kept]], expected[0, is_kept], rtol=1e-5, atol=1e-5)
    assert all((x[inputs["attention_mask"] == 0] == 0).all() for x in states)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_scores_alike_in_any_batch(make_windowed, model_type, side):
    model = make_windowed(model_type, mixup_alpha=0)
    texts = [text(n, n) for n in (23, 3, 8, 9, 40)]
    together = model(**batch(texts, side)).logits
    alone = torch.cat([model(**batch([one])).logits for one in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert together.std(0).min() > 1e-2


def test_texts_of_one_window_are_as_without_windows(make_windowed, make_model):
    windowed, whole = make_windowed(), make_model()
    texts = [text(n, n) for n in (8, 3, 5)]
    assert torch.equal(windowed(**batch(texts)).logits, whole(**batch(texts)).logits)
    # Beside a text of several windows they are so to rounding; and in a batch with needless padding.
    expected = whole(**batch(texts)).logits
    torch.testing.assert_close(windowed(**batch([*texts, text(20)])).logits[:3], expected, rtol=1e-4, atol=1e-4)
    padded = {name: torch.nn.functional.pad(x, (0, 9)) for name, x in batch(texts).items()}
    torch.testing.assert_close(windowed(**padded).logits, expected, rtol=1e-4, atol=1e-4)


def test_texts_beyond_the_backbones_positions_run(make_windowed, make_model):
    inputs = batch([text(100), text(41)])  # it has 40 positions
    with pytest.raises(ValueError, match="texts have 100 tokens, and the bert backbone has positions for 40"):
        make_model()(**inputs)
    assert make_windowed()(**inputs).logits.isfinite().all()


def test_all_windows_are_routed_together(make_windowed):
    model = make_windowed()
    output = model(**batch([text(17)]), output_routing=True)
    assert output.routing_probabilities[0].shape == (1, 17 * 3, 6)
    for place in (1, 8, 15):
        changed = text(17)
        changed[place] = 3 + (changed[place] - 3 + 7) % 61
        assert not torch.allclose(model(**batch([changed])).logits, output.logits, atol=1e-5)


def test_no_more_windows_run_at_a_time_than_there_are_texts(make_windowed):
    model, sizes = make_windowed(), []
    model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model(**batch([text(50), text(50, 1), text(3)]))
    n_windows = len(cut(torch.ones(1, 50), Windowing(LENGTH, OVERLAP, 1, 1)).texts)
    assert sum(n for n, _ in sizes) == 2 * n_windows + 1
    assert all(n <= 3 and length == LENGTH for n, length in sizes)


def test_other_inputs_are_cut_alike(make_windowed):
    model = make_windowed()
    inputs = batch([text(17), text(4, 1)])
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    expected = model(**inputs).logits
    given = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    types = torch.zeros_like(inputs["input_ids"])
    assert torch.equal(model(**inputs, token_type_ids=types).logits, expected)
    types[0, 12] = 1
    assert not torch.allclose(model(**inputs, token_type_ids=types).logits, expected, atol=1e-5)
    no_mask = {"input_ids": text(17)[None]}
    torch.testing.assert_close(model(**no_mask).logits, expected[:1], rtol=1e-4, atol=1e-4)


def test_mixup_and_gradients_of_a_trained_backbone(make_windowed):
    model = make_windowed(freeze_backbone=False, mixup_alpha=1.0).train()
    inputs = batch([text(17), text(4, 1), text(9, 2)])
    torch.manual_seed(0)
    loss = model(**inputs, labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.backbone.encoder.parameters())
    # Gradients of tokens in the overlap come from one window as a state, and from both as context.
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    model.eval()(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits.sum().backward()
    assert torch.equal(embeddings.grad.abs().sum(-1) > 0, inputs["attention_mask"].bool())


def test_the_stacks_of_an_encoder_decoder():

    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(**sizes, decoder_start_token_id=0)
    for stack in ("encoder", "decoder"):
        model = CapsuleHeadForSequenceClassification.from_backbone(
            config, stack=stack, d_inp=8, n_parts=6, **{**WINDOWS, "window_special_tokens": [0, 1]}
        )
        together, _ = model.compute_hidden_states(**batch([text(17), text(4, 1)]))
        alone, _ = model.compute_hidden_states(**batch([text(4, 1)]))
        for x, y in zip(together, alone):
            torch.testing.assert_close(x[1:, :4], y, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_and_in_a_pipeline(make_windowed, tokenizer, tmp_path):
    model = make_windowed()
    model.save_pretrained(tmp_path)
    tokenizer.model_max_length = LENGTH
    tokenizer.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.windowing == Windowing(LENGTH, OVERLAP, 1, 1)
    long = "the film was good not dull the plot is good not bad"
    inputs = tokenizer(long, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 14 > LENGTH
    logits = loaded(**inputs).logits[0]
    assert torch.equal(logits, model(**inputs).logits[0])
    classify = pipeline("text-classification", model=str(tmp_path), top_k=None)
    scores = {x["label"]: x["score"] for x in classify([long, "good"], batch_size=2)[0]}
    expected = {f"LABEL_{i}": p for i, p in enumerate(logits.softmax(-1).tolist())}
    assert scores == pytest.approx(expected, abs=1e-5)


def test_parts_of_windows(make_windowed, tmp_path):
    make_windowed().save_pretrained(tmp_path)
    parts = CapsuleHeadModel.from_pretrained(tmp_path)(**batch([text(17)]))
    assert parts.poses.shape == (1, 6, 1, 2) and parts.poses.isfinite().all()


# What is refused


def test_inputs_that_cannot_be_cut(make_windowed):
    model, inputs = make_windowed(), batch([text(17)])
    positions = torch.arange(17)[None]
    with pytest.raises(
        ValueError, match="position_ids were given for texts of 17 tokens, which are cut into windows of 8"
    ):
        model(**inputs, position_ids=positions)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 9\)"):
        model(input_ids=inputs["input_ids"], attention_mask=torch.ones(1, 9))


def test_a_backbone_whose_tokens_become_fewer_with_layer():
    config = FunnelConfig(
        architectures=["FunnelModel"], vocab_size=64, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=16
    )
    model = CapsuleHeadForSequenceClassification.from_backbone(config, **WINDOWS)
    assert model(**batch([text(8)])).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"made hidden states of 8, 8, 4, 8, 8, 8 tokens, by layer, from windows of 8"):
        model(**batch([text(17)]))


@pytest.mark.parametrize("fields", [{"window_length": 4}, {"window_overlap": -1}, {"window_overlap": 6}])
def test_windows_that_are_too_short(make_windowed, fields):
    with pytest.raises(ValueError, match=r"window_length is .* and window_overlap .* the 2 special tokens"):
        make_windowed(**fields)


def test_windows_of_images():
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    with pytest.raises(ValueError, match="window_length is for texts"):
        CapsuleHeadForImageClassification.from_backbone(config, window_length=8)
