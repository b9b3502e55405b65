"""The former name of cit_scale/datasets/pack.py, for commands that call ``python -m cit_scale.data.pack``."""

from cit_scale.datasets.pack import main

if __name__ == "__main__":
    raise SystemExit(main())
