"""The former name of ``cit-scale video``, for commands that call ``python -m cit_scale.data.video``."""

from cit_scale.datasets.commands import video

if __name__ == "__main__":
    raise SystemExit(video())
