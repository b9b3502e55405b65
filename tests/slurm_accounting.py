"""Slurm's accounting on this one machine: slurmdbd over a MariaDB of its own, both on the loopback address."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db")
START_S = 60
MOST_CLUSTERS = 100  # whose slurmdbd listen one port after the other; their databases on the ports after those

# The controller forgets an ended job at once: then the accounting alone knows it.
CONFIG = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations,limits,qos
MinJobAge=2
"""
DAEMON_CONFIG = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={port}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""
USER = "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm';\nGRANT ALL ON slurm.* TO slurm@'127.0.0.1';\n"


def why_not() -> str | None:
    """Why there can be no accounting here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"{', '.join(missing)} not installed: apt-get install slurmdbd mariadb-server" if missing else None


@contextmanager
def started(folder: Path, port: int, env: Mapping[str, str]) -> Iterator[None]:
    """Inside the with block slurmdbd answers at the port.

    folder: has slurm.conf and munge's socket. env: of Slurm's commands.
    """
    database_port = port + MOST_CLUSTERS
    settings = folder / "slurmdbd.conf"
    settings.write_text(DAEMON_CONFIG.format(folder=folder, port=port, database_port=database_port))
    settings.chmod(0o600)
    (folder / "user.sql").write_text(USER)
    options = ["--no-defaults", "--user=root", f"--datadir={folder}/database"]
    files = {"socket": "database.socket", "pid-file": "database.pid", "init-file": "user.sql"}
    address = ["--bind-address=127.0.0.1", f"--port={database_port}", "--skip-name-resolve"]
    database = ["mariadbd", *options, *(f"--{name}={folder / file}" for name, file in files.items()), *address]
    subprocess.run(["mariadb-install-db", *options], env=env, check=True, capture_output=True)
    # Each waits for the one before: slurmdbd needs its database, the controller needs slurmdbd.
    with (
        _running(database, database_port, folder / "mariadbd.out", env),
        _running(["slurmdbd", "-D"], port, folder / "slurmdbd.out", env),
    ):
        yield


@contextmanager
def _running(command: Sequence[str], port: int, log: Path, env: Mapping[str, str]) -> Iterator[None]:
    """Inside the with block the daemon answers at its port."""
    with log.open("wb") as out, subprocess.Popen(command, env=env, stdout=out, stderr=out) as daemon:
        try:
            deadline = time.monotonic() + START_S
            while not _answers(port):
                failed = daemon.poll() is not None or time.monotonic() > deadline
                assert not failed, f"{command[0]} does not answer: {log.read_text(errors='replace')[-2000:]}"
                time.sleep(0.1)
            yield
        finally:
            daemon.kill()


def _answers(port: int) -> bool:
    with socket.socket() as door:
        return door.connect_ex(("127.0.0.1", port)) == 0
