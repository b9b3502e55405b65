"""Output that nobody takes any more, and help that begins with what works."""

import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import TinyRun, assert_same_end

from cit_scale.text import ExampleParser, escape_unencodable

REPOSITORY = Path(__file__).parents[1]

TALKATIVE = """
import sys, time
from pathlib import Path
from rich.console import Console
from cit_scale.text import outlive_readers
outlive_readers()
for i in range(20):
    print("out", i, flush=True)
    print("err", i, file=sys.stderr)
    Console().print("rich", i)
    time.sleep(0.02)
Path(sys.argv[1]).write_text("through")
"""


def shell(line, tmp_path, *arguments):
    """A line of bash in which $0, $1, ... are the arguments. Returns its pipeline's exit codes, and what it said."""
    codes = tmp_path / "codes.txt"
    command = ["bash", "-c", f'{line}; echo "${{PIPESTATUS[@]}}" > {shlex.quote(str(codes))}', *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return [int(code) for code in codes.read_text().split()], done


@pytest.mark.parametrize(
    "line",
    [
        '"$0" -c "$1" "$2" | head -1',
        '"$0" -c "$1" "$2" 2>&1 | head -1',
        '"$0" -c "$1" "$2" > /dev/full 2>&1',
        '"$0" -c "$1" "$2" >&- 2>&-',
    ],
    ids=["stdout", "both", "a full disk", "closed from the start"],
)
def test_a_process_outlives_whoever_reads_it(line, tmp_path):
    codes, done = shell(line, tmp_path, sys.executable, TALKATIVE, tmp_path / "end")
    assert codes[0] == 0, done.stderr
    assert (tmp_path / "end").read_text() == "through"
    assert "Exception" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "cit_scale/train.py --print_config",
        "-m cit_scale runs list --json --runs-dir docs",
        "launchers/runs.py list --runs-dir docs",
    ],
)
def test_a_result_that_a_full_disk_does_not_take_is_an_error_and_one_that_nobody_reads_is_none(command, tmp_path):
    codes, done = shell(f'"$0" {command} > /dev/full', tmp_path, sys.executable)
    assert codes == [6], done.stderr
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr
    codes, done = shell(f'"$0" {command} | head -0', tmp_path, sys.executable)
    assert (codes, done.stderr) == ([0, 0], "")


def test_no_file_takes_the_place_of_a_stream_that_was_closed(tmp_path):
    """Neither here nor in a program that is started."""
    program = "import os, subprocess, sys\nfrom cit_scale.text import outlive_readers\noutlive_readers()\n"
    look = "import os, sys; open(sys.argv[1], 'a').write(' '.join(os.readlink(f'/proc/self/fd/{i}') for i in range(3)))"
    program += f"look = {look!r}\nexec(look)\nopen(sys.argv[1], 'a').write(', ')\n"
    program += "subprocess.run([sys.executable, '-c', look, sys.argv[1]], check=True)"
    shell('"$0" -c "$1" "$2" <&- >&- 2>&-', tmp_path, sys.executable, program, tmp_path / "end")
    assert (tmp_path / "end").read_text() == "/dev/null /dev/null /dev/null, /dev/null /dev/null /dev/null"


def test_what_is_read_arrives_in_order_and_at_once(tmp_path):
    done = subprocess.run([sys.executable, "-c", TALKATIVE, tmp_path / "end"], capture_output=True, text=True)
    assert done.stdout == "".join(f"out {i}\nrich {i}\n" for i in range(20))
    assert done.stderr == "".join(f"err {i}\n" for i in range(20))


def test_unbuffered_output_stays_unbuffered(tmp_path):
    """As deepspeed starts its ranks: what a library prints must not be lost when the process is ended."""
    program = (
        "import os\nfrom cit_scale.text import outlive_readers\noutlive_readers()\nprint('here', end='')\nos._exit(14)"
    )
    done = subprocess.run([sys.executable, "-u", "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (14, "here", "")


def test_a_reader_that_makes_others_wait_is_waited_for(tmp_path):
    """Its end of the pipe may be set not to block: what has no room yet is neither lost nor tried in a circle."""
    program = "import os\nfrom cit_scale.text import outlive_readers\noutlive_readers()\nos.set_blocking(1, False)\n"
    program += "print('x' * 300_000)"
    line = '"$0" -c "$1" | (sleep 1; wc -c)'
    codes, done = shell(line, tmp_path, sys.executable, program)
    assert (codes, done.stdout.strip(), done.stderr) == ([0, 0], "300001", "")


@pytest.mark.slow
def test_a_run_whose_output_nobody_takes_goes_on_to_its_end(tiny_inputs, tmp_path, calm):
    run = TinyRun(tiny_inputs, tmp_path / "runs", "plain")
    line = 'OMP_NUM_THREADS=1 "$0" cit_scale/train.py "$@" 2>&1 | head -1'
    codes, done = shell(line, tmp_path, sys.executable, *run.argv)
    assert codes == [0, 0], done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert_same_end(run, calm("plain"))


def test_the_help_begins_with_the_examples():
    parser = ExampleParser(prog="p", examples=("p one", "p two"))
    parser.add_argument("--long")
    assert parser.format_help().startswith("p one\np two\n\nusage: p")
    with pytest.raises(SystemExit):
        parser.parse_args(["--lon", "1"])


@pytest.mark.parametrize("stream", [io.TextIOWrapper(io.BytesIO(), "ascii"), io.StringIO()])
def test_a_name_that_stdout_cannot_encode_is_printed(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    escape_unencodable()
    print("b\u00e4r", flush=True)  # a StringIO takes every character and cannot be told otherwise
    stream.seek(0)
    assert stream.read() in ("b\\xe4r\n", "b\u00e4r\n")
