"""What ``ranks``' server does once, before it forks: slow imports, and what libraries work out at their first use.

Nothing here may start a thread: a fork does not have it.
"""

import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer
import safetensors.torch  # noqa: F401
import tensorboard.summary  # noqa: F401
import torch._inductor.compile_fx
import torch.distributed.fsdp
import torch.utils.tensorboard  # noqa: F401

import cit_scale.engines.fsdp2
import cit_scale.engines.zero
import cit_scale.train  # noqa: F401
from cit_scale.config import DataConfig
from cit_scale.data import dali

# DeepSpeed compiles a C program to know which of its operators would work here.
_ = deepspeed.ops.__compatible_ops__


def feed() -> None:
    raise StopIteration


# DALI translates a pipeline's Python when the first one is put together; building it, which starts threads, is later.
for pipeline, options in ((dali.train_pipeline, {"num_layers": 0}), (dali.eval_pipeline, {})):
    pipeline(feed, DataConfig(), batch_size=1, num_threads=1, prefetch_queue_depth=1, device_id=None, **options)
