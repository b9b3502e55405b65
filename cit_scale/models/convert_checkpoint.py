"""Renames the keys of released checkpoints to those of our models. Opens no files.

The checkpoints are the student and the RedNet teachers of the CiT authors (CVPR 2022), and the RedNets of the
involution paper (CVPR 2021), which are mmcls checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# Released name -> our name. All patterns are applied to each key from top to bottom, so later ones see earlier results.
# Our own keys match none of them.
RENAMES = (
    # A RedNet: model + classifier as a teacher of CiT, backbone + head.fc in the involution release.
    (r"^(model|backbone)\.", ""),
    (r"^(classifier|head\.fc)\.", "fc."),
    # The student.
    (r"^head_(conv|inv)\.", r"teacher_heads.\1."),
    (r"^(conv|inv)_embed\.proj\.", r"patch_embed.projections.\1."),
    (r"^conv_embed\.conv\.", "patch_embed.stems.conv."),
    (r"^inv_embed\.stem\.", "patch_embed.stems.inv."),
    # The released convolution stem numbers its layers, ReLUs (2, 5) included.
    (r"^(patch_embed\.stems\.conv)\.0\.", r"\1.conv1."),
    (r"^(patch_embed\.stems\.conv)\.1\.", r"\1.bn1."),
    (r"^(patch_embed\.stems\.conv)\.3\.", r"\1.conv2."),
    (r"^(patch_embed\.stems\.conv)\.4\.", r"\1.bn2."),
    (r"^(patch_embed\.stems\.conv)\.6\.", r"\1.conv3."),
    (r"^(patch_embed\.stems\.conv)\.7\.", r"\1.bn3."),
    # The involution stem, too; its layers 0 and 4 contain convolution and BatchNorm.
    (r"^(stem|patch_embed\.stems\.inv)\.0\.(conv|bn)\.", r"\1.\g<2>1."),
    (r"^(stem|patch_embed\.stems\.inv)\.1\.", r"\1.conv2."),
    (r"^(stem|patch_embed\.stems\.inv)\.2\.", r"\1.bn2."),
    (r"^(stem|patch_embed\.stems\.inv)\.4\.(conv|bn)\.", r"\1.\g<2>3."),
    # Inside an involution.
    (r"\.conv2\.conv1\.conv\.", ".conv2.reduce."),
    (r"\.conv2\.conv1\.bn\.", ".conv2.bn."),
    (r"\.conv2\.conv2\.conv\.", ".conv2.span."),
)

# All keys that a state dict of our CiT or RedNet can have.
OURS = re.compile(
    r"""
    cls_token | pos_embed | teacher_tokens
    | blocks\.\d+\.[\w.]+
    | (norm | head | fc | teacher_heads\.\w+ | patch_embed\.proj | patch_embed\.projections\.\w+) \. (weight | bias)
    | (stem | layer[1-4]\.\d+ | patch_embed\.stems\.\w+)
      \. (conv[1-3] | conv2\.(reduce | bn | span) | bn[1-3] | downsample\.[01])
      \. (weight | bias | running_mean | running_var | num_batches_tracked)
    """,
    re.VERBOSE,
)


def convert(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a released CiT or RedNet under our names. Keys that are ours already stay.

    Raises ValueError that names the keys of neither network.
    """
    converted = {rename(key): tensor for key, tensor in state_dict.items()}
    unknown = [key for key in state_dict if not OURS.fullmatch(rename(key))]
    if unknown:
        shown = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        raise ValueError(
            f"not a checkpoint of a CiT or RedNet: {len(unknown)} of {len(state_dict)} keys unknown: {shown}"
        )
    return converted


def rename(key: str) -> str:
    """Apply all RENAMES to a key."""
    for released, ours in RENAMES:
        key = re.sub(released, ours, key)
    return key
