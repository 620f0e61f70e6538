"""The configuration of capsule-head models."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from ..backbones.backbone import Backbone
from ..backbones.loading import CAPSULE_HEAD, MOST_LABELS, check_fields, check_model_type, not_found
from ..backbones.parts import Part, Windowing, check_part, tower_config
from ..checks import check_dtype, check_hidden_sizes, check_size, is_number, plain, shown
from ..heads import DEFAULT_HEAD, HeadOptions, get_head, registered_heads
from ..hub import refuse_auto_class

NAMES_OF_CLASSES = ("id2label", "label2id")
CALIBRATION = ("calibration_temperature", "thresholds")
DEFAULT_THRESHOLD = 0.5  # the probability above which a multi-label model predicts a label
BALANCED = "balanced"  # class weights in inverse proportion to the classes' numbers
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


class CapsuleHeadConfig(PreTrainedConfig):
    """Configuration of a routing-capsule head on a backbone's hidden states.

    Usually built by `from_backbone`. Without `base_config` it can be printed, saved and loaded, but no model can be
    built of it. Beyond the arguments below it takes those of `PreTrainedConfig`, such as `num_labels`, `id2label` and
    `problem_type`. `num_labels=1` without a `problem_type` means regression, as in transformers.

    Args:
        base_config: the backbone's own configuration, an object or a dict with its `model_type`.
        base_model_name_or_path: where the backbone's pretrained weights are from; None if it was not pretrained.
        base_model_revision: the commit they are of, where they are from the Hub.
        head_only: whether `save_pretrained` leaves the backbone out by default, because its weights are, unchanged,
            those of `base_model_name_or_path`. Kept by the model; not an option to set by hand.
        freeze_backbone: whether the backbone is frozen: no gradients, no dropout. Adapters of PEFT in it train anyway.
        stack: of an encoder-decoder, whose hidden states to use: "encoder" (its decoder is left out), or "decoder".
        tower: of a model of several towers without a class of its own for one, which of them is the backbone: "text",
            "vision" or "audio"; None for the complete model.
        window_length: tokens of a text, special ones included, that the backbone runs on at a time. A longer text is
            cut into overlapping windows, and each of its tokens is routed once, with its hidden states from the window
            whose middle is nearer. None to run on complete texts, whatever their length. `capsule_heads.data` has
            `window_fields`, which gives these three for a tokenizer.
        window_overlap: tokens that neighbouring windows share, special ones aside.
        window_special_tokens: how many special tokens the tokenizer puts before and after every text. Every window has
            them; they too are routed once, those before from the first window, those after from the last.
        hidden_sizes: size of each hidden state that the backbone yields, the embedding output included.
            `from_backbone` finds them, by running the backbone once. None until a model is built, which finds them too.
        head_type: the head's name in the registry, `capsule_heads.heads.registered_heads`. "token_depth" is the paper's
            text head, on all tokens at several layers; "spatial_pose" is its vision head, on the poses that it computes
            at every position of one feature map. The controls have no capsules: "linear" on one hidden state,
            "scalar_mix" on a learned mix of several, "attentive_pooling", "gated_routing" and "vector_routing"
            (Heinsen, 2022) on what "token_depth" takes. "ensemble_of_heads" is several trained heads, put into one by
            `capsule_heads.make_ensemble`. A head of your own has the name that it was registered under.
        layers: indices of the hidden states to use, 0 being the embedding output; negative ones count from the end.
            None for all, or for the last where the head takes one. They are kept resolved, ascending and not negative,
            once `hidden_sizes` are known.
        linear_term: whether there is a `LinearTerm` beside the head. None for what `CapsuleTrainer` chooses when
            it trains; a model that it did not train has none then.
        mixup_alpha: of the Beta distribution of mixup's ratios in training; 0 for none. The paper's is 0.2, with which
            this package measured less accuracy: docs/benchmarks/heads.md. `PAPER` has it by name.
        class_weights: weight of each class in the loss; "balanced" for weights that `CapsuleTrainer` makes of the
            training labels, in inverse proportion to the classes' numbers; None for equal ones. Not for regression.
        adapters: of each linear layer of the backbone whose weights adapters were added to (`training.adapt`), its
            outputs, the adapter's rank, and its inputs. Kept by the model; not an option to set by hand.
        label_mean: of the labels in a regression's training set: the value that the head starts from.
        label_std: of those labels: the unit of the head's own output, and of the loss. Regression only.
        calibration_temperature: what the logits of a classifier are divided by in evaluation mode, so that its
            probabilities are those of being right. `capsule_heads.training.calibration` fits it on a validation split.
            Training is without it. Not for regression. (`temperature` is a parameter of generation in transformers.)
        thresholds: for each label of a multi-label model, the probability above which it is predicted. None for 0.5.
        **kwargs: the options of the head, such as `n_parts=64` (`get_head(head_type).Options` has them all, each is
            then an attribute of the configuration), and arguments of `PreTrainedConfig`.

    Raises:
        ValueError: If a field is not what is expected, or an option belongs to another head.
    """

    model_type = CAPSULE_HEAD
    sub_configs = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = ["poses", "variances", "routing_probabilities", "hidden_states", "attentions"]

    def __init__(
        self,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        head_only: bool = False,
        freeze_backbone: bool = True,
        stack: str = "encoder",
        tower: str | None = None,
        window_length: int | None = None,
        window_overlap: int = 0,
        window_special_tokens: Sequence[int] = (0, 0),
        hidden_sizes: list[int] | None = None,
        head_type: str = DEFAULT_HEAD,
        layers: list[int] | None = None,
        linear_term: bool | None = None,
        mixup_alpha: float = 0.0,
        class_weights: Sequence[float] | str | None = None,
        adapters: dict[str, list[int]] | None = None,
        label_mean: float = 0.0,
        label_std: float = 1.0,
        calibration_temperature: float = 1.0,
        thresholds: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        head = get_head(head_type)
        kwargs = plain(kwargs)
        given = {name: kwargs.pop(name) for name in head.Options.names() if name in kwargs}
        _check_keys(kwargs, head_type)
        check_not_quantised(kwargs.get("quantization_config"))
        check_dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))
        self.base_config: PreTrainedConfig = _as_config(base_config)  # type: ignore[assignment]  # None: no model yet
        for name, value in (
            ("base_model_name_or_path", base_model_name_or_path),
            ("base_model_revision", base_model_revision),
        ):
            if not isinstance(value, str | None):
                raise ValueError(f"{name} is {shown(value)}; expected a string, or None.")
        for name, flag in (
            ("head_only", head_only),
            ("freeze_backbone", freeze_backbone),
        ):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {shown(flag)}; expected True or False.")
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.head_only = head_only
        self.freeze_backbone = freeze_backbone
        if self.base_config is not None:
            check_part(Part(stack, tower), self.base_config)
        self.stack, self.tower = stack, tower
        self.window_length, self.window_overlap = plain(window_length), plain(window_overlap)
        self.window_special_tokens = list(plain(window_special_tokens))
        self._check_windows()
        if not isinstance(linear_term, bool | None):
            raise ValueError(f"linear_term is {shown(linear_term)}; expected True, False or None.")
        if linear_term and head.made_by is not None:
            raise ValueError(
                f'linear_term is True, and the scores of head_type="{head_type}" are those of several heads, each with '
                "or without a linear term of its own; leave it out."
            )
        self.linear_term = linear_term
        self.head_type = head_type
        self.hidden_sizes: list[int] = None  # type: ignore[assignment]  # until a model is built
        self.layers: list[int] = plain(layers)  # as it was given, until then
        if hidden_sizes is not None:
            self.set_hidden_sizes(hidden_sizes)
        self._set_options(head.make_options(given))
        self.mixup_alpha = plain(mixup_alpha)
        if not is_number(self.mixup_alpha) or self.mixup_alpha < 0:
            raise ValueError(f"mixup_alpha is {shown(mixup_alpha)}; expected a number, 0 (no mixup) or more.")
        self.class_weights = plain(class_weights)
        self.adapters = _checked_adapters(plain(adapters))
        self.label_mean, self.label_std = plain(label_mean), plain(label_std)
        self.calibration_temperature, self.thresholds = plain(calibration_temperature), plain(thresholds)
        kwargs |= _named_classes(kwargs)
        # transformers hands these down to the backbone's configuration: where none is given, keep what it has.
        if self.base_config is not None:
            kwargs["attn_implementation"] = kwargs.get("attn_implementation") or self.base_config._attn_implementation
        kwargs["experts_implementation"] = kwargs.get("experts_implementation") or {}
        super().__init__(**kwargs)
        if self.problem_type is None and self.num_labels == 1:
            self.problem_type = "regression"
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type is {shown(self.problem_type)}; expected one of {', '.join(PROBLEM_TYPES)}.")
        self._check_labels()
        self._check_calibration()

    def set_hidden_sizes(self, hidden_sizes: Sequence[int]) -> None:
        """Set the size of each hidden state of the backbone, and resolve `layers` by their number.

        Raises:
            ValueError: If the sizes are not positive whole numbers, or there are no such layers.
        """
        takes_one_layer = get_head(self.head_type).takes_one_layer
        layers = [-1] if self.layers is None and takes_one_layer else self.layers
        self.hidden_sizes = list(check_hidden_sizes(plain(hidden_sizes)))
        self.layers = _resolve_layers(layers, len(hidden_sizes))
        if takes_one_layer and len(self.layers) > 1:
            raise ValueError(f'layers is {layers}; head_type="{self.head_type}" takes one hidden state.')

    def _set_options(self, options: HeadOptions) -> None:
        taken = {*inspect.signature(CapsuleHeadConfig.__init__).parameters, *dir(PreTrainedConfig), *vars(self)}
        for name, value in options.as_dict().items():
            if name in taken:
                raise ValueError(
                    f'The option {name} of head_type="{self.head_type}" has the name of a field of CapsuleHeadConfig; '
                    "rename the option."
                )
            setattr(self, name, value)

    @property
    def head_options(self) -> HeadOptions:
        """The options of the head."""
        head = get_head(self.head_type)
        return head.make_options({name: getattr(self, name) for name in head.Options.names()})

    def _check_windows(self) -> None:
        length, n_special, overlap = self.window_length, sum(self.window_special_tokens), self.window_overlap
        if length is not None and (overlap < 0 or length <= n_special + overlap):
            raise ValueError(
                f"window_length is {length} and window_overlap {overlap}; expected an overlap of 0 or more, and "
                f"windows longer than it and the {n_special} special tokens of each together."
            )

    def _check_labels(self) -> None:
        if not is_number(self.label_mean):
            raise ValueError(f"label_mean is {shown(self.label_mean)}; expected a number.")
        if not is_number(self.label_std) or self.label_std <= 0:
            raise ValueError(f"label_std is {shown(self.label_std)}; expected a positive number.")
        weights = self.class_weights
        if weights is None:
            return
        if self.problem_type == "regression":
            raise ValueError("class_weights were given for a regression, which has no classes; leave them out.")
        if weights == BALANCED:
            if self.problem_type == "multi_label_classification":
                raise ValueError(
                    f'class_weights is "{BALANCED}", which is for classes of which an input has one; expected a number '
                    "for each label of a multi-label problem."
                )
            return
        are_weights = isinstance(weights, list | tuple) and all(is_number(weight) and weight >= 0 for weight in weights)
        if not are_weights or len(weights) != self.num_labels or sum(weights) == 0:
            raise ValueError(
                f"class_weights is {shown(weights)}; expected {self.num_labels} numbers, one per label, 0 or more, not "
                f'all 0, or "{BALANCED}".'
            )

    def _check_calibration(self) -> None:
        temperature, thresholds = self.calibration_temperature, self.thresholds
        if not is_number(temperature) or temperature <= 0:
            raise ValueError(f"calibration_temperature is {shown(temperature)}; expected a positive number.")
        if temperature != 1 and self.problem_type == "regression":
            raise ValueError(
                f"calibration_temperature is {temperature}, and a regression has no probabilities; leave it out, or "
                "set it to 1."
            )
        if thresholds is None:
            return
        if self.problem_type != "multi_label_classification":
            raise ValueError(
                f"thresholds is {shown(thresholds)}, which is for multi-label models, and problem_type is "
                f"{self.problem_type!r}; leave it out."
            )
        is_list = isinstance(thresholds, list | tuple) and len(thresholds) == self.num_labels
        if not is_list or not all(is_number(x) and 0 <= x < 1 for x in thresholds):
            raise ValueError(
                f"thresholds is {shown(thresholds)}; expected {self.num_labels} probabilities, one per label, from 0 "
                "up to but not including 1."
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json as in transformers, which takes a file that is missing or holds no keys for an empty one.

        Raises:
            OSError: If the file is missing, or holds no keys.
            ValueError: If it is of another kind of model.
        """
        source = pretrained_model_name_or_path
        try:
            config_dict, kwargs = super().get_config_dict(source, **kwargs)
        except OSError as error:
            raise OSError(not_found(source, error)) from error
        except (AttributeError, RecursionError, TypeError):  # of a list, or the like
            config_dict = {}
        if not isinstance(config_dict, dict) or not config_dict:
            raise OSError(f"{source} has no config.json with keys and values; expected what save_pretrained wrote.")
        check_model_type(config_dict, source)  # from_pretrained would only warn
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> CapsuleHeadConfig:
        """Build a configuration as in transformers, but check the kind of model, and fields given as keywords.

        Args:
            config_dict: the fields.
            **kwargs: fields to change, and `trust_backbone_code=True` to run code that comes with the backbone.

        Raises:
            ValueError: If the dict is of another kind of model, or of a backbone with code of its own that is not
                trusted.
        """
        check_model_type(config_dict, "This configuration")
        if kwargs.get("trust_backbone_code"):  # left there for the model
            config_dict = {**config_dict, "base_config": _with_code_of_the_backbone(config_dict)}
        # transformers would set them on the finished configuration, past the checks, and layers unresolved.
        fields = inspect.signature(cls.__init__).parameters.keys() - {"base_config"} | {"problem_type"} | option_names()
        fields |= {"num_labels", *NAMES_OF_CLASSES}
        overrides = {name: kwargs.pop(name) for name in fields & kwargs.keys()}
        other_number = overrides.get("num_labels") not in (None, len(config_dict.get("id2label") or {}))
        if other_number or overrides.keys() & {*NAMES_OF_CLASSES}:  # the names in the file are of other classes
            config_dict = {name: value for name, value in config_dict.items() if name not in NAMES_OF_CLASSES}
        if other_number:  # their scores will be others
            config_dict = {name: value for name, value in config_dict.items() if name not in CALIBRATION}
        if overrides.get("head_type") not in (None, config_dict.get("head_type")):  # its options are of another head
            config_dict = {name: value for name, value in config_dict.items() if name not in option_names()}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: object = None) -> NoReturn:
        """Refuse; see `hub.refuse_auto_class`."""
        refuse_auto_class(cls)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of their indices."""
        return [name for _, name in sorted((self.id2label or {}).items())]

    @property
    def label_thresholds(self) -> list[float]:
        """The probability above which a multi-label model predicts each label."""
        return [DEFAULT_THRESHOLD] * (self.num_labels or 0) if self.thresholds is None else list(self.thresholds)

    @property
    def backbone(self) -> Backbone:
        """The backbone that the fields describe.

        Raises:
            ValueError: If the configuration has no backbone.
        """
        if self.base_config is None:
            raise ValueError(_expected_base_config(None))
        return Backbone(
            self.base_config,
            self.base_model_name_or_path,
            self.base_model_revision,
            Part(self.stack, self.tower),
            self.windowing,
            tuple(self.hidden_sizes or ()),
        )

    @property
    def windowing(self) -> Windowing | None:
        """The windows that texts are cut into; None if they are not."""
        if self.window_length is None:
            return None
        return Windowing(self.window_length, self.window_overlap, *self.window_special_tokens)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the backbone's text configuration, which has the vocabulary size, the hidden size and the like."""
        if self.base_config is None:
            return super().get_text_config(decoder=decoder, encoder=encoder)
        tower = tower_config(self.base_config, "text") if self.tower == "text" else None
        if tower is not None:
            return tower
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)


def check_not_quantised(quantization_config: object) -> None:
    """Refuse a quantisation of a model with its head.

    Raises:
        ValueError: If there is one.
    """
    if quantization_config is not None:
        raise ValueError(
            f"quantization_config of the model is {shown(quantization_config)}, and a head is never quantised; "
            "expected it in base_config, or as an argument of from_backbone or from_pretrained, for the backbone alone."
        )


def label_fields(names: Sequence[str]) -> dict[str, dict[Any, Any]]:
    """Return the fields of a configuration that name its classes, from their names in order."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def _with_code_of_the_backbone(config_dict: dict[str, Any]) -> PreTrainedConfig | dict[str, Any] | None:
    """Return the backbone's configuration, of a class that comes with the backbone if it has one.

    What code that is, the backbone's own repository says: not the checkpoint of the head.
    """
    base_config, name = config_dict.get("base_config"), config_dict.get("base_model_name_or_path")
    if base_config is None or "auto_map" not in base_config or name is None:
        return base_config
    own = AutoConfig.from_pretrained(name, revision=config_dict.get("base_model_revision"), trust_remote_code=True)
    auto_map = getattr(own, "auto_map", {})
    return type(own).from_dict({**base_config, "auto_map": auto_map}, name_or_path=name)


def option_names() -> set[str]:
    """Return the names of the options of all registered heads."""
    return {name for head in registered_heads().values() for name in head.Options.names()}


def _check_keys(kwargs: Mapping[str, Any], head_type: str) -> None:
    """Refuse options of other heads, and what is almost a field.

    All other keys transformers keeps, and has to: its Trainer and others add keys.
    """
    own = get_head(head_type).Options.names()
    fields = [*inspect.signature(CapsuleHeadConfig.__init__).parameters, *own]
    for name in kwargs:
        if name in option_names():
            raise ValueError(
                f'{name} is {shown(kwargs[name])}, and head_type="{head_type}" has no such option; expected one of '
                f"{', '.join(own) or 'no options'}, or another head_type."
            )
        for field in difflib.get_close_matches(name, fields, n=1, cutoff=0.8):
            raise ValueError(f"A CapsuleHeadConfig has no {name}; expected {field}, perhaps, or nothing by that name.")


def _named_classes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `id2label` and `label2id` where one of them was given: each has the names of the other.

    Raises:
        ValueError: If names are missing, stand twice, or differ between the two, or their number is not `num_labels`.
    """
    num_labels, id2label, label2id = (given.get(name) for name in ("num_labels", *NAMES_OF_CLASSES))
    if num_labels is not None:
        check_size("num_labels", num_labels)
        if num_labels > MOST_LABELS:
            raise ValueError(f"num_labels is {shown(num_labels)}; expected at most {MOST_LABELS:,}.")
    if id2label is None and label2id is None:
        return {}
    for name, classes in (("id2label", id2label), ("label2id", label2id)):
        indices: list[Any] = []
        if isinstance(classes, dict):
            indices = list(classes if name == "id2label" else classes.values())
        if classes is not None and (not indices or {str(x) for x in indices} != {str(x) for x in range(len(indices))}):
            raise ValueError(f"{name} is {shown(classes)}; expected the name of each class by its index, from 0 on.")
    by_index = {int(index): str(name) for index, name in (id2label or {}).items()}
    by_name = {str(name): int(index) for name, index in (label2id or {}).items()}
    by_index = by_index or {index: name for name, index in by_name.items()}
    expected = {name: index for index, name in by_index.items()}
    if by_name not in ({}, expected) or len(expected) != len(by_index):
        raise ValueError(
            f"id2label is {shown(id2label)} and label2id is {shown(label2id)}; expected the same names with the same "
            "indices in both, no name twice: give one of them, and the other follows."
        )
    if num_labels not in (None, len(by_index)):
        raise ValueError(
            f"num_labels is {num_labels}, and {len(by_index)} classes have names; expected as many, or leave "
            "num_labels out."
        )
    return {"id2label": dict(sorted(by_index.items())), "label2id": dict(sorted(expected.items(), key=lambda x: x[1]))}


def _checked_adapters(adapters: Any) -> dict[str, list[int]] | None:
    shapes = adapters.values() if isinstance(adapters, dict) else [None]
    if adapters is not None and not all(isinstance(shape, list | tuple) and len(shape) == 3 for shape in shapes):
        raise ValueError(f"adapters is {shown(adapters)}; expected three sizes by name of a linear layer, or None.")
    for name, shape in (adapters or {}).items():
        for size in shape:
            check_size(f"a size in adapters[{name!r}]", size)
    return adapters


def _expected_base_config(found: object) -> str:
    return (
        f"base_config is {shown(found)}; expected the backbone's configuration, an object such as "
        "AutoConfig.from_pretrained(name) or a dict with its model_type. CapsuleHeadForSequenceClassification"
        ".from_backbone(name, num_labels=n) builds it for you."
    )


def _as_config(base_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    if base_config is None or isinstance(base_config, PreTrainedConfig):
        return base_config
    if not isinstance(base_config, dict) or not isinstance(base_config.get("model_type"), str):
        raise ValueError(_expected_base_config(base_config))
    base_config = dict(base_config)
    model_type = base_config.pop("model_type")
    if "auto_map" in base_config and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"The backbone is of a type that comes with code of its own, {model_type}. If you trust its repository, "
            "pass trust_backbone_code=True to from_pretrained; trust_remote_code is not about it."
        )
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"base_config has the model_type {model_type!r}; expected one that transformers knows.")
    check_fields(base_config, "base_config")
    try:
        config = AutoConfig.for_model(model_type, **base_config)
    except Exception as error:  # transformers checks types with exceptions of its own, and reads what it does not check
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"base_config is no configuration of type {model_type} ({reason}).") from error
    check_dtype(config.dtype)
    return config


def _resolve_layers(layers: list[int] | None, n_hidden_states: int) -> list[int]:
    if layers is None:
        return list(range(n_hidden_states))
    if (
        not isinstance(layers, list | tuple)
        or not layers
        or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers)
    ):
        raise ValueError(f"layers is {shown(layers)}; expected a list of whole numbers, or None for all hidden states.")
    if any(not -n_hidden_states <= layer < n_hidden_states for layer in layers):
        raise ValueError(
            f"layers is {layers}; the backbone has {n_hidden_states} hidden states, so expected numbers from "
            f"{-n_hidden_states} to {n_hidden_states - 1}."
        )
    resolved = sorted({layer % n_hidden_states for layer in layers})
    if len(resolved) != len(layers):
        raise ValueError(f"layers is {layers}, which names a hidden state more than once; name each one once.")
    return resolved


AutoConfig.register(CapsuleHeadConfig.model_type, CapsuleHeadConfig, exist_ok=True)
