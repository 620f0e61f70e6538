"""The sizes of a backbone's hidden states, found by running it on example inputs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from transformers.configuration_utils import PreTrainedConfig

from .parts import AUDIO_INPUTS, ENCODER, IMAGE_INPUTS, TEXT_INPUTS, Part, build_on_meta, main_input_name
from .running import all_hidden_states

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

N_TOKENS = 4
MORE_TOKENS = 64  # for backbones that need whole blocks of tokens
IMAGE_SIZE = 64  # used if the configuration does not name a size
LARGER_IMAGE_SIZE = 224  # for backbones that need more
N_SAMPLES = 9600  # samples of audio, a multiple of the blocks that codecs take
N_FRAMES = 400  # frames of a spectrum, a multiple of the windows that some models take
TRIED = "_tried_selections"  # attribute of a backbone: the layers requested of it, and whether it returned them
# Fields with the number of bins of a spectrum, or of features of a frame.
BINS = (
    "input_size",
    "num_mel_bins",
    "feature_projection_input_dim",
    "input_feat_per_channel",
    "input_feat_size",
    "input_dim",
)


@torch.no_grad()
def probe_hidden_sizes(backbone: PreTrainedModel, stack: str = "encoder") -> list[int]:
    """Run a backbone on a few tokens, an image or some audio, and return the size of each of its hidden states.

    Args:
        backbone: the loaded backbone.
        stack: "encoder" or "decoder", for an encoder-decoder.

    Raises:
        ValueError: If it is not a text, image or audio model that returns hidden states for such inputs alone.
    """
    return [x.shape[-1] for x in probe(backbone, stack)[1]]


@torch.no_grad()
def probe(
    backbone: PreTrainedModel, stack: str = "encoder", fractions: Sequence[float] = (1.0,)
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the first of the example inputs that a backbone runs on, and its hidden states for them.

    Args:
        backbone: the loaded backbone.
        stack: "encoder" or "decoder", for an encoder-decoder.
        fractions: the length of each sample in the batch as a fraction of the longest, if samples can differ in length.

    Returns:
        The inputs, by our names, and per layer `[batch, tokens, hidden_size]`.

    Raises:
        ValueError: If the backbone runs on none of the example inputs; see `probe_hidden_sizes`.
    """
    model_type, name = backbone.config.model_type, main_input_name(backbone)
    if name not in TEXT_INPUTS + IMAGE_INPUTS + AUDIO_INPUTS:
        raise ValueError(
            f"{model_type} takes {name}; expected a backbone for text, images or audio: one that takes "
            f"{', '.join(TEXT_INPUTS + IMAGE_INPUTS)} or {' or '.join(AUDIO_INPUTS)}."
        )
    errors: list[Exception] = []
    with evaluating(backbone):
        for inputs in example_inputs(backbone, fractions):
            inputs = {key: value.to(backbone.device) for key, value in inputs.items()}
            try:
                return inputs, all_hidden_states(backbone, stack, inputs).states
            except Exception as error:
                errors.append(error)
    # The first try may only have left out an argument that a later one passed.
    first = next((error for error in errors if not isinstance(error, TypeError)), errors[0])
    raise ValueError(
        f"{model_type} does not run on {name} alone; expected a backbone for text, images or audio. {first}"
    ) from first


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and restore the mode of each module at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def selects(backbone: PreTrainedModel, stack: str, layers: Sequence[int], hidden_sizes: Sequence[int]) -> bool:
    """Return whether a backbone can return some hidden states by index, and drop the others as it runs.

    Backbones with transformers' hooks on each layer can. The meaning of an index differs between versions of
    transformers, so each choice of layers is tried once per backbone, on an example. The answer is True only if the
    backbone returns the requested states. It is False as long as nothing can be tried, while a program is traced.

    Args:
        backbone: the loaded backbone.
        stack: "encoder" or "decoder", for an encoder-decoder.
        layers: indices of the hidden states to return, ascending.
        hidden_sizes: size of each of the backbone's hidden states.
    """
    by_hooks = "hidden_states" in (getattr(type(backbone), "_can_record_outputs", None) or {})
    n_layers = getattr(backbone.config, "num_hidden_layers", None)
    if not by_hooks or not len(layers) < len(hidden_sizes) == (n_layers or 0) + 1 or len(set(hidden_sizes)) > 1:
        return False
    tried: dict[tuple[int, ...], bool] = getattr(backbone, TRIED, {})
    # An attribute set on a replica of DataParallel is lost with the replica.
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or hasattr(backbone, "_is_replica")
    choice = tuple(layers)
    if choice not in tried and not is_traced and backbone.device.type != "meta":
        tried = {**tried, choice: _yields_what_is_asked_for(backbone, stack, choice, hidden_sizes)}
        setattr(backbone, TRIED, tried)
    return tried.get(choice, False)


@torch.no_grad()
def _yields_what_is_asked_for(
    backbone: PreTrainedModel, stack: str, layers: Sequence[int], hidden_sizes: Sequence[int]
) -> bool:
    """Return whether each state requested by index equals the state at that index of all states, and no other."""
    with torch.random.fork_rng(devices=[]), evaluating(backbone):  # the next step draws the same numbers as without
        try:
            inputs, states = probe(backbone, stack)
            selected = all_hidden_states(backbone, stack, inputs, hidden_sizes, layers).states
        except Exception:  # whatever fails with a list of indices or the example, all states are still available
            return False
    if any(isinstance(x, FakeTensor) for x in states):
        return False
    return len(selected) == len(layers) and all(
        [torch.equal(x, state) for state in states] == [index == layer for index in range(len(states))]
        for x, layer in zip(selected, layers)
    )


def probe_hidden_sizes_without_weights(base_config: PreTrainedConfig, part: Part = ENCODER) -> list[int]:
    """Return the sizes from a backbone's configuration alone, by running it on tensors that have shapes and no data.

    If the path through a backbone depends on data, its configuration has to name the sizes. Mixtures of experts run
    by batched products, whose shapes do not depend on data.

    Raises:
        ValueError: If the backbone does not run, as in `probe_hidden_sizes`, or its configuration lacks the sizes.
    """
    backbone = build_on_meta(base_config, part)
    # Models read the values of some tensors, unless the tensors are fake. Meta tensors alone would not be enough.
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return probe_hidden_sizes(backbone, part.stack)
    except ValueError as error:
        text_config = base_config.get_text_config()
        n_layers, size = (getattr(text_config, name, None) for name in ("num_hidden_layers", "hidden_size"))
        depends_on_data = isinstance(error.__cause__, DataDependentOutputException | DynamicOutputShapeException)
        if not depends_on_data or n_layers is None or size is None:
            raise
        return [size] * (n_layers + 1)


def example_inputs(backbone: PreTrainedModel, fractions: Sequence[float] = (1.0,)) -> Iterator[dict[str, Tensor]]:
    """Yield inputs that a backbone may run on, by our names, the likeliest first.

    Args:
        backbone: a text, image or audio model.
        fractions: as in `probe`.
    """
    name = main_input_name(backbone)
    config, dtype = backbone.config, backbone.dtype
    if name in TEXT_INPUTS:
        for n_tokens in (N_TOKENS, MORE_TOKENS):
            tokens = torch.arange(len(fractions) * n_tokens).remainder(7).add(3).view(len(fractions), n_tokens)
            yield {"input_ids": tokens, **_mask(fractions, n_tokens)}
    elif name in IMAGE_INPUTS:
        for inputs in _images(backbone, fractions):
            yield {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    else:
        for shape, length in _audio_shapes(config, name):
            noise = torch.randn(len(fractions), *shape).to(dtype)
            yield {name: noise, **_mask(fractions, length)}
            yield {name: noise, "attention_mask": torch.ones(len(fractions), length, dtype=torch.long)}


def _mask(fractions: Sequence[float], length: int) -> dict[str, Tensor]:
    """Return the mask of a batch of such lengths; nothing if all are equal."""
    if set(fractions) == {1.0}:
        return {}
    ends = torch.tensor([max(1, round(fraction * length)) for fraction in fractions])
    return {"attention_mask": (torch.arange(length) < ends[:, None]).long()}


def _images(backbone: PreTrainedModel, fractions: Sequence[float]) -> Iterator[dict[str, Tensor]]:
    config, n = backbone.config, len(fractions)
    accepted = inspect.signature(backbone.forward).parameters.keys()
    n_channels = _first(config, ("num_channels", "in_channels", "in_chans", "num_input_channels"), 3)
    height, width = _pair(_first(config, ("image_size", "img_size", "input_size"), IMAGE_SIZE))
    patch = _pair(_first(config, ("patch_size",), 16))[0]
    frames = _first(config, ("num_frames", "frames_per_clip", "video_seq_length"), 4)
    n_values = n_channels * patch * patch
    merge = _pair(_first(config, ("spatial_merge_size", "merge_kernel_size", "pooling_kernel_size"), 2))[0] * 2
    if accepted & {"grid_thw", "image_grid_thw"}:
        grids = torch.tensor([[1, merge, merge * (2 if fraction == 1 else 1)] for fraction in fractions])
        total = int(grids.prod(-1).sum())
        frame = _pair(_first(config, ("temporal_patch_size",), 1))[0]
        for shape in (
            (n_values * frame,),
            (n_values,),
            (2 * n_values,),
            (n_channels, patch, patch),
            (n_channels, frame, patch, patch),
        ):
            yield {"pixel_values": torch.randn(total, *shape), "image_grid_thw": grids}
        return
    if "spatial_shapes" in accepted:
        side = merge
        mask = _mask(fractions, side * side).get("attention_mask", torch.ones(n, side * side, dtype=torch.long))
        shapes = torch.tensor([[max(1, round(fraction * side)), side] for fraction in fractions])
        pixels = torch.randn(n, side * side, n_values)
        yield {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if accepted & {"pixel_position_ids", "image_position_ids"}:
        rows, columns = torch.meshgrid(torch.arange(merge), torch.arange(merge), indexing="ij")
        positions = torch.stack([columns, rows], -1).flatten(0, 1).expand(n, -1, -1)
        yield {"pixel_values": torch.rand(n, merge * merge, n_values), "image_position_ids": positions}
    video = {"pixel_values": torch.randn(n, frames, n_channels, height, width)}
    if "pixel_values_videos" in accepted:
        yield video
    yield {"pixel_values": torch.randn(n, n_channels, height, width)}
    yield {"pixel_values": torch.randn(n, n_channels, LARGER_IMAGE_SIZE, LARGER_IMAGE_SIZE)}
    yield video


def _audio_shapes(config: PreTrainedConfig, name: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield shapes of audio, `[samples]`, or of a spectrum, `[frames, bins]`, and the number of samples or frames."""
    if name == "input_values" and getattr(config, "num_mel_bins", None) is None:
        yield (N_SAMPLES,), N_SAMPLES
        yield (1, N_SAMPLES), N_SAMPLES
    n_bins = _first(config, BINS, 80)
    positions = _first(config, ("max_source_positions",), N_FRAMES // 2)
    n_frames = _first(config, ("max_length",), N_FRAMES) if name == "input_values" else N_FRAMES
    yield (n_frames, n_bins), n_frames
    yield (n_bins, 2 * positions), 2 * positions
    yield (n_bins, N_FRAMES), N_FRAMES
    yield (N_FRAMES, 4 * n_bins), N_FRAMES  # several frames stacked
    if name == "input_features":
        yield (N_SAMPLES,), N_SAMPLES


def _first(config: PreTrainedConfig, names: Sequence[str], default: int) -> Any:
    """Return the first of some fields that a configuration has, or one of the configurations in it."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((value for value in found if value), default)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])
