"""Slurms that are not this machine's: each in a root folder of a Debian release of its own, made by debootstrap.

A process is in such a root when it sees the release's programs and libraries, and everything else of this machine: its
temporary files, this checkout, the virtual environment. The mounts for that are of a mount namespace of their own, so
nothing has to be undone in the root, which is kept for the next time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "slurmctld,slurmd,slurm-client,munge,procps,iproute2,libstdc++6"
PYTHONS_LIBRARIES = "python3"
"""What a Python of this machine needs of the root comes with the root's own."""

OF_THE_RELEASE = {"bin", "boot", "etc", "lib", "lib32", "lib64", "libx32", "lost+found", "sbin", "usr", "var"}
"""The folders of / that are the root's. All others are this machine's."""


@dataclass(frozen=True)
class Release:
    """slurm: its version. suite: the Debian that has it; None for this machine's own. script: of debootstrap, where it
    has none for the suite.
    """

    slurm: str
    suite: str | None = None
    script: str | None = None

    def __str__(self) -> str:
        return self.slurm

    @property
    def root(self) -> Path | None:
        """Where it is kept, in the user's cache; None for this machine."""
        if self.suite is None:
            return None
        # Not XDG_CACHE_HOME: a test run sets that aside.
        return Path(os.environ.get("CIT_SLURM_ROOTS", "~/.cache/cit_scale_slurm")).expanduser() / self.suite


OWN = Release("own")
RELEASES = (OWN, Release("24.11", "trixie"), Release("newest", "forky", "sid"))


def why_not(release: Release) -> str | None:
    """Why this release cannot be had here, or None."""
    if release.root is None or (release.root / "usr/sbin/slurmctld").exists():
        return None
    if shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        return "debootstrap is not installed, which fetches other Slurms: apt-get install debootstrap"
    return None if mirror() else "apt knows no mirror of Debian from which another Slurm could be fetched"


def mirror() -> str | None:
    """The mirror of Debian that this machine's apt uses."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(found), None)


def make_root(release: Release) -> str | None:
    """Fetch the release's root if it is not there, which takes half a minute. Returns why it cannot be had, or None."""
    root = release.root
    if root is None:
        return None
    root.parent.mkdir(parents=True, exist_ok=True)
    with (root.parent / f"{release.suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this test run may be fetching it
        if (root / "usr/sbin/slurmctld").exists():
            return None
        new = root.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        options = ["--variant=minbase", f"--include={PACKAGES},{PYTHONS_LIBRARIES}"]
        script = [f"/usr/share/debootstrap/scripts/{release.script}"] if release.script else []
        command = ["debootstrap", *options, str(release.suite), str(new), str(mirror()), *script]
        path = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        done = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True)
        if done.returncode:
            return f"debootstrap of Debian {release.suite} failed: {done.stdout.strip().splitlines()[-1:]}"
        for name in mounted_folders():
            (new / name).mkdir(parents=True, exist_ok=True)
        new.rename(root)
    return None


def mounted_folders() -> list[str]:
    """This machine's folders that a process in the root sees, relative to /."""
    names = sorted(path.name for path in Path("/").iterdir() if path.is_dir() and not path.is_symlink())
    return [name for name in names if name not in OF_THE_RELEASE] + ["usr/local", *pythons_folders()]


def pythons_folders() -> list[str]:
    """Of a Python that is Debian's own."""
    if Path(sys.base_prefix) != Path("/usr"):
        return []
    return [f"usr/lib/python{sys.version_info.major}.{sys.version_info.minor}"]


def pythons_names() -> list[str]:
    """Of the same: what it is called on the way from a virtual environment's python to the program itself."""
    names, path = [], Path(sys.executable)
    while pythons_folders():
        if path.is_relative_to("/usr"):
            names.append(str(path))
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return names


@contextmanager
def entered(release: Release, log: Path) -> Iterator[list[str]]:
    """Inside the with block, the words that run a command in the release's root; more options of nsenter's may follow.

    log: what goes wrong meanwhile.
    """
    root = release.root
    if root is None:
        yield ["nsenter"]
        return
    lines = [f"mount --bind {root} {root}"]
    lines += [f"mkdir -p {root}/{name} && mount --rbind /{name} {root}/{name}" for name in mounted_folders()]
    for name in ["/etc/hosts", "/etc/passwd", "/etc/group", *pythons_names()]:
        lines.append(f"touch {root}{name} && mount --bind {name} {root}{name}")
    script = " && ".join([*lines, f"exec chroot {root} sh -c 'echo entered; exec sleep infinity'"])
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as keeper:
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == b"entered\n", log.read_text()
            yield ["nsenter", f"--target={keeper.pid}", "--mount", "--root"]
        finally:
            keeper.kill()
