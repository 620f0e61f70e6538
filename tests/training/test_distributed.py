"""Two processes on the CPU."""

import json
import os
import subprocess
import sys

import pytest

# Each process writes, for a frozen backbone and another, what it trained on and what it ended with. DDP fails on
# parameters without a gradient, as it is not told to look for them.
PROGRAM = """
import json, sys, torch
from datasets import load_from_disk
from transformers import AutoTokenizer
from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments

backbone, data, folder = sys.argv[1:]
arguments = CapsuleTrainingArguments(
    folder, use_cpu=True, num_train_epochs=2, per_device_train_batch_size=5, save_strategy="no", disable_tqdm=True,
    ddp_find_unused_parameters=False,
)
runs = {}
for freeze in True, False:
    torch.manual_seed(0)
    model = CapsuleHeadForSequenceClassification.from_backbone(backbone, d_inp=8, n_parts=4, freeze_backbone=freeze)
    run = runs["frozen" if freeze else "unfrozen"] = {"batches": []}
    model.register_forward_pre_hook(
        lambda module, args, inputs: run["batches"].append(inputs["input_ids"].tolist()), with_kwargs=True
    )
    trainer = CapsuleTrainer(
        model, arguments, train_dataset=load_from_disk(data), processing_class=AutoTokenizer.from_pretrained(backbone)
    )
    trainer.train()
    run["steps"] = trainer.state.global_step
    run["weights"] = {name: x.tolist() for name, x in model.named_parameters() if x.requires_grad}
with open(f"{folder}/{arguments.process_index}.json", "w") as file:
    json.dump(runs, file)
"""


@pytest.fixture(scope="module")
def both_ranks(bert, tmp_path_factory):
    """both_ranks(tokens): what the two processes wrote."""
    done = {}

    def launch(tokens):
        if done:
            return done["runs"]
        folder = tmp_path_factory.mktemp("distributed")
        (folder / "program.py").write_text(PROGRAM)
        tokens.save_to_disk(folder / "data")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
        process = subprocess.run(
            [*torchrun, "--rdzv_endpoint=127.0.0.1:0", folder / "program.py", bert, folder / "data", folder],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        done["runs"] = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
        return done["runs"]

    return launch


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["frozen", "unfrozen"])
def test_two_processes_share_one_training(both_ranks, tokens, kind):
    train = tokens["train"].select(range(80))
    first, second = (runs[kind] for runs in both_ranks(train))
    assert first["steps"] == second["steps"] == 16
    assert first["weights"] == second["weights"]
    assert any(name.startswith("backbone.") for name in first["weights"]) == (kind == "unfrozen")
    for epoch in (slice(0, 8), slice(8, 16)):  # each epoch is all texts, once: the processes agree on the order
        seen = [[i for i in ids if i] for run in (first, second) for batch in run["batches"][epoch] for ids in batch]
        assert sorted(seen) == sorted(train["input_ids"])
    assert first["batches"][:8] != first["batches"][8:]
