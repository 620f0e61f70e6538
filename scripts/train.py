"""Trains a capsule head: `python scripts/train.py configs/quickstart.yaml [--option value ...]`.

Also under `accelerate launch`. Writes the model, its tokenizer and `results.json` to the run's output_dir.
"""

import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # has an evaluate.py

import json
import time

from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, set_seed

from capsule_heads import CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.cli.options import fail, parse_config_and_options
from capsule_heads.data.hidden_states import CapsuleCollator, HiddenStateCache
from capsule_heads.files import write_json
from capsule_heads.training.arguments import describe_arguments
from capsule_heads.training.checkpoints import resolve_checkpoint
from capsule_heads.training.experiment import (
    DataArguments,
    ModelArguments,
    build_model,
    check_best_metric,
    check_cache_options,
    compute_metrics_of,
    evaluation_splits,
    load_processor,
    load_task,
    prepare,
    windows_for,
)


def main() -> None:
    data, model_arguments, arguments = parse_config_and_options(
        (DataArguments, ModelArguments, CapsuleTrainingArguments), sys.argv[1:], __doc__
    )
    set_seed(arguments.seed)
    patience = data.early_stopping_patience
    try:
        if patience and not arguments.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end.")
        check_cache_options(data, arguments.dataloader_num_workers)
        checkpoint = resolve_checkpoint(arguments.resume_from_checkpoint, arguments.output_dir)
        with arguments.main_process_first():
            datasets = load_task(data.task, data.source, data.phrases)
            processor = load_processor(
                data.task, model_arguments.backbone, model_arguments.backbone_revision, data.pad_token
            )
            model = build_model(model_arguments, datasets["train"], **windows_for(data, processor))
            prepared = prepare(datasets, processor, data.max_length, model.config.windowing is not None)
            train = prepared["train"]
        validation = {name: prepared[name] for name in evaluation_splits(datasets, "validation")}
        check_best_metric(arguments.metric_for_best_model, data.task, validation)
        if data.cache_hidden_states:  # the processes see to it among themselves
            train = HiddenStateCache(train, model.to(arguments.device), processor)
            if data.cache_on_device:
                train.to(arguments.device)
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)

    is_text = isinstance(processor, PreTrainedTokenizerBase)
    try:
        trainer = CapsuleTrainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation if len(validation) > 1 else next(iter(validation.values())),
            processing_class=processor,
            data_collator=CapsuleCollator(processor) if is_text else None,
            compute_metrics=compute_metrics_of(data.task),
            callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        )
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - start
        trainer.save_model()
    except (FloatingPointError, OSError, ValueError) as error:  # numbers not finite, no place to write, inputs
        fail(error)
    trainer.remove_callback(EarlyStoppingCallback)  # it warns of an evaluation under another name than "eval"

    results = {
        "task": data.task,
        "backbone": model_arguments.backbone,
        "freeze_backbone": model_arguments.freeze_backbone,
        "head_type": model_arguments.head_type,
        "head_options": model_arguments.head_options,
        "seed": arguments.seed,
        "steps": trainer.state.global_step,
        "training_seconds": seconds,
        "trained_parameters": model.num_parameters(only_trainable=True),
        "training_arguments": describe_arguments(arguments),
    }
    for name in [*validation, *evaluation_splits(datasets, "test")]:
        results |= trainer.evaluate(prepared[name], metric_key_prefix=name)
    if trainer.is_world_process_zero():
        write_json(Path(arguments.output_dir, "results.json"), results)
        print(json.dumps(results, indent=2))
    if arguments.push_to_hub:  # again: the card now has the results
        trainer.push_to_hub(results=results)
    trainer.accelerator.end_training()  # NCCL warns of a process group that is left open
    if arguments.world_size > 1:
        time.sleep(1)  # a thread of gloo's may need Python when it is gone, and would abort the process


if __name__ == "__main__":
    main()
