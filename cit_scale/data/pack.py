"""The former name of ``cit-scale pack``, for commands that call ``python -m cit_scale.data.pack``."""

from cit_scale.datasets.commands import pack

if __name__ == "__main__":
    raise SystemExit(pack())
