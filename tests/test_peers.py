"""What is said about the peers' checkpoints is what was seen."""

from functools import partial
from zlib import crc32

import pytest
from peers import Ending, judge_flips, load_text

SAVED = {1: {"weights": "a", "buffers": "b"}, 2: {"weights": "c", "buffers": "d"}}


def guarded(payload: bytes) -> bytes:
    """What stands before the checksum."""
    if crc32(payload[:-4]) != int.from_bytes(payload[-4:], "big"):
        raise ValueError("not what was written")
    return payload[:-4]


@pytest.mark.parametrize(
    ("read", "kind"),
    [(guarded, "noticed"), (bytes, "silent"), (len, "without effect")],
    ids=["a checksum", "none", "nothing read"],
)
def test_a_flipped_bit_is_noticed_silent_or_without_effect(tmp_path, read, kind):
    content = b"a checkpoint"
    contents = {"one": content + crc32(content).to_bytes(4, "big"), "two": crc32(b"").to_bytes(4, "big")}
    for name, written in contents.items():
        (tmp_path / name).write_bytes(written)
    paths = [tmp_path / name for name in contents]

    verdicts = tmp_path / "verdicts"
    verdicts.write_text("ended the process\n")
    judge_flips(lambda: [read(path.read_bytes()) for path in paths], paths, 50, 0, verdicts)
    assert verdicts.read_text().splitlines() == ["ended the process"] + 49 * [kind]
    assert {path.name: path.read_bytes() for path in paths} == contents


def test_a_flip_touches_one_bit_and_both_files_get_their_share(tmp_path):
    paths = [tmp_path / "small", tmp_path / "large"]
    for path, size in zip(paths, (100, 300), strict=True):
        path.write_bytes(bytes(size))
    seen = []

    def read() -> None:
        seen.append([sum(byte.bit_count() for byte in path.read_bytes()) for path in paths])

    verdicts = tmp_path / "verdicts"
    verdicts.touch()
    judge_flips(read, paths, 400, 0, verdicts)
    assert verdicts.read_text().splitlines() == 400 * ["without effect"]
    assert seen[0] == seen[-1] == [0, 0]
    assert all(sum(bits) == 1 for bits in seen[1:-1])
    assert 70 < sum(bits[0] for bits in seen) < 130


def test_a_reader_that_never_says_the_same_twice_cannot_be_judged(tmp_path):
    (tmp_path / "file").write_bytes(b"a")
    (tmp_path / "verdicts").touch()
    with pytest.raises(RuntimeError, match="no flip can be judged"):
        judge_flips(partial(next, iter(range(9))), [tmp_path / "file"], 1, 0, tmp_path / "verdicts")


@pytest.mark.parametrize(
    ("endings", "said"),
    [
        ([(2, SAVED[2]), (2, SAVED[2])], "resumes at step 2"),
        ([(1, SAVED[1]), (1, SAVED[1])], "resumes at step 1"),
        ([(2, SAVED[2]), (2, {"weights": "c", "buffers": "x"})], "resumes at step 2 with other buffers"),
        ([(2, SAVED[1]), (2, SAVED[2])], "resumes at step 2 with other buffers and weights"),
        ([(0, {}), (0, {})], "starts from nothing"),
        ([(0, {}), (2, SAVED[2])], "ranks go on from different steps: [0, 2]"),
    ],
)
def test_a_load_is_described_by_the_step_and_the_tensors_it_brought(endings, said):
    assert load_text([Ending(rank, "returned", value) for rank, value in enumerate(endings)], SAVED) == said


def test_a_load_that_one_rank_failed_is_described_by_the_failure():
    endings = [Ending(1, "returned", (2, SAVED[2])), Ending(0, "raised", "EOFError: no data: none")]
    assert load_text(endings, SAVED) == "raised EOFError"
    assert load_text([Ending(1, "died", "SIGXFSZ"), *endings], SAVED) == "died SIGXFSZ"
