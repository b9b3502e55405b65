"""The one door to Slurm: the launchers' Slurm commands are run here, and their answers become typed facts.

Only the sbatch of a submission is not run here but by submitit (executors.py), and has no timeout.
One policy for all commands: a command that has not ended after TIMEOUT_S is killed and counts as failed. With
``retry``, a command that met a busy or restarting controller is run again after each of PAUSES_S, a minute in all.
Parsers take text and return facts, so tests need no Slurm for them.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cit_scale.errors import ConfigError

# Slurm's commands give up by themselves after its MessageTimeout, 10 s by default: a longer silence is a hang.
TIMEOUT_S = 60
PAUSES_S = (2, 5, 10, 20, 20)
BUSY = re.compile("timed out|Unable to contact|try again|Connection refused")

GROUP = r" (?=Nodes=\S+ CPU_IDs=)"
"""Begins what ``scontrol show job --details`` says of some of the nodes."""

NO_GPUS = re.compile(r"^gres[:/]gpu:0$")
"""TresPerNode of a job that was asked for with --gpus-per-node=0."""

UNSTARTED = re.compile(r"^(\d+)(?:_\[[^]|]*\])?(?=\|)", re.MULTILINE)
"""What sacct calls a job that is no task: 12, also for an array of which nothing started, or 12_[3-5%2]."""

PENDING = "Job is pending execution"  # what Slurm 22.05 says to requeueing a job that waits or is on its way back

STOPPED_STATES = {"CANCELLED", "COMPLETED", "PREEMPTED", "REVOKED", "TIMEOUT"}
FAILED_STATES = {"BOOT_FAIL", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}


# ---------------------------------------------------------------------------------------------------------------------
# Commands


class SlurmError(ConfigError):
    """A Slurm command failed, did not answer or could not be started. The message: the command and its complaint."""


class NoSlurmError(ConfigError):
    """This machine has no Slurm, or its Slurm does not answer."""


@dataclass(frozen=True)
class Answer:
    """What a command printed. complaint: why it failed, in one line; None where it did not."""

    command: tuple[str, ...]
    stdout: str = ""
    stderr: str = ""
    complaint: str | None = None

    def checked(self) -> str:
        """The standard output. Raises SlurmError where the command failed."""
        if self.complaint is not None:
            raise SlurmError(f"{' '.join(self.command)}: {self.complaint}")
        return self.stdout


def run_slurm(*command: str, stdin: str | None = None, retry: bool = False) -> Answer:
    """Run a Slurm command; the module's docstring has the policy. Never raises for a command that fails.

    retry: for commands that must get through. One that hangs at every try fails after 7 minutes.
    """
    for pause_s in (*PAUSES_S, None):
        answer = _run_once(command, stdin)
        if answer.complaint is None or not retry or pause_s is None or not BUSY.search(answer.complaint):
            break
        time.sleep(pause_s)
    return answer


def _run_once(command: tuple[str, ...], stdin: str | None) -> Answer:
    try:
        # Names and reasons are bytes to Slurm: one that is not UTF-8 must not cost the whole answer.
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except OSError as error:
        return Answer(command, complaint=str(error))
    except subprocess.TimeoutExpired:
        return Answer(command, complaint=f"timed out: no answer within {TIMEOUT_S} s")
    complaint = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    return Answer(command, done.stdout, done.stderr, complaint if done.returncode else None)


# ---------------------------------------------------------------------------------------------------------------------
# Records and times


def parse_records(text: str) -> list[dict[str, str]]:
    """Each line of ``scontrol --oneliner show``, as its values by name."""
    records = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines()]
    return [record for record in records if record]


def parse_job_record(text: str, job_id: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The job's own line of ``scontrol --oneliner show job``: its values by name, and those of each group of its nodes
    (with ``--details``). Empty where there is no such line.

    job_id: a number, or ARRAY_TASK. By the number of an array's first job Slurm shows all of its tasks. What a user
    chose, the job's name and its command, may hold anything that looks like a value, and is left out.
    """
    for line in text.splitlines():
        known, _, rest = re.sub(r" JobName=.*? (?=UserId=\S+\(\d+\) GroupId=)", " ", line).partition(" Command=")
        known += "".join(re.findall(r".*( TresPerNode=\S+)", rest))  # the last one: it stands after the command
        groups = [dict(word.split("=", 1) for word in part.split() if "=" in word) for part in re.split(GROUP, known)]
        record = {name: value for group in reversed(groups) for name, value in group.items()}
        names = {record.get("JobId"), f"{record.get('ArrayJobId')}_{record.get('ArrayTaskId')}"}
        if job_id in names:
            return record, groups[1:]
    return {}, []


def parse_seconds(text: str) -> int | None:
    """A duration as Slurm reads and writes it; None for no limit.

    M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ValueError.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "NONE"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no time; write minutes, HH:MM:SS or D-HH:MM:SS")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_minutes(text: str) -> int | None:
    """``parse_seconds``, rounded up to minutes as Slurm rounds time limits."""
    seconds = parse_seconds(text)
    return None if seconds is None else -(-seconds // 60)


def format_minutes(minutes: int | None) -> str:
    """A time limit as Slurm writes it: [D-]HH:MM:SS, or UNLIMITED."""
    if minutes is None:
        return "UNLIMITED"
    days, rest = divmod(minutes, 24 * 60)
    return f"{f'{days}-' if days else ''}{rest // 60:02d}:{rest % 60:02d}:00"


# ---------------------------------------------------------------------------------------------------------------------
# Partitions and their nodes


@dataclass(frozen=True)
class Partition:
    """max_nodes: the most nodes of one job. Times are in minutes. None: no limit. gpus, cores: of each node, that a job
    can have. state: UP where jobs start. accounts, qos: whose jobs may; not_accounts: whose may not. gres: what the
    GPUs of each node are counted from.
    """

    name: str
    is_default: bool
    nodes: int
    max_nodes: int | None = None
    default_minutes: int | None = None
    max_minutes: int | None = None
    gpus: tuple[int, ...] = ()
    cores: tuple[int, ...] = ()
    state: str = "UP"
    accounts: tuple[str, ...] | None = None
    not_accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] | None = None
    gres: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def of_kind(self, kind: str | None) -> Partition:
        """The partition as it looks to who wants GPUs of this kind alone; None for any."""
        if kind is None:
            return self
        return replace(self, gpus=tuple(count_gpus(text, kind) for text in self.gres))

    @property
    def limit_minutes(self) -> int | None:
        """The time limit of a job that asks for none."""
        return self.default_minutes or self.max_minutes

    @property
    def is_for_some(self) -> bool:
        """Whether it matters to the partition which account a job has."""
        return self.accounts is not None or bool(self.not_accounts)


def ask_partitions() -> list[Partition]:
    """The partitions of this machine's Slurm. Raises NoSlurmError where there is no Slurm or no answer."""
    if shutil.which("sbatch") is None:
        raise NoSlurmError(
            "there is no Slurm here (no sbatch on the PATH); train on this machine with --cluster local or with "
            "'deepspeed cit_scale/train.py', or see with --dry-run what would be submitted"
        )
    try:
        partitions = run_slurm("scontrol", "--all", "show", "partition", "--oneliner").checked()
        nodes = run_slurm("scontrol", "--all", "show", "node", "--oneliner").checked()
    except SlurmError as error:
        raise NoSlurmError(f"Slurm does not answer, {error}") from error
    return parse_partitions(partitions, parse_nodes(nodes))


def parse_partitions(text: str, nodes: Mapping[str, Sequence[tuple[int, str]]]) -> list[Partition]:
    """Read ``scontrol show partition --oneliner``. nodes: from ``parse_nodes``."""
    found = []
    for record in parse_records(text):
        if "PartitionName" not in record:
            continue
        name, most = record["PartitionName"], record.get("MaxNodes", "UNLIMITED")
        most_cores = record.get("MaxCPUsPerNode", "UNLIMITED")
        found.append(
            Partition(
                name=name,
                is_default=record.get("Default") == "YES",
                nodes=int(record.get("TotalNodes", 0)),
                max_nodes=None if most == "UNLIMITED" else int(most),
                default_minutes=parse_minutes(record.get("DefaultTime", "NONE")),
                max_minutes=parse_minutes(record.get("MaxTime", "UNLIMITED")),
                gpus=tuple(count_gpus(gres) for _, gres in nodes.get(name, ())),
                gres=tuple(gres for _, gres in nodes.get(name, ())),
                cores=tuple(
                    min(cores, int(most_cores)) if most_cores.isdigit() else cores for cores, _ in nodes.get(name, ())
                ),
                state=record.get("State", "UP"),
                accounts=_names(record.get("AllowAccounts", "ALL")),
                not_accounts=_names(record.get("DenyAccounts", "(null)")) or (),
                qos=_names(record.get("AllowQos", "ALL")),
            )
        )
    return found


def _names(text: str) -> tuple[str, ...] | None:
    """None for all."""
    return None if text == "ALL" else () if text == "(null)" else tuple(text.split(","))


def parse_nodes(text: str) -> dict[str, list[tuple[int, str]]]:
    """(cores, generic resources) of each node, by partition; reads ``scontrol show node --oneliner``.

    The cores are those that jobs may have: some may be set apart for the system (CPUEfctv, CoreSpecCount).
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for record in parse_records(text):
        cores, gres = record.get("CPUEfctv", record.get("CPUTot", "0")), record.get("Gres", "")
        for partition in record.get("Partitions", "").split(","):
            if partition not in ("", "(null)"):
                found.setdefault(partition, []).append((int(cores), gres))
    return found


def ask_max_array_size() -> int | None:
    """How many tasks an array may have; None where Slurm does not say."""
    answer = run_slurm("scontrol", "show", "config")
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer.stdout, re.MULTILINE)
    return int(match[1]) if match else None


def ask_accounts(account: str | None) -> tuple[str, ...]:
    """The account that a job is charged to, then those above it; empty where that is not known.

    account: --account; None for the user's default. Newer Slurms let a partition's account stand for those below it.
    """
    found: list[str] = []
    # Slurm's accounts are in small letters, however they are typed.
    asked = [account.lower()] if account else _ask_accounting("user", _user(), "format=DefaultAccount")
    while more := [name for name in asked if name not in found]:
        found += more
        asked = _ask_accounting("association", f"account={','.join(more)}", "format=ParentName")
    return tuple(found)


def _user() -> str:
    """By its number, as sbatch knows it, or that number. LOGNAME and USER may be another's, after su."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _ask_accounting(*question: str) -> list[str]:
    """Each name in one column of what ``sacctmgr show`` answers; empty without accounting."""
    answer = run_slurm("sacctmgr", "--noheader", "--parsable2", "show", *question)
    return list(dict.fromkeys(answer.stdout.split())) if answer.complaint is None else []


class Gpus(int):
    """A number of GPUs, maybe of one kind, read and written as Slurm does: 4 or a100:4."""

    kind: str | None = None

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """Raises ValueError."""
        kind, _, number = text.rpartition(":")
        if not re.fullmatch(r"([\w.-]+:)?\d+", text, re.ASCII):
            raise ValueError(f"{text!r} is no number of GPUs; write 4, or a100:4 for those of a kind")
        gpus = cls(number)
        gpus.kind = kind or None
        return gpus

    def __str__(self) -> str:
        return super().__repr__() if self.kind is None else f"{self.kind}:{super().__repr__()}"


def count_gpus(resources: str, kind: str | None = None) -> int:
    """The GPUs among generic resources as Slurm writes them: gpu:8, gpu:h100:8(S:0-1), gpu:a:2(IDX:0-1),gpu:b:1(IDX:4),
    beside others such as shard:32. kind: count those of that kind alone.
    """
    kinds = r"(?::[^:,()]+)??" if kind is None else f":{re.escape(kind)}"
    return sum(map(int, re.findall(rf"(?:^|,)gpu{kinds}:(\d+)(?=[(,]|$)", resources)))


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


@dataclass(frozen=True)
class SlurmJob:
    """state: Slurm's word in capitals. reason: why the job waits, or why it ended."""

    state: str
    nodes: str = ""
    reason: str = ""

    @property
    def is_active(self) -> bool:
        """Whether the job waits, trains or is on its way between the two: any state that is not an end."""
        return self.state not in STOPPED_STATES | FAILED_STATES


def ask_jobs(job_ids: Collection[str]) -> dict[str, SlurmJob] | None:
    """What Slurm knows of these jobs, by id; empty where there is no Slurm, None where Slurm does not answer."""
    # squeue refuses the whole question for one word that is no id, which a damaged file may hold.
    job_ids = [job_id for job_id in job_ids if re.fullmatch(r"\d+(_\d+)?", job_id)]
    if not job_ids or not shutil.which("squeue"):
        return {}
    asked = f"--jobs={','.join(job_ids)}"
    answer = run_slurm("squeue", "--noheader", "--array", "--states=all", "--format=%i|%A|%T|%N|%r", asked)
    # squeue fails with these words when it is asked for one job and has forgotten it. Asked for several, it lists those
    # it knows.
    if answer.complaint is not None and "Invalid job id" not in answer.complaint:
        return None
    jobs = parse_jobs(answer.stdout)
    if forgotten := [job_id for job_id in job_ids if job_id not in jobs]:
        # Asked for a task alone, it does not answer with those that never started: they are one job of the array's.
        asked = ",".join(dict.fromkeys(word for job_id in forgotten for word in (job_id.partition("_")[0], job_id)))
        # A cluster without accounting answers with an error and nothing else.
        answer = run_slurm("sacct", "-X", "-n", "-P", "-o", "JobID,JobIDRaw,State,NodeList", "-j", asked)
        # squeue knows whatever is active: of what it has lost the accounting may never have heard the end.
        jobs |= {job_id: job for job_id, job in parse_jobs(answer.stdout).items() if not job.is_active}
        unstarted = {match[1]: jobs[match[0]] for match in re.finditer(UNSTARTED, answer.stdout) if match[0] in jobs}
        for job_id in forgotten:
            array = job_id.partition("_")[0]
            if array in unstarted:
                jobs.setdefault(job_id, unstarted[array])
    return jobs


def parse_jobs(text: str) -> dict[str, SlurmJob]:
    """Jobs by each of their ids. text: what squeue or sacct prints for ``ask_jobs``.

    A task of an array has two ids: 12_3, by which it was submitted, and one of its own, which its processes see.
    """
    jobs = {}
    for fields in (line.split("|", 4) for line in text.splitlines()):
        if len(fields) >= 4:
            # sacct says "CANCELLED by 1000", and "None assigned" of a job that never had a node.
            job_id, raw_id, state, *rest = fields
            rest = ["" if field in ("None", "None assigned") else field for field in rest]
            jobs[job_id] = jobs[raw_id] = SlurmJob(state.partition(" ")[0], *rest)
    return jobs


def ask_start(script: str) -> str:
    """What sbatch says of a batch script without queueing it, in one line: when it would start, or why it would not.

    A hint, no more: sbatch also turns down a job that would wait for a broken node.
    """
    answer = run_slurm("sbatch", "--test-only", stdin=script)
    said = " ".join(f"{answer.stdout} {answer.stderr}".split()).removeprefix("sbatch: ")
    return said or answer.complaint or ""


def cancel_slurm_job(job_id: str, *, now: bool) -> None:
    """End the job for good, whether it waits or runs. now: without time to save. Raises ConfigError."""
    if now:
        # HUP rather than KILL: scancel turns KILL into TERM, a pause, then KILL. HUP goes to the ranks, which do not
        # catch it, and spares the batch script, which has yet to record how the ranks ended. Slurm refuses a signal to
        # a job that has not started; then there is nothing to kill.
        run_slurm("scancel", "--signal=HUP", job_id)
    answer = run_slurm("scancel", job_id)
    if answer.complaint is not None:
        raise ConfigError(f"job {job_id} was not cancelled: {answer.complaint}")


# What follows is asked at the start and at the end of a job, where nobody could ask again: all of it retries.

JOB_FIELDS = ("JobId", "JobState", "Restarts", "RunTime", "TimeLimit")


def ask_job_record(job_id: str) -> dict[str, str]:
    """All that ``scontrol show job`` says of one job, by name, JOB_FIELDS at least. Raises SlurmError."""
    return _ask_job(job_id, JOB_FIELDS)[0]


def job_id_of(record: Mapping[str, str]) -> str:
    """ARRAY_TASK for a task of an array. record: of ``ask_job_record``."""
    task = record.get("ArrayTaskId")
    return record["JobId"] if task is None else f"{record['ArrayJobId']}_{task}"


def _ask_job(job_id: str, fields: Sequence[str]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """From ``parse_job_record``. Raises SlurmError where a field is missing."""
    answer = run_slurm("scontrol", "show", "job", "--oneliner", "--details", job_id, retry=True)
    record, groups = parse_job_record(answer.checked(), job_id)
    if missing := [name for name in fields if name not in record]:
        raise SlurmError(f"{' '.join(answer.command)}: the answer lacks {', '.join(missing)}")
    return record, groups


@dataclass(frozen=True)
class ThisJob:
    """A job that runs, as its batch script has to know it.

    number: of this job or task alone. job_id: ARRAY_TASK for a task of an array: by the number of the first one Slurm
    means all of them. is_of_array: it is such a task. hosts: in the order of their ranks. ranks: that were asked for,
    of the whole job. ranks_per_node: where that was asked for. cores, gpus: the fewest that a node gives. is_uneven:
    the nodes give unlike numbers of cores.
    """

    number: int
    job_id: str
    is_of_array: bool
    restarts: int
    hosts: tuple[str, ...]
    ranks: int
    ranks_per_node: int | None
    cores: int
    gpus: int
    is_uneven: bool


def ask_this_job(job_id: str) -> ThisJob:
    """job_id: SLURM_JOB_ID of a batch script. Raises SlurmError."""
    record, groups = _ask_job(job_id, ("NodeList", "NumTasks", "Restarts", "CPU_IDs"))
    try:
        return parse_this_job(record, groups, host_names(record["NodeList"]))
    except ValueError as error:
        raise SlurmError(f"scontrol show job {job_id} cannot be read: {error}") from error


def parse_this_job(record: Mapping[str, str], groups: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> ThisJob:
    """record, groups: from ``parse_job_record``. hosts: of the whole job."""
    per_node = record.get("NtasksPerN:B:S:C", "0").partition(":")[0]
    asked_for_none = NO_GPUS.search(record.get("TresPerNode", ""))
    cores = [_count_range(group["CPU_IDs"]) for group in groups]
    return ThisJob(
        number=int(record["JobId"]),
        job_id=job_id_of(record),
        is_of_array="ArrayTaskId" in record,
        restarts=int(record["Restarts"]),
        hosts=tuple(hosts),
        ranks=int(record["NumTasks"]),
        ranks_per_node=int(per_node) if per_node.isdigit() and int(per_node) else None,
        cores=min(cores),
        # With --exclusive a job is given a node's GPUs, although it has asked for none of them.
        gpus=0 if asked_for_none else min(count_gpus(group.get("GRES", "")) for group in groups),
        is_uneven=len(set(cores)) > 1,
    )


def _count_range(text: str) -> int:
    """How many numbers there are in a list such as 0-3,8."""
    ends = [part.split("-") for part in text.split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


def requeue_job(job_id: str) -> None:
    """Put the job back into the queue. Slurm may end the calling process with the job. Raises SlurmError."""
    answer = run_slurm("scontrol", "requeue", job_id, retry=True)
    # An earlier try may have arrived although its answer did not: then Slurm refuses this one as already done.
    if PENDING not in (answer.complaint or ""):
        answer.checked()


def exclude_nodes(job_id: str, record: Mapping[str, str], nodes: Sequence[str]) -> list[str]:
    """Start the job without these nodes from now on. Returns those that it could have had until now.

    record: of ``ask_job_record``. Raises SlurmError.
    """
    text = record.get("ExcNodeList", "(null)")
    before = [] if text == "(null)" else host_names(text)
    # One that can be no name, of a damaged file, would have Slurm refuse all of them.
    names = (node for node in dict.fromkeys(nodes) if re.fullmatch(r"[\w.-]+", node))
    newly = [node for node in names if node not in before]
    if newly:
        excluded = ",".join([*before, *newly])
        run_slurm("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={excluded}", retry=True).checked()
    return newly


def host_names(text: str) -> list[str]:
    """Each host of a list such as node[1-2,7]. Raises SlurmError."""
    return run_slurm("scontrol", "show", "hostnames", text, retry=True).checked().split()
