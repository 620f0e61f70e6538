"""toyNORB: stereo pairs of procedurally built toys, with the classes and factors of smallNORB, without a download."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import product
from typing import Any

import datasets
import numpy as np

from .rendering import Solid, ball, box, render_pair, rod
from .stereo import CATEGORIES, stereo_features

_N_AZIMUTHS = 18
_ELEVATIONS = range(30, 75, 5)  # degrees

# For each lighting: directions towards lights and their strengths, and the strength of light from everywhere.
_LIGHTINGS = (
    ([((-0.8, -0.6, 1.0), 0.70)], 0.35),
    ([((0.8, -0.6, 1.0), 0.70)], 0.35),
    ([((0.0, -0.8, 1.2), 0.65)], 0.45),
    ([((0.1, 0.1, 1.0), 0.50)], 0.40),
    ([((0.4, 0.9, 1.0), 0.60)], 0.40),
    ([((-0.9, -0.4, 1.1), 0.40), ((0.7, -0.9, 1.0), 0.40)], 0.30),
)
_VARIED = {"elevation": range(len(_ELEVATIONS)), "azimuth": range(0, 2 * _N_AZIMUTHS, 2)}  # as numbered in the data
_VIEWS = tuple(product(range(len(_ELEVATIONS)), range(_N_AZIMUTHS), range(len(_LIGHTINGS))))

# Increase this with every change to the images, as it is part of the name of their cache.
_EDITION = 1


def load_toy_norb(
    *,
    n_train_instances: int = 10,
    n_validation_instances: int = 2,
    n_test_instances: int = 4,
    n_views: int = 40,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.DatasetDict:
    """Render stereo pairs of toys, or load those rendered before, as a substitute for smallNORB without a network.

    Each category is a family of solid toys. An instance is one toy, with random proportions, kind of body, size and
    grey tones. Two cameras side by side look at it from one of 9 elevations (30 to 70 degrees), turned to one of 18
    azimuths, in one of 6 lightings. Each instance has its own random selection of these 972 views.

    The set is for quickstarts and tests. A model's accuracy on it says little about its accuracy on smallNORB.
    Rendering a thousand pairs takes about half a minute on one core. Pairs are cached, so this happens once.

    Instances are numbered within their category: the test split's first, then validation's, then training's. So no two
    splits share an instance, and a larger training split does not change the others. The same random seed gives the
    same toys and views everywhere. Between processors, rounding may make a grey value differ by 1.

    Args:
        n_train_instances: Number of toys of each category in the training split.
        n_validation_instances: Number of toys of each category in the validation split.
        n_test_instances: Number of toys of each category in the test split.
        n_views: Pairs of each instance, at most 972. A larger number adds views to those of a smaller number.
        seed: Random seed of toys and views.
        cache_dir: Folder for rendered pairs; by default the cache folder of datasets.

    Returns:
        The splits `train`, `validation` and `test` with the columns of `stereo_features`; by default 2,000, 400 and 800
        pairs of 96 x 96, ordered by category and instance.

    Raises:
        ValueError: If a number is out of its range.
    """
    counts = {"test": n_test_instances, "validation": n_validation_instances, "train": n_train_instances}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"n_{split}_instances is {count}; expected at least 1 instance of each category.")
    if not 1 <= n_views <= len(_VIEWS):
        raise ValueError(f"n_views is {n_views}; expected 1 to {len(_VIEWS)}, which is all views of an instance.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more.")
    splits, first = {}, 0
    for split, count in counts.items():
        settings = {"first": first, "count": count, "n_views": n_views, "seed": seed, "edition": _EDITION}
        splits[split] = datasets.Dataset.from_generator(
            _render_instances,
            features=stereo_features(),
            gen_kwargs=settings,
            split=datasets.NamedSplit(split),
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        )
        first += count
    return datasets.DatasetDict({split: splits[split] for split in ("train", "validation", "test")})


def render_sequence(
    factor: str,
    *,
    label: str | int = 0,
    instance: int = 0,
    elevation: int | None = None,
    azimuth: int | None = None,
    lighting: int = 2,
    seed: int = 0,
) -> datasets.Dataset:
    """Render one toy from all elevations, or from all azimuths.

    Args:
        factor: The factor that varies, "elevation" or "azimuth".
        label: Category of the toy, by name or index.
        instance: Number of the toy within its category. The first ones are those of the test split, by default four.
        elevation: 0 to 8; 4 by default, and not given if it varies.
        azimuth: 0, 2, ... 34; 0 by default, and not given if it varies.
        lighting: 0 to 5.
        seed: As in `load_toy_norb`.

    Returns:
        9 or 18 pairs with the columns of `stereo_features`, in the order of the factor.

    Raises:
        ValueError: If an argument has another value.
    """
    if (elevation if factor == "elevation" else azimuth) is not None:
        raise ValueError(f"{factor} was given, but it is the factor that varies; leave it out.")
    elevation, azimuth = 4 if elevation is None else elevation, 0 if azimuth is None else azimuth
    index = CATEGORIES.index(label) if isinstance(label, str) and label in CATEGORIES else label
    choices = {
        "factor": tuple(_VARIED),
        "label": range(len(CATEGORIES)),
        **_VARIED,
        "lighting": range(len(_LIGHTINGS)),
    }
    given = {"factor": factor, "label": index, "elevation": elevation, "azimuth": azimuth, "lighting": lighting}
    for name, value in given.items():
        if value not in choices[name]:
            expected = CATEGORIES if name == "label" else choices[name]
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, expected))}.")
    if instance < 0 or seed < 0:
        raise ValueError(f"instance is {instance} and seed {seed}; expected 0 or more.")
    index = int(index)
    toy = build_toy(CATEGORIES[index], np.random.default_rng([seed, index, instance]))
    rows = []
    for value in _VARIED[factor]:
        view = {"elevation": elevation, "azimuth": azimuth, "lighting": lighting, factor: value}
        image = render_view(toy, view["elevation"], view["azimuth"] // 2, lighting)
        rows.append({"image": image, "label": index, "instance": instance, **view})
    return datasets.Dataset.from_list(rows, features=stereo_features())


def _render_instances(first: int, count: int, n_views: int, seed: int, edition: int) -> Iterator[dict[str, Any]]:
    for (label, category), instance in product(enumerate(CATEGORIES), range(first, first + count)):
        toy = build_toy(category, np.random.default_rng([seed, label, instance]))
        order = np.random.default_rng([seed, label, instance, 1]).permutation(len(_VIEWS))
        for elevation, azimuth, lighting in (_VIEWS[index] for index in order[:n_views]):
            yield {
                "image": render_view(toy, elevation, azimuth, lighting),
                "label": label,
                "instance": instance,
                "elevation": elevation,
                "azimuth": 2 * azimuth,
                "lighting": lighting,
            }


def render_view(toy: list[Solid], elevation: int, azimuth: int, lighting: int, size: int = 96) -> np.ndarray:
    """Render one view of a toy.

    Args:
        toy: A toy that `build_toy` built.
        elevation: 0 to 8.
        azimuth: 0 to 17, by which the toy is turned in steps of 20 degrees.
        lighting: 0 to 5.
        size: Height and width of an image, in pixels.

    Returns:
        Grey values `[2, size, size]`, the left view first.
    """
    angle = azimuth * 2 * math.pi / _N_AZIMUTHS
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    turned = [part.moved(turn, (0, 0, 0)) for part in toy]
    return render_pair(turned, _ELEVATIONS[elevation], *_LIGHTINGS[lighting], size=size)


def build_toy(category: str, rng: np.random.Generator) -> list[Solid]:
    """Build a toy of one of `CATEGORIES`, on the floor, facing along `x`.

    Toys of all categories are scaled to about the same size, so that size does not tell them apart.
    """
    parts = _BUILDERS[category](rng)
    bounds = np.stack([part.bounds for part in parts])
    low, high = bounds[:, 0].min(axis=0), bounds[:, 1].max(axis=0)
    # At equal length, trucks would look larger than planes. At equal bulk, planes would be longer than trucks. So the
    # scale is in between.
    length = (high - low).max() / 2
    bulk = math.sqrt(sum(abs(np.linalg.det(part.axes)) ** (2 / 3) for part in parts))
    scale = rng.uniform(0.51, 0.67) / math.sqrt(length * bulk)
    shift = -scale * np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
    return [part.moved(scale * np.eye(3), shift) for part in parts]


def _tones(rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the albedos of a toy's body, of its second colour, and of its dark parts."""
    return rng.uniform(0.2, 0.95), rng.uniform(0.2, 0.95), rng.uniform(0.06, 0.4)


def _animal(rng: np.random.Generator) -> list[Solid]:
    tone, second, _ = _tones(rng)
    u = rng.uniform
    length, girth, leg, thick = u(0.5, 0.75), u(0.17, 0.32), u(0.25, 0.55), u(0.05, 0.1)
    back = leg + girth * 0.8
    parts = [ball((0, 0, back), (length, girth, girth * u(0.9, 1.15)), tone)]
    stride, spread = u(-0.15, 0.15), girth * 0.6
    for x, y, step in ((0.6, 1, stride), (0.6, -1, -stride), (-0.6, 1, -stride), (-0.6, -1, stride)):
        hip, foot = (x * length, y * spread, back), (x * length + step, y * spread, 0)
        parts.append(rod(hip, foot, thick, tone))
    reach, lift = u(0.15, 0.5), math.radians(u(20, 75))
    neck = np.array([0.75 * length, 0, back + 0.3 * girth])
    head = neck + (reach + girth * 0.4) * np.array([math.cos(lift), 0, math.sin(lift)])
    size = girth * u(0.5, 0.75)
    parts.append(rod(neck - (0.1, 0, 0.1), head, size * u(0.55, 0.8), tone))
    parts.append(ball(head, (size * 1.1, size * 0.8, size * 0.9), tone))
    parts.append(ball(head + size * np.array([1.0, 0, -0.3]), (size * u(0.6, 1.1), size * 0.5, size * 0.5), second))
    ear = size * u(0.3, 0.8)
    for y in (-1, 1):
        parts.append(ball(head + size * np.array([-0.3, 0.6 * y, 0.6]), (ear * 0.4, ear * 0.5, ear), second))
    rump, droop = np.array([-0.9 * length, 0, back + 0.2 * girth]), math.radians(u(-70, 50))
    tail = rump + u(0.2, 0.5) * np.array([-math.cos(droop), 0, math.sin(droop)])
    parts.append(rod(rump, tail, u(0.03, 0.07), second))
    return parts


def _human(rng: np.random.Generator) -> list[Solid]:
    shirt, trousers, dark = _tones(rng)
    skin, u = rng.uniform(0.35, 0.9), rng.uniform
    hip, chest, layer = u(0.75, 0.95), u(0.3, 0.38), u(0.12, 0.18)
    shoulder, limb = u(0.26, 0.36), u(0.075, 0.11)
    waist = shoulder * u(0.6, 0.9)
    stance, stride = u(0.02, 0.2), u(-0.25, 0.25)
    parts = []
    for y, step in ((-1, stride), (1, -stride)):
        foot = np.array([step, y * (0.6 * waist + stance), 0.05])
        parts.append(rod((0, y * 0.55 * waist, hip + 0.05), foot, limb * 1.15, trousers))
        parts.append(box(np.add(foot, (0.07, 0, 0)), (0.16, 0.075, 0.05), dark))
        arm, forward = math.radians(u(5, 100)), u(-0.4, 0.7)
        joint = np.array([0, y * shoulder, hip + 2 * chest - 0.08])
        hand = np.array([forward, y * math.sin(arm), -math.cos(arm)])
        hand = joint + u(0.52, 0.62) * hand / np.linalg.norm(hand)
        parts.append(rod(joint, hand, limb * 0.85, shirt))
        parts.append(ball(hand, limb * 1.05, skin))
        parts.append(ball(joint, limb, shirt))
    # The body is widest at the shoulders: a box narrows along its third axis, which points down here.
    axes = np.diag([layer, shoulder, -chest])
    parts.append(box((0, 0, hip + chest), axes, shirt, taper=(0.85, waist / shoulder)))
    size, top = u(0.15, 0.2), hip + 2 * chest
    parts.append(rod((0, 0, top), (0, 0, top + size), size * 0.5, skin))
    parts.append(ball((0, 0, top + size * 1.35), (size, size * 0.85, size * 1.1), skin))
    if u() < 0.5:
        brim = top + size * 2
        parts.append(rod((0, 0, brim), (0, 0, brim + 0.03), size * u(1.2, 1.8), dark))
        parts.append(rod((0, 0, brim), (0, 0, brim + size * u(0.5, 1.0)), size * 0.85, dark))
    return parts


def _airplane(rng: np.random.Generator) -> list[Solid]:
    tone, second, dark = _tones(rng)
    u = rng.uniform
    girth, height = u(0.09, 0.16), u(0.3, 0.5)
    parts = [ball((0, 0, height), (1, girth, girth * u(0.9, 1.3)), tone)]
    span, chord, sweep, rise = u(0.65, 1.0), u(0.13, 0.24), u(-0.05, 0.5), u(-0.05, 0.15)
    root, low = u(-0.05, 0.2), u(-0.5, 0.7) * girth
    engines = rng.integers(0, 3)
    for y in (-1, 1):
        # A wing narrows towards its tip, so the third axis runs along the wing, and back by the sweep.
        half = np.array([-sweep, y * span, rise]) / 2
        axes = np.stack([(chord, 0, 0), (0, 0, 0.025), half], axis=1)
        parts.append(box(np.add(half, (root, 0, height + low)), axes, second, taper=(u(0.4, 0.8), 0.6)))
        for number in range(engines):
            pod = half * (0.7 + 0.6 * number) + (root + 0.1, 0, height + low - 0.06)
            parts.append(rod(np.add(pod, (0.14, 0, 0)), pod - (0.1, 0, 0), 0.06, dark))
        half = np.array([-u(0, 0.15), y * span * 0.35, 0]) / 2
        axes = np.stack([(chord * 0.55, 0, 0), (0, 0, 0.02), half], axis=1)
        parts.append(box(np.add(half, (-0.85, 0, height + 0.03)), axes, second, taper=(0.6, 1)))
        parts.append(rod((-0.05, y * 0.2, height), (-0.05, y * 0.2, 0.07), 0.02, dark))
        parts.append(rod((-0.05, y * 0.2 - 0.025, 0.07), (-0.05, y * 0.2 + 0.025, 0.07), 0.07, dark))
    fin = np.array([-u(0.05, 0.2), 0, u(0.3, 0.42)]) / 2
    axes = np.stack([(chord * 0.6, 0, 0), (0, 0.02, 0), fin], axis=1)
    parts.append(box(np.add(fin, (-0.83, 0, height + 0.02)), axes, second, taper=(0.55, 1)))
    if not engines:
        blade = u(0.22, 0.32)
        parts.append(box((1.0, 0, height), (0.015, 0.035, blade), dark))
        parts.append(ball((0.99, 0, height), 0.05, dark))
    return parts


def _wheels(positions: list[float], track: float, radius: float, width: float, albedo: float) -> list[Solid]:
    """Return a pair of wheels at each position along the x axis."""
    return [
        rod((x, side * (track - width), radius), (x, side * track, radius), radius, albedo)
        for x in positions
        for side in (-1, 1)
    ]


def _truck(rng: np.random.Generator) -> list[Solid]:
    tone, second, dark = _tones(rng)
    u = rng.uniform
    width, wheel, cab = u(0.26, 0.36), u(0.11, 0.16), u(0.17, 0.26)
    floor, height = 1.5 * wheel, u(0.24, 0.36)
    front = 1 - 2 * cab
    parts = [box((0, 0, floor), (0.97, width * 0.7, 0.06), dark)]
    parts.append(box((1 - cab, 0, floor + height), (cab, width, height), tone, taper=(u(0.75, 1), 0.95)))
    window = (cab * 1.02, width * 0.86, height * 0.3)
    parts.append(box((1 - cab, 0, floor + 1.35 * height), window, dark, taper=(0.8, 1)))
    middle, half = (front - 1.06) / 2, (front + 0.94) / 2
    kind = rng.integers(3)
    if kind == 0:
        load = u(0.3, 0.48)
        parts.append(box((middle, 0, floor + 0.06 + load), (half, width * u(1, 1.1), load), second))
    elif kind == 1:
        radius = width * u(0.85, 1)
        center = floor + 0.06 + radius
        parts.append(rod((middle - half, 0, center), (middle + half, 0, center), radius, second))
        parts.append(rod((middle, 0, center), (middle, 0, center + radius + 0.07), radius * 0.3, second))
    else:
        wall, top = u(0.1, 0.2), floor + 0.06
        parts.append(box((middle, 0, top), (half, width, 0.03), second))
        for side in (-1, 1):
            parts.append(box((middle, side * width, top + wall), (half, 0.025, wall), second))
            parts.append(box((middle + side * half, 0, top + wall), (0.025, width, wall), second))
    positions = [1 - cab, -0.7, *([-0.7 + 2.3 * wheel] if u() < 0.6 else [])]
    return parts + _wheels(positions, width * 1.05, wheel, width * 0.35, dark * 0.7)


def _car(rng: np.random.Generator) -> list[Solid]:
    tone, second, dark = _tones(rng)
    u = rng.uniform
    width, wheel = u(0.38, 0.48), u(0.15, 0.2)
    floor, belt = wheel * 0.7, u(0.13, 0.19)
    parts = [box((0, 0, floor + belt), (1, width, belt), tone, taper=(u(0.88, 0.97), u(0.85, 0.95)))]
    cabin, middle, height = u(0.4, 0.62), u(-0.3, 0.02), u(0.13, 0.18)
    roof = (u(0.5, 0.75), u(0.7, 0.85))
    top = floor + 2 * belt
    parts.append(box((middle, 0, top + height), (cabin, width * 0.85, height), dark, taper=roof))
    reach, side = cabin * roof[0] * 1.04, width * 0.85 * roof[1] * 1.04
    paint = tone if u() < 0.6 else second
    parts.append(box((middle, 0, top + 2 * height), (reach, side, 0.03), paint, taper=(0.95, 0.95)))
    for x in (-1, 1):
        parts.append(box((x, 0, floor + belt * 0.6), (0.04, width * 0.95, belt * 0.3), second))
    if u() < 0.3:
        parts.append(box((-0.93, 0, top + 0.1), (0.09, width * 0.9, 0.02), second))
    return parts + _wheels([u(0.55, 0.66), -u(0.55, 0.66)], width * 1.03, wheel, width * 0.3, dark * 0.7)


_BUILDERS = {"animal": _animal, "human": _human, "airplane": _airplane, "truck": _truck, "car": _car}
