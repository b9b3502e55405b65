"""The options of launchers/submit.py, from cluster.yaml and the command line; all other arguments go to train.py."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from cit_scale.config import IS_CHECKOUT, RunConfig
from cit_scale.errors import ConfigError, one_line
from cit_scale.recipe import OPTIONS
from cit_scale.text import ExampleParser, positive
from launchers.slurm import Gpus


def cluster_file(env: Mapping[str, str]) -> Path:
    """Where the cluster's options are read: beside this script in a checkout. For an installed package in the user's
    folder for configuration, because installing it anew replaces what stands beside this script.
    """
    if IS_CHECKOUT:
        return Path(__file__).with_name("cluster.yaml")
    return Path(env.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "cit_scale" / "cluster.yaml"


CLUSTER_FILE = cluster_file(os.environ)


@dataclass(frozen=True)
class Options:
    """The values of all options, as parsed from cluster.yaml and the command line. ``parser`` explains each."""

    nodes: int = 1
    min_nodes: int | None = None
    gpus_per_node: Gpus | None = None
    ntasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    setup: Sequence[str] = ()
    container: str | None = None
    max_restarts: int = 3
    signal_delay: int = 300
    sweep: Sequence[str] = ()
    array: int | None = None
    cluster: str = "slurm"
    dry_run: bool = False
    doctor: str | None = None


# Options that a resubmission leaves out: it submits one run of the sweep, and waits for no other job.
NOT_AGAIN = {"sweep", "array", "dependency", "dry_run", "doctor"}
NOT_IN_FILE = {"sweep", "dry_run", "doctor"}

OF_SBATCH = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_GPUS_PER_NODE": "gpus_per_node",
    "SBATCH_MEM_PER_NODE": "mem",
}
"""The variables that sbatch reads as options which are options here, too, and count as if they had been typed."""


EXAMPLES = (
    "python launchers/submit.py --nodes 8 --partition gpu --config cit_base --data.train /data/imagenet/train",
    "python launchers/submit.py --nodes 2 --dry-run",
    "python launchers/submit.py --config cit_small --data.train DIR --sweep lr=0.001,0.002 --sweep seed=0,1",
)
DESCRIPTION = """\
Queue a training run with Slurm, after everything that could fail has been
tried here. Options of this script are listed below; all other arguments are
those of cit_scale/train.py, whose --name names the job, too. Stopped by a time
limit, a preemption or a broken node the job queues itself again and goes on.
--sweep queues an array of runs, each in a folder such as
runs/cit_small-lr=0.001-seed=0.
"""
EPILOG = f"""\
Options that your cluster always needs can stand under their names in
{CLUSTER_FILE}
The command line overrides the file; its --setup replaces the file's list:

    partition: gpu
    account: vision
    gpus-per-node: 8
    cpus-per-task: 12
    time: 24:00:00
    setup:
      - module load cuda

The arguments of train.py are listed by: python -m cit_scale.train --help
"""


class OneLineParser(ExampleParser):
    """Raises ConfigError, one line, instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parser() -> OneLineParser:
    """The parser of submit.py. Its result holds only options that were given; the defaults are those of Options."""
    parser = OneLineParser(
        prog="submit.py",
        examples=EXAMPLES,
        usage="submit.py [OPTION ...] [ARGUMENT OF train.py ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--nodes", type=positive, metavar="N", help="nodes of each run; default 1")
    add("--min-nodes", type=positive, metavar="N", help="start on as few as N nodes where --nodes are not free")
    add("--gpus-per-node", type=gpus, metavar="[KIND:]N", help="default: all that a node of the partition has")
    add("--ntasks-per-node", type=positive, metavar="N", help="ranks on a node without GPUs; default 1")
    add(
        "--cpus-per-task",
        type=positive,
        metavar="N",
        help="cores of each rank; default: its GPU's share of the node's cores, or an equal share",
    )
    add("--mem", help="memory of each node, as Slurm writes it: 64G")
    add("--time", help="minutes, HH:MM:SS or D-HH:MM:SS; default: the partition's limit")
    add("--partition", help="default: the cluster's default partition")
    add("--account", help="account to charge the hours to")
    add("--qos", help="quality of service")
    add("--constraint", help="features that nodes must have")
    add("--exclude", metavar="NAMES", help="nodes to leave out")
    add("--dependency", help="as Slurm writes it: afterok:123")
    add("--setup", action="append", metavar="LINE", help="line of shell to run first: 'module load cuda'; repeatable")
    add(
        "--container",
        metavar="IMAGE",
        help="run the ranks in this container, by pyxis; it needs this project's dependencies and a Python called "
        "python3. Checkout, working folder, run folders, data and weights are mounted at their own paths",
    )
    add(
        "--max-restarts",
        type=not_negative,
        metavar="N",
        help="failures in a row without progress after which to give up; default 3",
    )
    add(
        "--signal-delay",
        type=positive,
        metavar="N",
        help="seconds before the time limit at which a run saves; default 300",
    )
    add(
        "--sweep", action="append", metavar="SETTING=V1,V2", help="one run for each value; repeatable, all combinations"
    )
    add("--array", type=positive, metavar="N", help="how many runs of a sweep at once; default all")
    add(
        "--cluster",
        choices=("slurm", "local", "debug"),
        help="default slurm; local: in the background on this machine; debug: one rank, in this process",
    )
    add("--dry-run", action="store_true", help="check, show plan and batch script, queue nothing")
    add(
        "--doctor",
        nargs="?",
        const="whole",
        choices=("whole", "quick"),
        help="train nothing: run cit-scale doctor on each node, and name the nodes that are unfit or differ",
    )
    return parser


def gpus(text: str) -> Gpus:
    try:
        return Gpus.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def not_negative(text: str) -> int:
    return 0 if text == "0" else positive(text)


def parse(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> tuple[dict[str, Any], list[str]]:
    """The options given in cluster.yaml, in variables of sbatch's or on the command line, and train.py's arguments."""
    options, train_argv = parser().parse_known_args(argv)
    refuse_misspelt(train_argv)
    given = read_cluster_file(CLUSTER_FILE)
    if "doctor" in vars(options):
        given.pop("time", None)  # that is how long runs take
    given |= vars(options)
    if given.get("cluster", Options.cluster) == "slurm":
        given = {**given, **read_environment(env), **vars(options)}
    return given, train_argv


def read_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """The options in sbatch's variables. Raises ConfigError."""
    found: dict[str, Any] = {}
    for name, option in OF_SBATCH.items():
        if name in env:
            try:
                found |= vars(parser().parse_args([f"{spelled(option)}={env[name]}"]))
            except ConfigError as error:
                raise ConfigError(f"{name} in the environment: {error}") from error
    return found


def refuse_misspelt(train_argv: Sequence[str]) -> None:
    """Raise ConfigError for an argument that is no setting of train.py and nearly an option of submit.py."""
    here = [spelled(field.name) for field in dataclasses.fields(Options)]
    trains = {*OPTIONS} | {field.name for field in dataclasses.fields(RunConfig)}
    for argument in train_argv:
        name = argument.removeprefix("--").split("=")[0]
        if argument.startswith("--") and "." not in name and name not in trains:
            near = difflib.get_close_matches(f"--{name}", here, n=1)
            if near:
                raise ConfigError(f"unknown option --{name}; did you mean {near[0]}?")


def read_cluster_file(path: Path) -> dict[str, Any]:
    """The options in cluster.yaml; empty without the file. Raises ConfigError."""
    if not path.exists():
        return {}
    try:
        # Every value is read as text and parsed like a typed option: YAML would read 24:00:00 as a number.
        content = yaml.BaseLoader(path.read_text()).get_single_data() or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no options; write one to a line, as in 'partition: gpu'")
    known = [spelled(field.name)[2:] for field in dataclasses.fields(Options) if field.name not in NOT_IN_FILE]
    argv = []
    for key, value in content.items():
        option = str(key).replace("_", "-")
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)
            raise ConfigError(f"{path}: unknown option {key!r}; did you mean {near[0]}?")
        if isinstance(value, dict) or (isinstance(value, list) and option != "setup"):
            raise ConfigError(f"{path}: {key} takes one value")
        argv += [f"--{option}={each}" for each in (value if isinstance(value, list) else [value])]
    try:
        return vars(parser().parse_args(argv))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def spelled(option: str) -> str:
    """A field of Options as typed: dry_run is --dry-run."""
    return f"--{option.replace('_', '-')}"


def option_argv(given: Mapping[str, Any]) -> list[str]:
    """The options that resubmit one run, with those of cluster.yaml, which may change in between."""
    argv = []
    for name, value in given.items():
        if name not in NOT_AGAIN:
            argv += [f"{spelled(name)}={each}" for each in (value if isinstance(value, list) else [value])]
    return argv
