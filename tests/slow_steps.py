"""train.py, or submitit's job, with steps that take a while and no processor: to act in the middle of a run.

python slow_steps.py SECONDS train ARGUMENTS OF train.py
python slow_steps.py SECONDS submitit ARGUMENTS OF submitit.core._submit
"""

import runpy
import sys
import time

from cit_scale import train

seconds, which, argv = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
train_step = train.train_step


def slow_step(*args):
    time.sleep(seconds)
    return train_step(*args)


train.train_step = slow_step
if which == "train":
    raise SystemExit(train.main(argv))
sys.argv = ["submitit", *argv]
runpy.run_module("submitit.core._submit", run_name="__main__")
