"""What processes run that speak to a hub on loopback; each prints JSON at its end."""

# What both ends of a transfer run first: inputs, and logits to compare.
COMMON = """
import json, os, sys
import torch

IDS = torch.arange(3, 24).view(3, 7)
PIXELS = torch.rand(2, 2, 16, 16, generator=torch.Generator().manual_seed(1))

@torch.no_grad()
def logits(model):
    return model(**({"pixel_values": PIXELS} if "Image" in type(model).__name__ else {"input_ids": IDS})).logits

def close(found, expected):
    return torch.allclose(found, expected, rtol=0, atol=1e-5)
"""

# A process in which the package is not installed.
WITHOUT_PACKAGE = """
import sys

class NotInstalled:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "capsule_heads":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled)
"""

PUSH = """
from huggingface_hub import HfApi
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast
from capsule_heads import CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification
from capsule_heads.paper.configuration_stereo_conv import StereoConvConfig
from capsule_heads.paper.image_processing_stereo import StereoImageProcessor

def shake(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return module

words = ["[PAD]", "[UNK]", "[SEP]", "worth", "every", "minute", "of", "the", "queue", "."]
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")),
    pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", model_max_length=32,
)
tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
torch.manual_seed(0)
backbone = AutoModel.from_config(BertConfig(vocab_size=32, max_position_embeddings=32, **sizes))
backbone.push_to_hub("me/backbone")
tokenizer.push_to_hub("me/backbone")
head = {"d_inp": 8, "n_parts": 6, "id2label": {0: "poor", 1: "fine"}}
model = CapsuleHeadForSequenceClassification.from_backbone("me/backbone", **head)
shake(backbone, 1).push_to_hub("me/backbone")  # the branch moves on
glue = {"name": "GLUE sst2", "repository": "nyu-mll/glue", "config": "sst2"}
results = {"task": "sst2", "dataset": glue, "seed": 3, "steps": 40, "validation_accuracy": 0.75, "validation_loss": 0.5}
expected = {}

def push(name, model, **options):
    model.push_to_hub(f"me/{name}", **options)
    expected[name] = logits(model.eval())

shake(model.head, 2)
push("head", model, processor=tokenizer, include_code=True)
expected["first"] = expected["head"]
HfApi().create_tag("me/head", tag="v1")
shake(model.head, 3)
push("head", model, processor=tokenizer, include_code=True, results=results, license="mit")
push("whole", model, head_only=False, include_code=True)
push("secret", model, private=True, processor=tokenizer)
pictures = CapsuleHeadForImageClassification.from_backbone(
    StereoConvConfig(image_size=16, hidden_sizes=[8, 8], strides=[2, 2]),
    head_type="spatial_pose", freeze_backbone=False, num_labels=3, n_parts=4,
)
push("pictures", shake(pictures, 4), processor=StereoImageProcessor(16), include_code=True)
torch.save(expected, sys.argv[1])
print(json.dumps(True))
"""
