"""The package as a wheel, installed into a folder of its own, beside the dependencies of the tests."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def install(folder: Path) -> Path:
    """Build a wheel of the checkout and install it into ``folder / "site"``, for PYTHONPATH. Returns that folder."""
    # A copy: the build writes beside what it builds, and several tests may build at once.
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (REPOSITORY / name).exists():
            (folder / "code" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "code" / name).write_bytes((REPOSITORY / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(folder / "code")]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return site


def environment(site: Path) -> dict[str, str]:
    """In which the installed package is found, and no checkout."""
    return {**os.environ, "PYTHONPATH": str(site)}
