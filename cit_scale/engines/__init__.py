"""What hosts the student: one engine for each value of engine.name. ``build`` is the door."""

import os

import torch

if not torch.cuda.is_available():
    # Before any module here imports DeepSpeed, which looks for an accelerator then, and warns on each rank without one.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
