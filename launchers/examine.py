"""``submit.py --doctor``: examine nodes by a job with one task on each, and name those that are unfit or differ."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cit_scale.doctor.compare import lines_about
from cit_scale.errors import ConfigError, UnfitNodeError
from cit_scale.job import DoctorJob
from launchers.executors import doctor_executor, script_of, submit_doctor
from launchers.options import Options
from launchers.resources import allot, find_partitions
from launchers.slurm import ask_jobs, host_names

MINUTES = "20"  # the first use of a GPU compiles and tunes kernels
POLL_S = 3.0
LATE_S = 15.0  # how long a file of another node may take to appear here


def examine_nodes(options: Options, runs_dir: Path) -> int:
    """Queue the job, wait for it, and print what was found. Returns an exit code of ``errors``."""
    if options.sweep:
        raise ConfigError("--doctor examines nodes and trains nothing; leave out --sweep")
    quick = options.doctor == "quick"
    if options.cluster != "slurm":
        from cit_scale.doctor.commands import main as doctor

        return doctor([*(["--quick"] if quick else []), "--runs_dir", str(runs_dir)])
    # A job of minutes need not be told before its end.
    options = dataclasses.replace(options, time=options.time or MINUTES, signal_delay=10)
    resources = allot(options, find_partitions(options), ())
    folder = runs_dir.absolute() / ".doctor" / time.strftime("%Y%m%d-%H%M%S")
    executor = doctor_executor(options, resources, folder)
    if options.dry_run:
        print(f"\n{script_of(executor)}", end="", flush=True)
        return 0
    job = submit_doctor(executor, DoctorJob(folder, runs_dir.absolute(), quick))
    print(f"submitted as job {job.job_id}: {options.nodes} nodes", flush=True)
    print(f"waits for it; after Ctrl-C it goes on, and what it finds is in {shlex.quote(str(folder))}", flush=True)
    nodes = wait_for(job.job_id, folder, options.nodes)
    records = read_records(folder)
    return report(records, sorted({*nodes} - {*records}), str(job.paths.stdout))


def wait_for(job_id: str, folder: Path, count: int) -> list[str]:
    """Wait until all nodes have answered or the job has ended. Returns the job's nodes, as far as Slurm named them."""
    nodes: Sequence[str] = ()
    ended_at = None
    while len(read_records(folder)) < count:
        known = ask_jobs([job_id])
        found = (known or {}).get(job_id)
        nodes = host_names(found.nodes) if found is not None and found.nodes else nodes
        # None is no answer: the job may go on.
        if known is not None and (found is None or not found.is_active):
            ended_at = ended_at or time.monotonic()
            if time.monotonic() - ended_at > LATE_S:
                break
        time.sleep(POLL_S)
    return list(nodes)


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """By node, what the doctor found there. Its files appear whole."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def report(records: dict[str, dict[str, Any]], missing: Sequence[str], log: str) -> int:
    """Print what was found on each node. Returns an exit code: 0 where all are fit."""
    for node, record in records.items():
        seconds = sum(check["seconds"] for check in record["checks"])
        print(f"{node}: {'fit' if record['fit'] else 'not fit'}, {len(record['checks'])} checks in {seconds:.0f} s")
    for line in lines_about(records, missing):
        print(line)
    if not records and not missing:
        print(f"no node has answered; see {log}")
    is_fit = bool(records) and not missing and all(record["fit"] for record in records.values())
    return 0 if is_fit else UnfitNodeError.exit_code
