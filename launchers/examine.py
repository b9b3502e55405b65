"""``submit.py --doctor``: examine nodes by a job with one task on each, and name those that are unfit or differ."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cit_scale.__main__ import INTERRUPTED
from cit_scale.doctor.compare import lines_about
from cit_scale.errors import ConfigError, TransientError, UnfitNodeError
from cit_scale.job import DoctorJob
from launchers.executors import batch_script, check_log_folder, doctor_executor, submit_doctor
from launchers.options import Options
from launchers.resources import allot, check_nodes_here, find_partitions
from launchers.slurm import NoSlurmError, ask_jobs, host_names

MINUTES = "20"  # the first use of a GPU compiles and tunes kernels
POLL_S = 3.0
SILENT_S = 900.0  # of Slurm, after which nobody waits for it
LATE_S = 15.0  # how long a file of another node may take to appear here


def examine_nodes(options: Options, runs_dir: Path) -> int:
    """Queue the job, wait for it, and print what was found. Returns an exit code of ``errors``."""
    if options.sweep:
        raise ConfigError("--doctor examines nodes and trains nothing; leave out --sweep")
    quick = options.doctor == "quick"
    if options.cluster != "slurm":
        from cit_scale.doctor.commands import main as doctor

        check_nodes_here(options)
        if options.dry_run:
            print("would run cit-scale doctor on this machine", flush=True)
            return 0
        return doctor([*(["--quick"] if quick else []), "--runs_dir", str(runs_dir)])
    # A job of minutes need not be told before its end.
    options = dataclasses.replace(options, time=options.time or MINUTES, signal_delay=10)
    try:
        partitions = find_partitions(options)
    except NoSlurmError as error:
        raise ConfigError(f"{error}; to examine this machine: cit-scale doctor{' --quick' * quick}") from error
    resources = allot(options, partitions, ())
    folder = runs_dir.absolute() / ".doctor" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    check_log_folder(folder)
    executor = doctor_executor(options, resources, folder)
    if options.dry_run:
        print(f"\n{batch_script(executor)}", end="", flush=True)
        return 0
    job = submit_doctor(executor, DoctorJob(folder, runs_dir.absolute(), quick))
    print(f"submitted as job {job.job_id}: {options.nodes} nodes", flush=True)
    try:
        names = wait_for(job.job_id, folder, options.nodes)
    except KeyboardInterrupt:
        print(f"the job goes on, and writes what it finds to {folder}; to end it: scancel {job.job_id}", flush=True)
        return INTERRUPTED
    records = read_records(folder)
    return report(records, sorted({*names} - {*records}), options.nodes, str(job.paths.stdout))


def wait_for(job_id: str, folder: Path, count: int) -> list[str]:
    """Wait until all nodes have answered or the job has ended. Returns the job's nodes, as far as Slurm named them."""
    nodes: Sequence[str] = ()
    ended_at, answered_at = None, time.monotonic()
    while sum(record["whole"] for record in read_records(folder).values()) < count:
        known = ask_jobs([job_id])
        found = (known or {}).get(job_id)
        nodes = host_names(found.nodes) if found is not None and found.nodes else nodes
        # None is no answer: the job may go on.
        answered_at = answered_at if known is None else time.monotonic()
        if time.monotonic() - answered_at > SILENT_S:
            raise TransientError(f"Slurm has not answered for {SILENT_S:.0f} s; what nodes have found is in {folder}")
        if known is not None and (found is None or not found.is_active):
            ended_at = ended_at or time.monotonic()
            if time.monotonic() - ended_at > LATE_S:
                break
        time.sleep(POLL_S)
    return list(nodes)


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """By node, what the doctor found there. Its files appear whole."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def report(records: dict[str, dict[str, Any]], missing: Sequence[str], count: int, log: str) -> int:
    """Print what was found on each node. Returns an exit code: 0 where all are fit.

    missing: names of nodes without an answer, as far as they are known. count: of nodes in all.
    """
    for node, record in records.items():
        seconds = sum(check["seconds"] for check in record["checks"])
        print(f"{node}: {verdict(record)}, {len(record['checks'])} checks in {seconds:.0f} s")
    for line in lines_about(records, missing):
        print(line)
    if len(records) < count:
        print(f"{len(records)} of {count} nodes have answered; see {log}")
    is_fit = len(records) == count and all(record["fit"] and record["whole"] for record in records.values())
    return 0 if is_fit else UnfitNodeError.exit_code


def verdict(record: dict[str, Any]) -> str:
    if not record["whole"]:
        return f"not fit: it did not get beyond {record['checks'][-1]['name']}"
    return "fit" if record["fit"] else "not fit"
