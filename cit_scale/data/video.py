"""The former name of cit_scale/datasets/video.py, for commands that call ``python -m cit_scale.data.video``."""

from cit_scale.datasets.video import main

if __name__ == "__main__":
    raise SystemExit(main())
