"""One training in one, two and four processes: `python distributed_runs.py BACKBONE DATA FOLDER`."""

import functools
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import load_from_disk
from processes import fork_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, TrainerCallback

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments

N_EVALUATED = 13  # no multiple of anything


class Losses(TrainerCallback):
    """The loss of each step."""

    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


class ShardedTrainer(CapsuleTrainer):
    """As under FSDP2 on GPUs: accelerate shards nothing on the CPU, unless it is told that it has been asked to."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state.__dict__
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
            state_dict_type="FULL_STATE_DICT",
        )
        state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


def describe(prediction):
    """Metrics that say what was evaluated."""
    return {"n": len(prediction.label_ids), "labels": prediction.label_ids.tolist()}


def shared_by_ddp(model):
    """What processes send each other."""
    if not isinstance(model, DistributedDataParallel):
        return None
    logged = model._get_ddp_logging_data()
    return {"gradient_bytes": int(logged["total_parameter_size_bytes"]), "n_buffers": len(model.modules_buffers)}


def train(folder, sizes, freeze, sharded, rank):
    """Trains without mixup, whose partners are of a process's own batch; evaluates, and saves."""
    if sharded:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    batch_size, n_accumulated = sizes
    folder.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    torch.manual_seed(0)
    fields = {"d_inp": 8, "n_parts": 4, "freeze_backbone": freeze, "mixup_alpha": 0}
    model = CapsuleHeadForSequenceClassification.from_backbone(BACKBONE, **fields)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # what falls out would be another for each process
    arguments = CapsuleTrainingArguments(
        str(folder),
        recipe="paper",
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=n_accumulated,
        per_device_eval_batch_size=4,
        learning_rate=0.1,
        logging_steps=1,
        save_steps=6,
        disable_tqdm=True,
        report_to=[],
        ddp_find_unused_parameters=False,  # DDP then fails on parameters without a gradient
    )
    data, losses, batches = load_from_disk(DATA), Losses(), []
    trainer = (ShardedTrainer if sharded else CapsuleTrainer)(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data.select(range(N_EVALUATED)),
        processing_class=tokenizer,
        compute_metrics=describe,
        callbacks=[losses],
    )
    hook = model.register_forward_pre_hook(
        lambda module, args, inputs: batches.append(inputs["input_ids"].tolist()), with_kwargs=True
    )
    trainer.train()
    hook.remove()
    result = {
        "losses": losses.losses,
        "batches": batches,
        "shared": shared_by_ddp(trainer.model_wrapped),
        "kinds": sorted({type(x).__name__ for x in model.parameters()}),
        "evaluated": trainer.evaluate(),
        "logits": trainer.predict(data).predictions.tolist(),
    }
    trainer.save_model()
    if not sharded:
        result["weights"] = {name: x.tolist() for name, x in model.named_parameters() if x.requires_grad}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


RUNS = {  # name: processes, and (batch of each, accumulated), frozen, sharded
    **{
        f"{n} x {sizes[0]} x {sizes[1]} {kind}": (n, sizes, kind == "frozen", False)
        for kind in ("frozen", "unfrozen")
        for n, sizes in ((1, (16, 1)), (2, (8, 1)), (1, (4, 4)), (4, (4, 1)))
    },
    **{f"2 x 8 x 1 {kind} sharded": (2, (8, 1), kind == "frozen", True) for kind in ("frozen", "unfrozen")},
}

if __name__ == "__main__":
    BACKBONE, DATA, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    for name, (n_processes, *options) in RUNS.items():
        statuses = fork_processes(n_processes, functools.partial(train, FOLDER / name, *options))
        assert statuses == [0] * n_processes, f"{name}: {statuses}"
