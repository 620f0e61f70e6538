"""What inference leaves out of the package: methods, checks, and definitions that a shorter form stands for.

The code that goes along with a checkpoint is the package's own source without these. Modules are named as in the
package. A name that is no longer there raises an error when code is written, so this list cannot grow stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ops import STRATEGIES
from .config import members_of
from .sources import Rules

# The files that the code is written to: the modules that a name begins are side by side in one of them.
FILES = {
    "checks": "backbones",
    "backbones": "backbones",
    "ops": "routing",
    "layers": "routing",
    "heads": "heads",
    "models.configuration_capsule_head": "configuration_capsule_head",
    "models": "modeling_capsule_head",
    "mixup": "modeling_capsule_head",
    "weights": "modeling_capsule_head",
    "paper.configuration_stereo_conv": "modeling_stereo_conv",
    "paper.modeling_stereo_conv": "modeling_stereo_conv",
    "paper.image_processing_stereo": "image_processing_stereo",
}
# Statements that do nothing but call a function of such a name are left out, with the function. The package checks what
# users pass; here it is checked whether a checkpoint has all weights.
CHECKS = r"_?check_(?!weights$)\w+"
WITHOUT = {
    "backbones.backbone": ["Backbone.find", "Backbone.candidates", "Backbone.probe", "Backbone.fields"],
    "heads.attentive_pooling": ["AttentivePoolingHead.credits", "AttentivePoolingOptions.__post_init__"],
    "heads.base": ["HeadOptions.__post_init__", "Head.credits"],
    "heads.ensemble": ["EnsembleOptions.__post_init__"],
    "heads.gated_routing": ["GatedRoutingHead.credits"],
    "heads.linear": ["LinearHead.credits"],
    "heads.routing": ["RoutingOptions.__post_init__", "RoutingHead.split_by_layer"],
    "heads.inputs": ["TokenHead.split_by_layer"],
    "heads.scalar_mix": ["ScalarMixHead.credits"],
    "heads.spatial_pose": ["SpatialPoseHead.split_by_layer"],
    "ops.reference": ["Reference.unserved"],
    "ops.strategy": ["Strategy.missing", "Strategy.route", "Strategy.unserved"],
    "layers": ["Routing.credits", "Routing.extra_repr"],
    "models.base": [
        "CapsuleHeadPreTrainedModel.__getstate__",
        "CapsuleHeadPreTrainedModel.__setstate__",
        "CapsuleHeadPreTrainedModel.compute_hidden_states",
        "CapsuleHeadPreTrainedModel.register_for_auto_class",
        "CapsuleHeadPreTrainedModel.resize_token_embeddings",
    ],
    "models.checkpoint": [
        "CheckpointModel.add_adapters",
        "CheckpointModel.from_backbone",
        "CheckpointModel.has_adapters",
        "CheckpointModel.names_of_frozen_backbone",
        "CheckpointModel.push_to_hub",
    ],
    "backbones.adapters": ["Adapters.of"],
    "heads.linear_term": ["LinearTerm.credits"],
    "models.configuration_capsule_head": [
        "CapsuleHeadConfig.class_names",
        "CapsuleHeadConfig.get_config_dict",
        "CapsuleHeadConfig.label_thresholds",
        "CapsuleHeadConfig.register_for_auto_class",
    ],
    "models.modeling_capsule_head": [
        "CapsuleHeadClassifier._draw_mixup",
        "CapsuleHeadClassifier._mix_inputs",
        "CapsuleHeadClassifier._targets",
        "CapsuleHeadClassifier._init_weights",
        "CapsuleHeadClassifier.freeze",
        "CapsuleHeadForImageClassification._mix_inputs",
    ],
    "paper.image_processing_stereo": [
        "StereoImageProcessor.get_image_processor_dict",
        "StereoImageProcessor.register_for_auto_class",
    ],
}
# Functions whose tests of their arguments, `if ...: raise ...`, are left out too.
UNGUARDED = {
    "backbones.states": ["unpack"],
    "backbones.windows": ["run_in_windows"],
    "heads.ensemble": ["EnsembleHead.score"],
    "layers": ["Routing.__init__", "Routing.forward"],
    "models.checkpoint": ["CheckpointModel._set_backbone", "CheckpointModel.from_pretrained"],
    "models.configuration_capsule_head": [
        "CapsuleHeadConfig.__init__",
        "CapsuleHeadConfig.backbone",
        "CapsuleHeadConfig.set_hidden_sizes",
    ],
}
INSTEAD = {
    "checks": {
        "check_hidden_sizes": '''
def check_hidden_sizes(hidden_sizes: Sequence[int], at_most: int | None = None) -> tuple[int, ...]:
    """Return the sizes of the hidden states that a head takes as a tuple."""
    return tuple(hidden_sizes)
''',
        "plain": '''
def plain(value: Any) -> Any:
    """Return a value as it is: numbers in a configuration's file are Python's own."""
    return value
''',
    },
    "backbones.adapters": {
        "Adapters.add_to": '''
    @torch.no_grad()
    def add_to(self, backbone: nn.Module) -> None:
        """Add the products to a backbone's weights."""
        layers = linear_layers(backbone)
        for name, (up, down) in self.matrices().items():
            weight: Any = layers[name].weight
            change = (up.float() @ down.float()).to(weight)
            weight.add_(change if isinstance(layers[name], nn.Linear) else change.T)
''',
    },
    "backbones.backbone": {
        "Backbone.build": '''
    def build(self, dtype: torch.dtype | str | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
        """Return the backbone with random weights, without what a head does not need. It keeps the configuration."""
        from transformers import MODEL_MAPPING, AutoModel

        if dtype is not None:
            self.config.dtype = dtype
        is_known = type(self.config) in MODEL_MAPPING
        code_kwargs = {"code_revision": self.revision} if trust_remote_code and not is_known else {}
        complete = AutoModel.from_config(self.config, trust_remote_code=trust_remote_code, **code_kwargs)
        return part_of(complete, self.part)
''',
        "Backbone.load": '''
    def load(self, *, may_differ: bool = False, **loading: Any) -> tuple[Backbone, PreTrainedModel, list[Any]]:
        """Load the backbone's weights, and say which are random, because they may have other shapes than are saved."""
        from transformers import AutoModel

        own_config, commit = load_backbone_config(self.name_or_path, self.revision, **loading)
        source = resolve_backbone(self.name_or_path)
        if hasattr(own_config, "quantization_config"):  # it says that the checkpoint itself is quantised
            self.config.quantization_config = own_config.quantization_config
        loading = {"trust_remote_code": False, "ignore_mismatched_sizes": may_differ, **loading}
        with reading_weights(source):
            complete, found = AutoModel.from_pretrained(
                source, config=self.config, revision=commit or self.revision, output_loading_info=True, **loading
            )
        module = part_of(complete, self.part)
        used = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        state_dict = complete.state_dict(keep_vars=True)
        missing = sorted(key for key in found["missing_keys"] if key in state_dict and id(state_dict[key]) in used)
        if missing:
            raise ValueError(f"{source} lacks {len(missing)} weights of the backbone, among them {missing[0]}.")
        return dataclasses.replace(self, config=complete.config), module, sorted(found["mismatched_keys"])
''',
        "Backbone.run": '''
    def run(
        self, module: PreTrainedModel, layers: Sequence[int], inputs: Inputs, *, trains: bool = False
    ) -> BackboneOutput:
        """Run the backbone on a batch, in windows where texts are longer than one."""
        with nullcontext() if trains else torch.no_grad():
            run = partial(run_backbone, module, layers, self.hidden_sizes, self.part.stack)
            return run_in_windows(run, self.windowing, inputs)
''',
    },
    "backbones.loading": {
        "load_backbone_config": '''
def load_backbone_config(
    name_or_path: str | os.PathLike[str], revision: str | None, **kwargs: Any
) -> tuple[PreTrainedConfig, str | None]:
    """Return the configuration of a backbone's checkpoint, and its commit (None for a local directory)."""
    name_or_path, trusts = resolve_backbone(name_or_path), bool(kwargs.get("trust_remote_code"))
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    commit = extract_commit_hash(cached_file(name_or_path, "config.json", revision=revision, **hub_kwargs), None)
    revision = commit or revision
    return AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trusts, **hub_kwargs), commit
''',
    },
    "backbones.running": {
        "check_hidden_states": '''
def check_hidden_states(hidden_states: Tensor | Sequence[Tensor], hidden_sizes: Sequence[int]) -> Sequence[Tensor]:
    """Return the given hidden states, `[batch, tokens, layers, hidden_size]` or one tensor per layer, per layer."""
    is_stacked = isinstance(hidden_states, Tensor) and hidden_states.ndim == 4
    return hidden_states.unbind(2) if is_stacked else hidden_states
''',
    },
    "heads.base": {
        "check_inputs": '''
def check_inputs(
    hidden_states: Sequence[Tensor], mask: Tensor | Sequence[Tensor], hidden_sizes: Sequence[int]
) -> list[Tensor]:
    """Return one mask per layer."""
    return [mask] * len(hidden_sizes) if isinstance(mask, Tensor) else list(mask)
''',
        "get_head": '''
def get_head(name: str) -> type[Head]:
    """Return the head that is registered under a name."""
    if name not in _HEADS:
        raise ValueError(f"head_type is {name!r}; expected {', '.join(_HEADS)}, or install the package capsule_heads.")
    return _HEADS[name]
''',
        "Head.make_options": '''
    @classmethod
    def make_options(cls, given: Mapping[str, Any]) -> HeadOptions:
        """Return the head's options, those that are not given at their defaults."""
        return cls.Options(**given)
''',
        "register": '''
def register(name: str) -> Callable[[AnyHead], AnyHead]:
    """Return a decorator that puts a head into the registry."""

    def add(cls: AnyHead) -> AnyHead:
        cls.name = name
        _HEADS[name] = cls
        return cls

    return add
''',
    },
    "heads.inputs": {
        "PartDetector.project": '''
    def project(self, hidden_states: Sequence[Tensor]) -> list[Tensor]:
        """Return hidden states with their layer embeddings, through the affine map."""
        offsets = self.affine(self.depth_emb)
        weight = self.affine.weight
        return [F.linear(x.to(weight.dtype), weight) + offset for x, offset in zip(hidden_states, offsets)]
''',
        "PartDetector.project_together": '''
    def project_together(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Return what `project` returns as one tensor, `[batch, tokens, n_layers, d_inp]`."""
        return torch.stack(self.project(hidden_states), dim=2)
''',
    },
    "models.base": {
        "CapsuleHeadPreTrainedModel._run": '''
    def _run(
        self, inputs: Mapping[str, Any], attention_mask: Any, hidden_states: Any, returns: Any, attends: bool | None
    ) -> tuple[BackboneOutput, tuple[Tensor, ...] | None]:
        """Compute what the head takes; and the hidden states that `forward` returns, if any."""
        if attends or not isinstance(returns, bool | None):
            raise ValueError("For attentions, or hidden states by their indices, install the package capsule_heads.")
        if hidden_states is not None:
            states = list(check_hidden_states(hidden_states, self.head.hidden_sizes))
            output = BackboneOutput(states, token_masks(attention_mask, states))
        else:
            if self.backbone is None:
                raise ValueError("This model has no backbone: pass hidden_states, or load it with load_backbone=True.")
            if sum(inputs.get(name) is not None for name in (*self.backbone_inputs, "inputs_embeds")) != 1:
                raise ValueError(f"Pass one of {', '.join(self.backbone_inputs)} (or hidden_states, instead of them).")
            given = {**inputs, "attention_mask": attention_mask}
            config = self.config
            output = config.backbone.run(self.backbone, config.layers, given, trains=self.backbone_trains)
        device = next(self.head.parameters()).device  # the head converts them to its dtype
        states, masks = [x.to(device) for x in output.states], [mask.to(device) for mask in output.masks]
        returns = self.config.output_hidden_states if returns is None else returns
        return BackboneOutput(states, masks), tuple(states) if returns else None
''',
    },
    "models.checkpoint": {
        "check_weights": '''
def check_weights(source: str | os.PathLike[str], loading_info: dict[str, Any], may_differ: bool) -> None:
    """Refuse a checkpoint that left weights random."""
    random = sorted([*loading_info["missing_keys"], *(key for key, *_ in loading_info["mismatched_keys"])])
    if random and not (may_differ and not any(key.startswith("backbone.") for key in random)):
        raise ValueError(f"{source} lacks {len(random)} weights, or has them in another shape, among them {random[0]}.")
''',
        "hidden_sizes_in_use": '''
def hidden_sizes_in_use(config: CapsuleHeadConfig) -> list[int]:
    """Return the sizes of the hidden states that the head takes."""
    return [config.hidden_sizes[layer] for layer in config.layers]
''',
        "CheckpointModel._load_backbone": '''
    def _load_backbone(
        self, source: str | os.PathLike[str], loading: dict[str, Any], may_differ: bool
    ) -> list[tuple[str, Any, Any]]:
        """Load the backbone, and return its weights that are random, by their names in the model, and their shapes."""
        backbone, module, mismatched = self.config.backbone.load(may_differ=may_differ, **loading)
        self.config.base_config = backbone.config
        if self.adapters is not None:
            self.adapters.add_to(module)
        self._set_backbone(module)
        self.post_init()  # again, now that there is a backbone: it collects the backbone's tied weights and the like
        self._refer_to_backbone(self.config.freeze_backbone and not mismatched)
        return [(f"backbone.{key}", *shapes) for key, *shapes in mismatched]
''',
        "CheckpointModel.save_pretrained": '''
    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, head_only: bool | None = None, **kwargs: Any
    ) -> None:
        """Save as in transformers; the backbone too, unless its weights are, unchanged, those that the head refers to.

        With `head_only=False` it is saved in any case.
        """
        refers = self.config.head_only
        if refers and self.backbone is not None:
            refers = same_weights(self.backbone, self._weights_as_loaded)
        if (head_only and not refers) or (head_only is False and self.backbone is None):
            raise ValueError(f"head_only is {head_only}, and the weights of the backbone would be lost; leave it out.")
        self._refer_to_backbone(refers if head_only is None else head_only)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._refer_to_backbone(refers)
''',
    },
    "models.configuration_capsule_head": {
        "_resolve_layers": """
def _resolve_layers(layers: list[int] | None, n_hidden_states: int) -> list[int]:
    return sorted(layer % n_hidden_states for layer in (range(n_hidden_states) if layers is None else layers))
""",
        "_as_config": """
def _as_config(base_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    if base_config is None or isinstance(base_config, PreTrainedConfig):
        return base_config
    base_config = dict(base_config)
    model_type = base_config.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"The backbone is of a type that comes with code of its own, {model_type}. If you trust its repository, "
            "pass trust_backbone_code=True to from_pretrained; trust_remote_code is not about it."
        )
    return AutoConfig.for_model(model_type, **base_config)
""",
        "_checked_adapters": """
def _checked_adapters(adapters: Any) -> dict[str, list[int]] | None:
    return adapters
""",
        "_named_classes": """
def _named_classes(given: Mapping[str, Any]) -> dict[str, Any]:
    return {}  # config.json has the names of classes both ways
""",
        "CapsuleHeadConfig._set_options": """
    def _set_options(self, options: HeadOptions) -> None:
        for name, value in options.as_dict().items():
            setattr(self, name, value)
""",
    },
    "models.modeling_capsule_head": {
        "CapsuleHeadClassifier._classify": '''
    def _classify(
        self,
        inputs: dict[str, Tensor | bool | None],
        attention_mask: Tensor | None,
        labels: Tensor | None,
        hidden_states: Tensor | Sequence[Tensor] | None,
        *,
        output_hidden_states: bool | None = None,
        output_capsules: bool | None = None,
        output_routing: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,  # can_return_tuple has read it
    ) -> CapsuleHeadClassifierOutput:
        """Compute class scores: what `forward` of every modality does."""
        if labels is not None:
            raise ValueError("labels were passed; expected none: for a loss, install the package capsule_heads.")
        output, returned = self._run(inputs, attention_mask, hidden_states, output_hidden_states, output_attentions)
        capsules: HeadOutput = self.head(output.states, output.masks, bool(output_routing))
        linear = None if self.linear_term is None else self.linear_term(output.states, output.masks)
        return CapsuleHeadClassifierOutput(
            logits=self._logits(capsules, linear),
            hidden_states=returned,
            poses=capsules.mu_out if output_capsules else None,
            variances=capsules.sig2_out if output_capsules else None,
            routing_probabilities=capsules.routing_probabilities,
        )
''',
    },
    "ops.routing": {
        "STRATEGIES": "# Names in configurations, all of which mean the literal loop here.\n"
        f"STRATEGIES = ({', '.join(f'{chr(34)}{name}{chr(34)}' for name in STRATEGIES)})",
        "route": '''
def route(
    a_inp: Tensor,
    mu_inp: Tensor,
    W: Tensor,
    B: Tensor,
    beta_use: Tensor,
    beta_ign: Tensor,
    *,
    n_out: int,
    n_iters: int = 3,
    p_model: str = "gaussian",
    eps: float = 1e-5,
    return_R: bool = False,
    strategy: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, ...]:
    """Route by the literal loop, in float32 or wider, whatever the strategy: all compute the same function.

    The fast strategies, and inputs split over a group of processes, need the package capsule_heads.
    """
    if group is not None:
        raise ValueError("A group was passed; expected None: to split inputs, install the package capsule_heads.")
    tensors = (a_inp, mu_inp, W, B, beta_use, beta_ign)
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    with torch.autocast(a_inp.device.type, enabled=False):
        a_out, mu_out, sig2_out, R = Reference().route(
            *(tensor.to(dtype) for tensor in tensors),
            n_out=n_out,
            n_iters=n_iters,
            p_model=p_model,
            eps=eps,
            return_R=return_R,
        )
    return (a_out, mu_out, sig2_out) if R is None else (a_out, mu_out, sig2_out, R)
''',
    },
}

# The class that a checkpoint needs where its configuration sets a field, and the methods that make one, by module.
IF_SET: dict[str, tuple[str, str, dict[str, list[str]]]] = {
    "adapters": ("backbones.adapters", "Adapters", {}),
    "linear_term": (
        "heads.linear_term",
        "LinearTerm",
        {"models.modeling_capsule_head": ["CapsuleHeadClassifier.add_linear_term"]},
    ),
}
# Instead of `Backbone.run`, where a configuration has no windows.
RUN_WITHOUT_WINDOWS = '''
    def run(
        self, module: PreTrainedModel, layers: Sequence[int], inputs: Inputs, *, trains: bool = False
    ) -> BackboneOutput:
        """Run the backbone on a batch."""
        with nullcontext() if trains else torch.no_grad():
            return run_backbone(module, layers, self.hidden_sizes, self.part.stack, **inputs)
'''


def rules_for(config: Mapping[str, Any]) -> Rules:
    """Return the rules for the code of a checkpoint.

    Args:
        config: its configuration.
    """
    without: dict[str, list[str]] = dict(WITHOUT)
    instead: dict[str, dict[str, str]] = dict(INSTEAD)
    for field, (module, name, makers) in IF_SET.items():
        if not config.get(field):
            without |= {other: [*without.get(other, ()), *methods] for other, methods in makers.items()}
        if not any(part.get(field) for part in (config, *members_of(config))):
            without[module] = []
            instead[module] = {name: f'class {name}(nn.Module):\n    """What a checkpoint with {field} has."""'}
    unguarded = UNGUARDED
    if config.get("window_length") is None:
        instead["backbones.backbone"] = {**INSTEAD["backbones.backbone"], "Backbone.run": RUN_WITHOUT_WINDOWS}
        unguarded = {module: names for module, names in UNGUARDED.items() if module != "backbones.windows"}
    return Rules(FILES, CHECKS, unguarded, without, instead)
