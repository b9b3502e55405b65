"""train.py with steps that take a while and no processor: for tests that have to act in the middle of a run.

python slow_steps.py SECONDS ARGUMENTS OF train.py
"""

import sys
import time

from cit_scale import train

seconds, argv = float(sys.argv[1]), sys.argv[2:]
train_step = train.train_step


def slow_step(*args):
    time.sleep(seconds)
    return train_step(*args)


train.train_step = slow_step
raise SystemExit(train.main(argv))
