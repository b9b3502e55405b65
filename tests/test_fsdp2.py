import subprocess
import sys
from pathlib import Path

WITHOUT_DEEPSPEED = """
import sys

sys.modules["deepspeed"] = None  # as if it were not installed: importing it raises ImportError

from engine_cases import make_engine, numpy_state, update

from cit_scale.distributed.world import World, start

start(World())
engine = make_engine(World(), "fsdp2", 2, "")
_, result = update(engine, World(), 0)
print(result.skipped, int(numpy_state(engine)["optimizer_step"]))
"""


def test_fsdp2_runs_where_deepspeed_is_not_installed():
    tests = Path(__file__).parent
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED],
        env={"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.stdout.split() == ["False", "1"], found.stderr
