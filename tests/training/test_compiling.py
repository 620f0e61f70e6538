"""How often torch.compile compiles in a run whose batches differ in size."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.data import Dataset

from capsule_heads import CapsuleTrainer

# Mixed lengths, of which one is the batch size, smaller batches, and a last one of a single sample.
SHAPES = ((6, 9), (6, 4), (6, 6), (6, 30), (4, 5), (1, 7))


class Batches(Dataset):
    """Whole batches of each shape."""

    def __init__(self, of_states):
        self.of_states = of_states

    def __len__(self):
        return len(SHAPES)

    def __getitem__(self, index):
        n, length = SHAPES[index]
        generator = torch.Generator().manual_seed(index)
        batch = {
            "attention_mask": torch.ones(n, length, dtype=torch.long),
            "labels": torch.randint(2, (n,), generator=generator),
        }
        if self.of_states:
            return {**batch, "hidden_states": torch.randn(n, length, 3, 16, generator=generator).half()}
        return {**batch, "input_ids": torch.randint(4, 14, (n, length), generator=generator)}


@pytest.mark.slow
@pytest.mark.parametrize("of_states", [False, True], ids=["texts", "hidden states"])
def test_a_run_of_mixed_lengths_compiles_three_times_at_most(make_model, arguments, of_states):
    torch.compiler.reset()
    counters.clear()
    fields = {"torch_compile": True, "torch_compile_backend": "aot_eager", "num_train_epochs": 1}
    fields |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    model = make_model(mixup_alpha=0.0, n_iters=1, n_parts=4)
    args = arguments(**fields)
    CapsuleTrainer(model, args, train_dataset=Batches(of_states), data_collator=lambda rows: rows[0]).train()
    assert counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]
    torch.compiler.reset()
