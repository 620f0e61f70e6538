"""Draw how an activated class capsule's pose vectors move with the viewpoint ("reverse graphics").

python scripts/benchmarks/draw_trajectory.py MODEL --data toy_norb --factor azimuth --label car --output trajectory.png
"""

import argparse

import numpy as np
from transformers import AutoImageProcessor, AutoModelForImageClassification

from capsule_heads.cli.options import OneLineParser, fail
from capsule_heads.paper.smallnorb import load_smallnorb
from capsule_heads.paper.toy_norb import render_sequence
from capsule_heads.paper.trajectory import (
    FACTORS,
    activated_poses,
    compute_capsules,
    draw_trajectory,
    pose_trajectory,
    select_sequence,
)

OTHERS = ("instance", "elevation", "azimuth", "lighting")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub name of the model")
    parser.add_argument("--data", required=True, choices=("toy_norb", "smallnorb"))
    parser.add_argument("--source", help="directory of smallNORB's files")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="split of smallNORB")
    parser.add_argument("--factor", required=True, choices=FACTORS, help="what varies")
    parser.add_argument("--label", help="category, by name or index; without it the first, as for the following")
    for name in OTHERS:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--output", default="trajectory.png", help="file for the picture (default trajectory.png)")
    options = parser.parse_args()
    try:
        fixed = {name: getattr(options, name) for name in ("label", *OTHERS)}
        if options.data == "toy_norb":  # of its views, a split has too few to make a sequence of
            given = {name: value for name, value in fixed.items() if value is not None}
            images = render_sequence(options.factor, **given)
        elif options.source is None:
            raise ValueError("smallnorb needs --source, the directory with its files.")
        else:
            images = load_smallnorb(options.source)[options.split]
        sequence, fixed = select_sequence(images, options.factor, **fixed)
        model = AutoModelForImageClassification.from_pretrained(options.model, trust_remote_code=False)
        images = [np.asarray(image, dtype=np.uint8) for image in sequence["image"]]
        processor = AutoImageProcessor.from_pretrained(options.model, trust_remote_code=False)
        logits, poses = compute_capsules(model, processor, images)
        poses, index, n_activated = activated_poses(logits, poses)
        trajectory = pose_trajectory(poses)
        names = model.config.id2label
        true = names.get(fixed.pop("label"))
        held = ", ".join(f"{name} {value}" for name, value in fixed.items())
        title = (
            f"Poses of the {names[index]} capsule, activated in {n_activated} of {len(images)} images\n"
            f"of one {true} as its {options.factor} varies ({options.data}, {held})"
        )
        steps, closed = list(sequence[options.factor]), options.factor == "azimuth"
        draw_trajectory(trajectory, images, steps, options.factor, title, closed).savefig(options.output)
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    for i, stress in enumerate(trajectory.stress):
        print(f"pose vector {i + 1}: stress {stress:.3f}")
    print(options.output)


if __name__ == "__main__":
    main()
