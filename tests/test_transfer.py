"""Copies to a device: page-locked first where that device is a GPU."""

import pytest
import torch

from cit_scale.data.transfer import to_device


class Recorded:
    """A tensor that tells what is done with it, in order."""

    def __init__(self):
        self.calls = []

    def pin_memory(self):
        self.calls.append("pin_memory")
        return self

    def to(self, device, non_blocking):
        self.calls.append(f"to {device}, {'not waited for' if non_blocking else 'waited for'}")
        return self


def test_what_goes_to_a_gpu_is_page_locked_first():
    tensor = Recorded()
    to_device(tensor, torch.device("cuda", 1))
    assert tensor.calls == ["pin_memory", "to cuda:1, not waited for"]


def test_on_a_cpu_a_tensor_stays_what_and_where_it_is():
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_does_not_wait_for_a_copy_behind_other_work():
    cuda = torch.device("cuda", 0)
    to_device(torch.arange(5), cuda)  # initialises
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    done = torch.cuda.Event()
    copies = [to_device(torch.full((7,), number), cuda) for number in range(100)]  # of memory that is free by then
    done.record()
    assert not done.query()
    for number, copy in enumerate(copies):
        assert copy.tolist() == [number] * 7
