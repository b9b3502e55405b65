"""Keeps ``python -m cit_scale.data.pack``, the former name of ``cit-scale pack``, working."""

import sys

from cit_scale.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["pack", *sys.argv[1:]]))
