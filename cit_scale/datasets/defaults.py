"""Numbers that the commands and the functions behind them share. Imports nothing."""

SHARD_MIB = 512
PACK_QUALITY = 90  # of libjpeg, 1 to 100
FRAME_QUALITY = 2  # ffmpeg's qscale, 2 to 31, from fine to coarse
