"""Defaults that the command line and the functions behind it share. Imports nothing, so that --help stays fast."""

SHARD_MIB = 512
PACK_QUALITY = 90  # libjpeg's scale, 1 (coarse) to 100 (fine)
FRAME_QUALITY = 2  # ffmpeg's qscale, 2 (fine) to 31 (coarse): the other way round than libjpeg's
