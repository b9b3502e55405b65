"""A real Slurm on this one machine: a controller and several slurmd, each a host of its own with its name and address.

Every node lives in a network namespace behind one bridge, with its own host name, so ranks on two nodes meet across a
network and not over loopback. Needs root, iproute2 and Debian's slurm-wlm and munge; another Slurm than the machine's
own comes from slurm_releases.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import slurm_accounting
from slurm_releases import OWN, Release, entered

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "ip", "nsenter", "unshare")
NODE_PORT, FIRST_CONTROLLER_PORT, FIRST_ACCOUNTING_PORT = 16818, 16900, 17000
PORTABLE_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

CONFIG = """
ClusterName=cit
SlurmctldHost={host}({controller})
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job may not start before its old credentials have expired; the default is two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters={select}
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,preempt_reorder_count=1
ReturnToService=2
KillWait=20
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
"""

HOSTS = (*(f"node{i}" for i in range(1, 9)), "remote1", "broken1", "broken2")
LINES = """
NodeName=node[1-8] NodeAddr=SUBNET.[1-8] CPUs=64 RealMemory=8000 Weight=10
PartitionName=main Nodes=node[1-8] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=short Nodes=node[1-2] MaxTime=30 PriorityTier=1 PreemptMode=OFF
PartitionName=urgent Nodes=node[1-2] PriorityTier=10 PreemptMode=OFF
PartitionName=pair Nodes=node[7-8] PriorityTier=1 PreemptMode=OFF
# A remote node does not see the disk that the others share. Slurm prefers it, so every job there begins badly.
NodeName=remote1 NodeAddr=SUBNET.9 CPUs=64 RealMemory=8000 Weight=1
PartitionName=sea Nodes=node[5-8],remote1 PriorityTier=1 PreemptMode=OFF
# Nodes that claim GPUs they do not have: how those with a broken driver look to a job.
NodeName=broken[1-2] NodeAddr=SUBNET.[10-11] CPUs=64 RealMemory=8000 Gres=gpu:2
PartitionName=gpus Nodes=broken[1-2] PriorityTier=1 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{PORTABLE_PATH}") is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge iproute2"
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    if subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True).returncode:
        return "network namespaces are not allowed here"
    return None


class Cluster:
    """A controller on the login node, and hosts. Use as a context manager.

    hosts: their names; those called remote do not see ``shared``, the folder that all others see as it is. lines: of
    the configuration, which describe nodes and partitions; SUBNET.N is the address of the N-th host. Each GPU of a node
    is a device that does nothing. select: what is counted. release: whose Slurm it is. has_accounts: it keeps accounts,
    in a database.
    """

    def __init__(
        self,
        folder: Path,
        hosts: Sequence[str] = HOSTS,
        lines: str = LINES,
        *,
        select: str = "CR_Core",
        release: Release = OWN,
        has_accounts: bool = False,
    ) -> None:
        self.folder = folder
        self.release = release
        self._number = _make_bridge()
        self._subnet, self._bridge = f"10.213.{self._number}", f"citbr{self._number}"
        self._controller = f"{self._subnet}.254"
        self._lines, self._select = lines.replace("SUBNET", self._subnet), select
        self._accounting_port = FIRST_ACCOUNTING_PORT + self._number if has_accounts else None
        self._inside = contextlib.ExitStack()
        self._enter: list[str] = []
        self.addresses = {name: f"{self._subnet}.{place}" for place, name in enumerate(hosts, 1)}
        self.shared = folder / "shared"
        self.env: dict[str, str] = {
            **os.environ,
            "PATH": f"{os.environ['PATH']}:{PORTABLE_PATH}",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """A command on the login node. Returns what it printed; AssertionError where it fails."""
        done = self.attempt(*command, env=env, cwd=cwd)
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def attempt(
        self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        inside = [*self._enter, "--", "env", f"--chdir={cwd or Path.cwd()}", *command]
        return subprocess.run(inside, env={**self.env, **(env or {})}, capture_output=True, text=True, timeout=120)

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by name."""
        words = self.run("scontrol", "show", "job", "-o", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    @contextlib.contextmanager
    def drained(self, name: str) -> Iterator[None]:
        """Meanwhile no job starts on the node; what runs there goes on."""
        self.run("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=test")
        try:
            yield
        finally:
            self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def kill_node(self, name: str) -> None:
        """As if its power failed: slurmd and everything it started are gone at once."""
        # Only those: the hosts share this machine's processes.
        environments = Path("/proc").glob("[0-9]*/environ")
        started = [int(path.parent.name) for path in environments if _is_of_node(path, name, str(self.folder))]
        self.kill_slurmd(name)
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_slurmd(self, name: str) -> None:
        """The daemon alone; what it started goes on."""
        self._daemons.pop(name).kill()

    def start_node(self, name: str) -> None:
        """slurmd on a host of its own."""
        self._daemons[name] = self._spawn(self.on_node(name, f"exec slurmd -D -N {name}"), name)

    def on_node(self, name: str, script: str) -> list[str]:
        """The command that runs a shell script on a host: in its network, under its name."""
        steps = ["cd /", f"mount --bind {self.folder}/hosts_{name} /etc/hosts", f"hostname {name}", script]
        if name.startswith("remote"):
            steps.insert(0, f"mount -t tmpfs remote {self.shared}")
        # `ip netns exec` would mount a new /sys, without the control groups that slurmd looks for.
        network = f"--net=/run/netns/{self._namespace(name)}"
        return [*self._enter, network, "--", "unshare", "--uts", "--mount", "sh", "-c", " && ".join(steps)]

    def wait_for(self, what: str, holds: Callable[[], bool], timeout_s: float = 60) -> None:
        """timeout_s: on a machine with no more to do than it has cores; on a busier one as much longer."""
        begin = time.monotonic()
        while not holds():
            load = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
            assert time.monotonic() < begin + load * timeout_s, f"{what}: not in {timeout_s} s\n{self._logs()}"
            time.sleep(0.2)

    def _namespace(self, name: str) -> str:
        return f"cit{self._number}-{name}"

    def _port(self, address: str) -> str:
        return f"cit{self._number}p{address.rsplit('.', 1)[1]}"

    def _start(self) -> None:
        self._make_network()
        folder = self.folder
        self._enter = self._inside.enter_context(entered(self.release, folder / "root.log"))
        for name in ("state", "shared", *(f"spool_{node}" for node in self.addresses)):
            (folder / name).mkdir()
        text = CONFIG.format(
            host=os.uname().nodename,
            folder=folder,
            controller=self._controller,
            controller_port=FIRST_CONTROLLER_PORT + self._number,
            node_port=NODE_PORT,
            select=self._select,
        )
        if self._accounting_port:
            text += slurm_accounting.CONFIG.format(folder=folder, port=self._accounting_port)
        (folder / "slurm.conf").write_text(text + self._lines)
        gpus = re.findall(r"^NodeName=(\S+) .*Gres=gpu:(?:(\w+):)?(\d+)", self._lines, re.MULTILINE)
        for number in range(max(int(count) for _, _, count in gpus)):
            os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # for 23.11 it has to be a device
        devices = [
            f"NodeName={name} Name=gpu {kind and f'Type={kind} '}File={folder}/gpu[0-{int(count) - 1}]\n"
            for name, kind, count in gpus
        ]
        (folder / "gres.conf").write_text("".join(devices))
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"socket": "munge.socket", "key-file": key.name, "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={folder / file}" for option, file in files.items()]
        self._daemons["munged"] = self._spawn(
            [*self._enter, "--", "munged", "--foreground", "--force", f"--seed-file={folder}/munge.seed", *options],
            "munged",
        )
        self.wait_for("munged's socket", (folder / "munge.socket").exists)
        if self._accounting_port:
            self._inside.enter_context(slurm_accounting.started(folder, self._accounting_port, self.env))
        self._daemons["slurmctld"] = self._spawn([*self._enter, "--", "slurmctld", "-D", "-c"], "slurmctld")
        for name in self.addresses:
            self.start_node(name)
        self.wait_for("idle nodes", lambda: self._idle() == len(self.addresses))

    def _idle(self) -> int:
        listed = self.attempt("sinfo", "--noheader", "--Node", "--format=%N %t")
        return len({line.split()[0] for line in listed.stdout.splitlines() if line.split()[-1] == "idle"})

    def _spawn(self, command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.out").open("ab") as out:
            return subprocess.Popen(command, env=self.env, stdout=out, stderr=out, start_new_session=True)

    def _make_network(self) -> None:
        _ip(f"addr add {self._controller}/24 dev {self._bridge}")
        _ip(f"link set {self._bridge} up")
        names = {"localhost": "127.0.0.1", os.uname().nodename: self._controller, **self.addresses}
        for node in self.addresses:
            # A host's own name is one of the loopback interface, as on Debian.
            lines = {**names, node: "127.0.1.1"}.items()
            (self.folder / f"hosts_{node}").write_text("".join(f"{address} {name}\n" for name, address in lines))
        for name, address in self.addresses.items():
            space, port = self._namespace(name), self._port(address)
            _ip(f"netns add {space}")
            _ip(f"link add {port} type veth peer name eth0 netns {space}")
            _ip(f"link set {port} master {self._bridge} up")
            for line in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _ip(f"-n {space} {line}")

    def _remove_network(self) -> None:
        for name, address in self.addresses.items():
            space = self._namespace(name)
            _ip(f"link del {self._port(address)}", check=False)
            _ip(f"netns del {space}", check=False)
        _ip(f"link del {self._bridge}", check=False)

    def _stop(self) -> None:
        if "slurmctld" in self._daemons:
            self.attempt("scancel", "--user=root", "--signal=KILL", "--full")
        for name in reversed(list(self._daemons)):
            if name in self.addresses:
                self.kill_node(name)
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        self._inside.close()
        self._remove_network()

    def _logs(self) -> str:
        tails = []
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")]):
            tails.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-8:]))
        return "\n".join(tails)


def _make_bridge() -> int:
    """Make the first bridge that there is not, and return its number, which keeps two clusters apart."""
    for number in range(1, 100):
        if not _ip(f"link add citbr{number} type bridge", check=False).returncode:
            return number
    raise AssertionError("there are 99 bridges of clusters that never ended: ip link del citbr1, ...")


def _is_of_node(environ: Path, name: str, folder: str) -> bool:
    """Whether a process was started by this cluster's slurmd of that name."""
    try:
        values = environ.read_bytes().split(b"\0")
    except OSError:
        return False
    return f"SLURMD_NODENAME={name}".encode() in values and any(folder.encode() in value for value in values)


def _ip(arguments: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {arguments}: {done.stderr}"
    return done
