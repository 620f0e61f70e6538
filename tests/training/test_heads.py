"""Every kind of head trains in the same trainer, from the same batches."""

import pytest
import torch
from configurations import make_config, small
from torch.utils.data import Dataset
from transformers import BertConfig

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer
from capsule_heads.heads import registered_heads

HIDDEN_SIZE = 5
HEADS = {
    **{name: {"head_type": name} for name, head in registered_heads().items() if head.made_by is None},
    "linear, first": {"head_type": "linear", "pooling": "first"},
    "linear, last": {"head_type": "linear", "pooling": "last"},
    "token_depth, two iterations": {"n_iters": 2},
}


class Separable(Dataset):
    """Batches of texts whose class is the sign of one number in one token at one layer."""

    def __init__(self, n_layers):
        self.n_layers = n_layers

    def __len__(self):
        return 60

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        states = torch.randn(16, 4, self.n_layers, HIDDEN_SIZE, generator=generator)
        labels = torch.randint(2, (16,), generator=generator)
        states[..., 0] = 2.0 * (2 * labels - 1)[:, None, None]
        return {"hidden_states": states, "attention_mask": torch.ones(16, 4), "labels": labels}


@pytest.mark.parametrize("name", HEADS)
def test_every_kind_of_head_learns(name, arguments):
    torch.manual_seed(0)
    fields = {"hidden_sizes": [HIDDEN_SIZE] * 3, "num_labels": 2, **HEADS[name]}
    config = make_config(BertConfig(), head_only=True, **small(**fields))
    model = CapsuleHeadForSequenceClassification(config, build=False)
    data = Separable(len(model.config.layers))
    fields = {"per_device_train_batch_size": 1, "num_train_epochs": 3, "learning_rate": 2e-2}
    CapsuleTrainer(
        model,
        arguments(remove_unused_columns=False, train_sampling_strategy="sequential", save_strategy="no", **fields),
        train_dataset=data,
        data_collator=lambda rows: rows[0],
    ).train()
    batch = data[1000]
    logits = model.eval()(hidden_states=batch["hidden_states"], attention_mask=batch["attention_mask"]).logits
    assert (logits.argmax(-1) == batch["labels"]).float().mean() >= 0.9
