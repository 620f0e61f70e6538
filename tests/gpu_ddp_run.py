"""One training in a process by itself, and in a group of one: `python gpu_ddp_run.py DEVICE BACKBONE FOLDER`."""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments

N_EXAMPLES = 12


class Losses(TrainerCallback):
    """The loss of each step."""

    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []


def train(name, device, backbone, folder):
    """Train a head, and write what it was trained with and its losses."""
    torch.manual_seed(0)
    model = CapsuleHeadForSequenceClassification.from_backbone(backbone, num_labels=3, d_inp=8, n_parts=6)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 0.2 * torch.randn_like(parameter)  # scores are all 0 where betas are
    data = [{"input_ids": torch.randint(3, 100, (9,)), "labels": n % 3} for n in range(N_EXAMPLES)]
    arguments = CapsuleTrainingArguments(
        str(folder / name),
        recipe="paper",
        use_cpu=device == "cpu",
        max_steps=30,
        per_device_train_batch_size=N_EXAMPLES // 2,
        train_sampling_strategy="sequential",
        learning_rate=0.02,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        ddp_find_unused_parameters=False,  # DDP then fails on parameters without a gradient
    )
    losses = Losses()
    trainer = CapsuleTrainer(model, arguments, train_dataset=data, callbacks=[losses])
    trainer.train()
    result = {
        "losses": losses.losses,
        "wrapper": type(trainer.model_wrapped).__name__,
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "device": next(model.parameters()).device.type,
    }
    Path(folder, f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    options = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    train("alone", *options)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train("ddp", *options)
    if dist.is_initialized():
        dist.destroy_process_group()
