"""The images a run could not use: counted once, over all ranks, and not against a run that had them repaired."""

import pytest
from ranks import run_on_ranks

from cit_scale.distributed.world import World
from cit_scale.errors import BadDataError
from cit_scale.run.bad_images import BadImages


class Met:
    """A reader that met these images."""

    def __init__(self, *samples):
        self.bad = {sample: "cut short" for sample in samples}

    def bad_image_lines(self, samples):
        return [f"{sample}.jpg\t{self.bad[sample]}" for sample in samples]


def meet(world, run_dir):
    said = []
    bad = BadImages(run_dir, [Met(1, 2 + world.rank), Met(7)], 3, world)
    first = bad.has_news
    bad.collect(said.append)
    return first, bad.has_news, bad.too_many, len(said)


def test_ranks_agree_on_what_they_met_together(tmp_path):
    assert run_on_ranks(2, meet, tmp_path) == [(True, False, True, 1)] * 2  # 1, 2, 3 and 7
    assert (tmp_path / "bad_images.tsv").read_text().split() == [
        *("1.jpg", "cut", "short", "2.jpg", "cut", "short", "3.jpg", "cut", "short", "7.jpg", "cut", "short")
    ]


def test_only_what_is_bad_since_this_start_counts_and_the_list_keeps_the_rest(tmp_path):
    before = BadImages(tmp_path, [Met(1, 2)], 1, World())
    before.collect(print)
    with pytest.raises(BadDataError, match="2 images cannot be used, more than data"):
        before.refuse_too_many()
    repaired = BadImages(tmp_path, [Met(3)], 1, World())
    repaired.collect(print)
    repaired.refuse_too_many()
    assert [line[0] for line in (tmp_path / "bad_images.tsv").read_text().splitlines()] == ["1", "2", "3"]
