"""The interface of a head, and the registry of all heads.

A head is one file: a subclass of `Head` with its options, put into the registry by `register`. The configuration,
command line, model card, results and explanations read what a head declares, so no other file names the head.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args, get_type_hints

from torch import Tensor, nn

from ..checks import check_choice, check_hidden_sizes, check_size, plain, shown

DEFAULT_HEAD = "token_depth"  # the paper's text head
Mix = Callable[[Tensor], Tensor]  # mixes the samples of a batch, `[batch, ...]` to the same shape


class HeadOutput(NamedTuple):
    """The output of a head.

    Attributes:
        a_out: `[batch, n_out]`, scores of the outputs, as logits.
        mu_out: `[batch, n_out, d_cov, d_cap]`, poses of the output capsules (means); None for a head without capsules.
        sig2_out: `[batch, n_out, d_cov, d_cap]`, variances of the votes for these capsules; None for a head without
            capsules.
        routing_probabilities: `[batch, n_inp, n_out]` per routing; None unless requested.
    """

    a_out: Tensor
    mu_out: Tensor | None = None
    sig2_out: Tensor | None = None
    routing_probabilities: tuple[Tensor, ...] | None = None


def option(default: Any, help: str, *, choices: Sequence[str] | None = None, describes: bool = True) -> Any:
    """Return a field of a head's options.

    Args:
        default: the value of an option that is not given.
        help: a noun phrase that says what the option is, for `--help` and the documentation.
        choices: the allowed words, for an option whose value is one of several words.
        describes: whether the option tells two heads apart, on a model card and in a table of results. False for an
            option that changes how a head computes its scores, but not the scores.
    """
    metadata = {"help": help, "describes": describes} | ({"choices": tuple(choices)} if choices else {})
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class HeadOptions:
    """The options of a head: a subclass has one field per option, made by `option`.

    The annotation of a field decides how its value is checked. An `int` has to be a positive whole number, a `bool`
    True or False, and a field with `choices` one of them. A subclass checks more in its own `__post_init__`.

    Raises:
        ValueError: If a value is not what its field expects.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, kinds = plain(getattr(self, field.name)), get_args(hints[field.name]) or (hints[field.name],)
            object.__setattr__(self, field.name, value)  # the class is frozen
            if value is None and type(None) in kinds:
                continue
            if "choices" in field.metadata:
                check_choice(field.name, value, field.metadata["choices"])
            elif bool in kinds:
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name} is {shown(value)}; expected True or False.")
            elif int in kinds:
                check_size(field.name, value)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the options."""
        return [field.name for field in dataclasses.fields(cls)]

    def as_dict(self) -> dict[str, Any]:
        """Return the options by name."""
        return {name: getattr(self, name) for name in self.names()}


class Head(nn.Module, abc.ABC):
    """A module that turns hidden states into class scores.

    A subclass declares its properties in class attributes, builds its modules in `__init__` and computes in `score`.

    Args:
        hidden_sizes: size of each hidden state that the head takes.
        n_out: number of outputs; None to stop at the parts, for a head that has parts.
        **options: fields of `Options`.

    Attributes:
        name: the head's name in the registry, such as "linear"; `register` sets it.
        title: a noun phrase for the model card.
        Options: the dataclass of the head's options.
        takes_one_layer: whether the head takes a single hidden state, by default the last.
        has_parts: whether the head can stop at its parts.
        explains: what the head's scores can be attributed to, "parts" or "tokens" or both; empty for no attributions.
            A head that does not route and has "tokens" computes the attributions in `credits`.
        made_by: the function that makes this head from trained models; None for a head that is trained itself.

    Raises:
        ValueError: If a size or an option is not valid.
        TypeError: If an option is unknown.
    """

    name: ClassVar[str]
    title: ClassVar[str] = "A head"
    Options: ClassVar[type[HeadOptions]] = HeadOptions
    takes_one_layer: ClassVar[bool] = False
    has_parts: ClassVar[bool] = False
    explains: ClassVar[tuple[str, ...]] = ()
    made_by: ClassVar[str | None] = None

    def __init__(self, *, hidden_sizes: Sequence[int], n_out: int | None, **options: Any) -> None:
        super().__init__()
        n_out = plain(n_out)
        self.hidden_sizes = check_hidden_sizes(plain(hidden_sizes), at_most=1 if self.takes_one_layer else None)
        if n_out is None and not self.has_parts:
            raise ValueError(f"n_out is None, and {type(self).__name__} has no parts to stop at; load a classifier.")
        check_size("n_out", n_out, or_none="stop at the parts")
        self.n_out = n_out
        self.options = self.make_options(options)

    @classmethod
    def make_options(cls, given: Mapping[str, Any]) -> HeadOptions:
        """Return the head's options; an option that is not given has its default.

        Raises:
            TypeError: If an option is unknown.
            ValueError: If a value is not what its option expects.
        """
        names = cls.Options.names()
        for name in given:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                has = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(names) or 'no options'}."
                raise TypeError(f"{getattr(cls, 'name', cls.__name__)} heads have no option {name}; {has}")
        return cls.Options(**given)

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        return_routing_probabilities: bool = False,
        mix: Mix | None = None,
    ) -> HeadOutput:
        """Score each class.

        Args:
            hidden_states: one tensor `[batch, tokens, hidden_size]` per layer.
            mask: `[batch, tokens]`, from 0 to 1: 1 for a token, 0 for padding, between them for a fraction of a token
                (mixup). A sequence of such tensors has one per layer.
            return_routing_probabilities: whether to return the probabilities of each routing; only heads that route
                have them.
            mix: mixes the samples of a batch (mixup). It is applied to the hidden states, not to the mask.

        Returns:
            A `HeadOutput`, in float32 or wider.

        Raises:
            ValueError: If there are more or fewer hidden states than the head was built for, or shapes do not fit.
            TypeError: If an input is not a tensor.
        """
        masks = check_inputs(hidden_states, mask, self.hidden_sizes)
        return self.score(hidden_states, masks, return_routing_probabilities, mix)

    @abc.abstractmethod
    def score(
        self,
        hidden_states: Sequence[Tensor],
        masks: Sequence[Tensor],
        return_routing_probabilities: bool,
        mix: Mix | None,
    ) -> HeadOutput:
        """Compute the output of `forward` from checked inputs, with one mask per layer."""

    def credits(self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return what each token at each layer adds to the scores, for a head whose scores are such sums.

        Quantities that the head takes as given, such as attention weights, are constants in the autograd graph.

        Args:
            hidden_states: as in `forward`.
            masks: one per layer.

        Returns:
            Per layer `[batch, tokens, n_out]`, in logits. Added to the scores of a completely masked input, they give
            the scores.
        """
        raise NotImplementedError(f"{type(self).__name__} explains tokens; expected it to have a method credits.")

    def reset_parameters(self) -> None:
        """Initialise all parameters again, in every module of the head that can initialise its own."""
        reset(*self.children())


def reset(*modules: nn.Module) -> None:
    """Initialise the parameters of modules again."""
    for module in modules:
        for initialised in self_initialised(module):
            initialised.reset_parameters()


def self_initialised(module: nn.Module) -> Iterator[Any]:
    """Yield the outermost modules that initialise their own parameters: the given module, or modules in it.

    `Head.reset_parameters` does not count, as it only resets the modules in a head.
    """
    method = getattr(type(module), "reset_parameters", None)
    if method is not None and method is not Head.reset_parameters:
        yield module
    else:
        for child in module.children():
            yield from self_initialised(child)


_HEADS: dict[str, type[Head]] = {}
AnyHead = TypeVar("AnyHead", bound=type[Head])


def register(name: str) -> Callable[[AnyHead], AnyHead]:
    """Return a decorator that puts a head into the registry.

    The head then trains, saves and loads under this name, and `capsule-heads train --help` lists its options. A
    process that loads such a model has to register the head too.

    Args:
        name: the head's name: `head_type` in the configuration.

    Raises:
        ValueError: If another head has the name.
        TypeError: If the class is not a subclass of `Head`, or an option was not made by `option`.

    Example:
        >>> @register("mean")
        ... class MeanHead(Head):
        ...     def __init__(self, **arguments):
        ...         super().__init__(**arguments)
        ...         self.affine = nn.Linear(self.hidden_sizes[-1], self.n_out)
        ...
        ...     def score(self, hidden_states, masks, return_routing_probabilities, mix):
        ...         return HeadOutput(self.affine(hidden_states[-1].mean(1)))
    """

    def add(cls: AnyHead) -> AnyHead:
        if not (isinstance(cls, type) and issubclass(cls, Head)):
            raise TypeError(f"{cls!r} cannot be registered as a head; expected a subclass of capsule_heads.heads.Head.")
        for field in dataclasses.fields(cls.Options):
            if "help" not in field.metadata:
                raise TypeError(f"The option {field.name} of {cls.__name__} has no help; make it with heads.option().")
        known = _HEADS.get(name)
        # Running a notebook cell again defines its head again.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"head_type {name!r} is {known.__module__}.{known.__qualname__}; choose another name.")
        cls.name = name
        _HEADS[name] = cls
        return cls

    return add


def registered_heads() -> Mapping[str, type[Head]]:
    """Return all heads by name, the package's own first."""
    return MappingProxyType(_HEADS)


def get_head(name: str) -> type[Head]:
    """Return the head that is registered under a name.

    Raises:
        ValueError: If no head has the name.
    """
    if not isinstance(name, str) or name not in _HEADS:
        close = difflib.get_close_matches(str(name), _HEADS, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"head_type is {shown(name)}; expected one of {', '.join(_HEADS)}. {hint}A head of your own has to be "
            "registered in every process that uses it: import the module that calls capsule_heads.heads.register."
        )
    return _HEADS[name]


def check_trainable(head: type[Head]) -> None:
    """Check that a head can be trained.

    Raises:
        ValueError: If the head is made from trained models instead.
    """
    if head.made_by is not None:
        raise ValueError(
            f'head_type="{head.name}" cannot be trained: {head.made_by}(models) makes it from trained models.'
        )


def mixed(x: Tensor, mix: Mix | None) -> Tensor:
    """Return a batch with its samples mixed, or unchanged without mixup."""
    return x if mix is None else mix(x)


def check_inputs(
    hidden_states: Sequence[Tensor], mask: Tensor | Sequence[Tensor], hidden_sizes: Sequence[int]
) -> list[Tensor]:
    """Check the inputs of a head, and return one mask per layer.

    Raises:
        ValueError: If there are more or fewer hidden states than the head takes, or shapes or devices do not fit.
        TypeError: If the hidden states are not a sequence of tensors.
    """
    if not isinstance(hidden_states, Sequence | Tensor):
        raise TypeError(f"hidden_states is a {type(hidden_states).__name__}; expected a sequence of tensors.")
    if len(hidden_states) != len(hidden_sizes):
        raise ValueError(
            f"{len(hidden_states)} hidden states were passed to a head built for {len(hidden_sizes)}; expected one per "
            "layer, such as the embeddings and the output of every layer."
        )
    masks = [mask] * len(hidden_sizes) if isinstance(mask, Tensor) else list(mask or ())
    if len(masks) != len(hidden_sizes) or not all(isinstance(x, Tensor) for x in [*hidden_states, *masks]):
        raise ValueError(
            f"The hidden states are {len(hidden_states)} of {_types(hidden_states)} and the masks {len(masks)} of "
            f"{_types(masks)}; expected tensors, a hidden state per layer and one mask for all layers or for each."
        )
    for x, m, size in zip(hidden_states, masks, hidden_sizes, strict=True):
        if x.ndim != 3 or x.shape[-1] != size or x.shape[:-1] != m.shape:
            raise ValueError(
                f"A hidden state has shape {tuple(x.shape)} and its mask {tuple(m.shape)}; expected [batch, tokens, "
                f"{size}] and [batch, tokens]."
            )
        if x.device != m.device:
            raise ValueError(
                f"A hidden state is on {x.device} and its mask on {m.device}; expected both on one device."
            )
    return masks


def _types(values: Sequence[object]) -> str:
    return ", ".join(sorted({type(value).__name__ for value in values})) or "nothing"
