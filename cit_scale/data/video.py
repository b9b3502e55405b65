"""Keeps ``python -m cit_scale.data.video``, the former name of ``cit-scale video``, working."""

import sys

from cit_scale.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["video", *sys.argv[1:]]))
