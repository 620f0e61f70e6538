"""Heads: modules that turn a backbone's hidden states into class scores.

Each head is one file that registers itself. `TokenDepthHead` and `SpatialPoseHead` are the paper's. The others are
controls without capsules on the same inputs. `EnsembleHead` combines several trained heads. `register` adds a head of
your own.
"""

from .base import (
    DEFAULT_HEAD,
    Head,
    HeadOptions,
    HeadOutput,
    check_trainable,
    get_head,
    option,
    register,
    registered_heads,
)
from .token_depth import TokenDepthHead  # the order of these imports is that of the registry

from .spatial_pose import SpatialPoseHead  # isort: skip
from .linear import LinearHead  # isort: skip
from .scalar_mix import ScalarMixHead  # isort: skip
from .attentive_pooling import AttentivePoolingHead  # isort: skip
from .gated_routing import GatedRoutingHead  # isort: skip
from .vector_routing import VectorRouting, VectorRoutingHead  # isort: skip
from .ensemble import EnsembleHead  # isort: skip
from .routing import RoutingHead  # isort: skip
from .inputs import TokenHead  # isort: skip

__all__ = [
    "DEFAULT_HEAD",
    "AttentivePoolingHead",
    "EnsembleHead",
    "GatedRoutingHead",
    "Head",
    "HeadOptions",
    "HeadOutput",
    "LinearHead",
    "RoutingHead",
    "ScalarMixHead",
    "SpatialPoseHead",
    "TokenDepthHead",
    "TokenHead",
    "VectorRouting",
    "VectorRoutingHead",
    "check_trainable",
    "get_head",
    "option",
    "register",
    "registered_heads",
]
