"""What is read out of Slurm's answers, and which jobs would never start."""

import os
import pwd

import pytest

from cit_scale.errors import ConfigError
from launchers import slurm
from launchers.partitions import choose, share_of_cores, why_not
from launchers.slurm import (
    Gpus,
    NoSlurmError,
    Partition,
    ask_partitions,
    format_minutes,
    parse_minutes,
    parse_nodes,
    parse_partitions,
    parse_records,
    parse_seconds,
)

# As Slurm 22.05 prints them, but for the numbers.
SCONTROL = """\
PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=30 Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=node[1-8] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=REQUEUE State=UP TotalCPUs=32 TotalNodes=8 SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=32,mem=62.50G,node=8,billing=32
PartitionName=short AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=00:30:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=node[1-2] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=8 TotalNodes=2 SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=8,mem=16000M,node=2,billing=8
PartitionName=gpus AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A DefaultTime=01:00:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=3 MaxTime=2-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=broken[1-4] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=8 TotalNodes=4 SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=8,mem=16000M,node=2,billing=8
"""  # noqa: E501

SCONTROL_NODE = "".join(
    f"NodeName={name} Arch=x86_64 CoresPerSocket=1  CPUAlloc=0 CPUEfctv={cores} CPUTot=128 CPULoad=0.81 "
    f"AvailableFeatures=(null) Gres={gres} NodeAddr={name} OS=Linux 6.1.0 #1 SMP RealMemory=8000 State=IDLE "
    f"Partitions={partitions}  BootTime=2026-11-29T06:40:00 Reason=a=b [root@2026-11-29T06:40:00]\n"
    for name, cores, gres, partitions in (
        ("broken1", 64, "gpu:8", "gpus"),
        ("broken2", 96, "gpu:h100:8(S:0-1)", "gpus"),
        ("broken3", 48, "gpu:a100:2,gpu:h100:2,shard:h100:16", "gpus"),
        ("broken4", 48, "gpu:4(S:0),craynetwork:6", "gpus"),
        ("node1", 4, "(null)", "main,short"),
        ("node2", 4, "(null)", "main,short"),
        ("spare", 4, "(null)", "(null)"),
    )
)

NODES = parse_nodes(SCONTROL_NODE)
MAIN, SHORT, ON_GPUS = parse_partitions(SCONTROL, NODES)


def test_partitions_are_read_with_their_limits():
    assert Partition("main", True, 8, gpus=(0, 0), cores=(4, 4)) == MAIN
    assert Partition("short", False, 2, max_minutes=30, gpus=(0, 0), cores=(4, 4)) == SHORT
    assert (
        Partition("gpus", False, 4, 3, default_minutes=60, max_minutes=2880, gpus=(8, 8, 4, 4), cores=(64, 96, 48, 48))
        == ON_GPUS
    )


def test_cores_that_a_job_cannot_have_do_not_count():
    (part, *_) = parse_partitions(SCONTROL.replace("MaxCPUsPerNode=UNLIMITED", "MaxCPUsPerNode=3"), NODES)
    assert part.cores == (3, 3)
    old = parse_nodes("NodeName=a CPUTot=8 Gres=(null) Partitions=main\n")  # before CPUEfctv
    assert old == {"main": [(8, "(null)")]}


def test_gpus_of_a_kind_are_counted_alone():
    assert ON_GPUS.of_kind("h100").gpus == (0, 8, 2, 0)
    assert ON_GPUS.of_kind("a100").gpus == (0, 0, 2, 0)
    assert ON_GPUS.of_kind(None) is ON_GPUS
    assert "of the nodes of partition gpus 1 have so many GPUs" in why_not(
        ON_GPUS.of_kind("h100"), 2, Gpus.parse("h100:4"), None
    )


@pytest.mark.parametrize(("text", "number", "kind"), [("4", 4, None), ("a100:4", 4, "a100"), ("0", 0, None)])
def test_a_number_of_gpus_is_read_and_written_as_slurm_does(text, number, kind):
    gpus = Gpus.parse(text)
    assert (gpus, gpus.kind, f"{gpus}", str(gpus)) == (number, kind, text, text)


@pytest.mark.parametrize("text", ["", "a100", "a100:", ":4", "-1", "a:b:4", "4.5"])
def test_what_is_no_number_of_gpus_is_refused(text):
    with pytest.raises(ValueError, match="is no number of GPUs; write 4, or a100:4"):
        Gpus.parse(text)


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        (("State=UP", "State=DOWN"), {}, "partition main is down: no job starts there"),
        (("State=UP", "State=INACTIVE"), {}, "partition main is inactive"),
        (
            ("AllowAccounts=ALL", "AllowAccounts=a,b"),
            {"accounts": ["c", "root"]},
            "is c, but partition main is for a, b",
        ),
        (("AllowAccounts=ALL", "AllowAccounts=(null)"), {"accounts": ["c"]}, "is c, but partition main is for none"),
        (("AllowAccounts=ALL", "AllowAccounts=a,b"), {"accounts": ["c", "b", "root"]}, None),  # b stands for c
        (("AllowAccounts=ALL", "AllowAccounts=a,b"), {}, None),  # nobody keeps accounts
        (
            ("AllowAccounts=ALL", "DenyAccounts=c"),
            {"accounts": ["c"]},
            "is c, but partition main is not for that account",
        ),
        (("AllowAccounts=ALL", "DenyAccounts=(null)"), {"accounts": ["c"]}, None),
        (("AllowQos=ALL", "AllowQos=high"), {"qos": "low"}, "--qos=low, but partition main takes high"),
        (("AllowQos=ALL", "AllowQos=high"), {"qos": "High"}, None),
        (("AllowAccounts=ALL", "AllowAccounts=Lab"), {"accounts": ["lab"]}, None),
    ],
)
def test_a_partition_that_is_not_for_this_job_is_told_why(changes, options, expected):
    (part, *_) = parse_partitions(SCONTROL.replace(*changes), NODES)
    found = why_not(part, 1, 0, None, **options)
    assert found is None if expected is None else expected in found


TREE = {"lab3": "lab\nother", "lab,other": "root\n\nroot", "lab": "root", "other": "", "root": ""}
"""By the accounts that are asked for: those above them, which may differ from cluster to cluster."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Lab3", ("lab3", "lab", "other", "root")),
        ("other", ("other",)),  # sbatch refuses it
        (None, ("lab", "root")),
    ],
)
def test_the_accounts_above_a_jobs_are_asked_for(monkeypatch, given, expected):
    def answer(*command):
        assert command[:4] == ("sacctmgr", "--noheader", "--parsable2", "show")
        if command[4:] == ("user", "me", "format=DefaultAccount"):
            return slurm.Answer(command, "lab\n")
        kind, where, wanted = command[4:]
        assert (kind, wanted) == ("association", "format=ParentName")
        # A user's own line has no parent.
        return slurm.Answer(command, f"{TREE.get(where.removeprefix('account='), '')}\n\n")

    monkeypatch.setattr(slurm, "_user", lambda: "me")
    monkeypatch.setattr(slurm, "run_slurm", answer)
    assert slurm.ask_accounts(given) == expected


def test_whose_default_account_counts_is_not_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("LOGNAME", "somebody")
    assert slurm._user() == pwd.getpwuid(os.getuid()).pw_name
    monkeypatch.setattr(slurm.os, "getuid", lambda: 4_000_000_000)
    assert slurm._user() == "4000000000"


@pytest.mark.parametrize(("given", "expected"), [(None, ()), ("lab", ("lab",))])
def test_without_accounting_only_the_account_that_was_typed_is_known(monkeypatch, given, expected):
    complaint = "You are not running a supported accounting_storage plugin"
    monkeypatch.setattr(slurm, "run_slurm", lambda *command: slurm.Answer(command, complaint=complaint))
    assert slurm.ask_accounts(given) == expected


@pytest.mark.parametrize(
    ("partitions", "gpus", "ranks", "cores"),
    [
        ([ON_GPUS], 8, 8, 8),
        ([ON_GPUS], 4, 4, 8),  # 48 cores for 4 GPUs are 12 each, and 64 for 8 are fewer
        ([ON_GPUS], 2, 2, 8),
        ([MAIN], 0, 1, 4),
        ([MAIN], 0, 3, 1),
        ([MAIN], 0, 9, 1),
        ([], 0, 1, None),
    ],
)
def test_a_rank_gets_its_gpus_share_of_the_cores(partitions, gpus, ranks, cores):
    assert share_of_cores(partitions, gpus, ranks) == cores


def test_without_a_time_the_limit_is_the_partitions():
    assert [each.limit_minutes for each in (MAIN, SHORT, ON_GPUS)] == [None, 30, 60]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90), ("90:00", 90), ("90:01", 91), ("12:30:00", 750), ("00:00:30", 1), ("2-0", 2880), ("1-12:30", 2190),
        ("1-00:00:01", 1441), ("UNLIMITED", None), ("NONE", None), ("infinite", None),
    ],
)  # fmt: skip
def test_times_are_read_in_all_of_slurms_spellings(text, minutes):
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:00:08", 8), ("90", 5400), ("90:01", 5401), ("23:59:59", 86_399), ("1-00:00:01", 86_401), ("UNLIMITED", None)],
)
def test_a_duration_is_read_to_the_second(text, seconds):
    assert parse_seconds(text) == seconds


def test_each_line_of_scontrol_is_a_record_of_its_values_by_name():
    records = parse_records("PartitionName=a TRES=cpu=32,node=8 words\n\nPartitionName=b JobDefaults=\n")
    assert records == [{"PartitionName": "a", "TRES": "cpu=32,node=8"}, {"PartitionName": "b", "JobDefaults": ""}]


@pytest.mark.parametrize("text", ["", "1:2:3:4", "2h", "-5", "1.5", "1-"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match=r"is no time; write minutes, HH:MM:SS"):
        parse_minutes(text)


@pytest.mark.parametrize("minutes", [1, 59, 60, 1439, 1440, 10_000, None])
def test_a_time_is_written_as_slurm_reads_it(minutes):
    assert parse_minutes(format_minutes(minutes)) == minutes


def test_a_partition_is_found_by_name_or_as_the_default():
    known = [MAIN, SHORT, ON_GPUS]
    assert choose(known, None) == [MAIN]
    assert choose(known, "gpus,short") == [ON_GPUS, SHORT]
    with pytest.raises(ConfigError, match=r"no partition is called 'gpu'; those there are: main \(the default\), "):
        choose(known, "short,gpu")
    with pytest.raises(ConfigError, match=r"no default partition; choose one with --partition: short, gpus"):
        choose(known[1:], None)


@pytest.mark.parametrize(
    ("partition", "nodes", "gpus", "minutes", "expected"),
    [
        (MAIN, 9, 0, None, "--nodes=9, but partition main has 8"),
        (ON_GPUS, 4, 1, None, "--nodes=4, but partition gpus gives a job at most 3"),
        (ON_GPUS, 3, 8, None, "of the nodes of partition gpus 2 have so many GPUs; the most that one has: 8"),
        (ON_GPUS, 1, 9, None, "of the nodes of partition gpus 0 have so many GPUs; the most that one has: 8"),
        (SHORT, 1, 0, 31, "--time=00:31:00, but partition short allows 00:30:00"),
    ],
)
def test_what_would_never_start_is_told_why(partition, nodes, gpus, minutes, expected):
    assert expected in why_not(partition, nodes, gpus, minutes)


def test_what_fits_is_not_turned_down():
    assert why_not(ON_GPUS, 3, 4, 2880) is None
    assert why_not(SHORT, 2, 0, 30) is None
    assert why_not(Partition("unknown", True, 2), 2, 8, None) is None  # where sinfo says nothing of GPUs


def test_where_there_is_no_slurm_the_other_ways_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSlurmError, match=r"no sbatch on the PATH.*--cluster local.*deepspeed cit_scale/train\.py"):
        ask_partitions()


def test_a_slurm_that_does_not_answer_is_one_line(monkeypatch, tmp_path):
    for name in ("sbatch", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'Unable to contact\nslurm controller' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(NoSlurmError, match=r"Slurm does not answer, scontrol .*: Unable to contact slurm controller$"):
        ask_partitions()


def test_what_names_no_partition_is_none():
    assert parse_partitions("Partitions=0 in the system\n", {}) == []


def test_a_job_that_slurm_does_not_cancel_is_named_with_its_reason(monkeypatch):
    monkeypatch.setattr(slurm, "run_slurm", lambda *command: slurm.Answer(command, complaint="Access denied"))
    with pytest.raises(ConfigError, match="job 7 was not cancelled: Access denied"):
        slurm.cancel_slurm_job("7", now=True)
