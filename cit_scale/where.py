"""``cit-scale where``: where launchers, batch scripts and ds_configs are, also where the package came as a wheel."""

from __future__ import annotations

from collections.abc import Sequence

from cit_scale.config import REPOSITORY
from cit_scale.text import ExampleParser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the folder. Returns an exit code."""
    parser = ExampleParser(
        prog="cit-scale where",
        usage="cit-scale where",
        description="Print the folder that holds launchers/, slurm/ and ds_configs/: the checkout, or where an "
        "installed package has them.",
        examples=(
            "cit-scale where",
            "python $(cit-scale where)/launchers/submit.py --nodes 8 --config cit_base --data.train DIR",
            "sbatch $(cit-scale where)/slurm/cit_base.sh --data.train DIR",
        ),
    )
    parser.parse_args(argv)
    print(REPOSITORY)
    return 0
