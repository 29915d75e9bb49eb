"A real Slurm of two nodes on this machine, for tests: slurmctld, slurmd and munge have to be installed."

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "munge")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={port}
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs={cpus} Weight=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={last} CPUs={cpus} Weight=1 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def explain_absence() -> str:
    "Return why no Slurm can be started here; empty if it can."
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no Slurm is installed ({missing[0]} is missing): apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "the daemons of Slurm need root"


def ask(*command: str) -> str:
    "Return what a command prints."
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def wait_until(what, seconds: float = 120):
    "Wait until `what()` is true and return it."
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


class Cluster:
    "Two nodes, n1 and n2, with processors for a few small jobs each, whether the machine has as many or not."

    def __init__(self, folder: Path, cpus: int = 4):
        self.folder = folder
        (folder / "state").mkdir()
        host, port = socket.gethostname().split(".")[0], 20_000 + 4 * (os.getpid() % 2_500)
        text = CONFIGURATION.format(folder=folder, cpus=cpus, host=host, port=port, first=port + 1, last=port + 2)
        (folder / "slurm.conf").write_text(text)
        self.environment = dict(SLURM_CONF=str(folder / "slurm.conf"))
        os.environ |= self.environment
        self.start_munge()
        self.start("slurmctld")
        self.start_node("n1")
        self.start_node("n2")
        wait_until(lambda: ask("sinfo", "-h", "-o", "%D", "-t", "idle").strip() == "2", 60)

    def start(self, *command: str):
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def start_munge(self):
        "Start a munge of our own: the machine's may run, and is not ours to stop."
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {"--key-file": key.name, "--socket": "munge.socket", "--pid-file": "munge.pid"}
        names |= {"--log-file": "munge.log", "--seed-file": "munge.seed"}
        self.start("munged", "--force", *(f"{option}={self.folder / name}" for option, name in names.items()))

    def start_node(self, name: str):
        "Start a node, the first time or after `kill_node`."
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        self.start("slurmd", "-N", name)

    def kill_node(self, name: str):
        "Kill the daemon of a node and all processes of its jobs, as a power cut would, and tell the controller."
        tasks = [process for process in psutil.process_iter() if self.is_on_node(process, name)]
        steps = {task.parent() for task in tasks}  # before their tasks, so that they cannot report anything
        daemon = psutil.Process(int((self.folder / f"{name}.pid").read_text()))
        for process in [daemon, *(step for step in steps if step and step.name() == "slurmstepd"), *tasks]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        ask("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")

    def is_on_node(self, process: psutil.Process, name: str) -> bool:
        "Whether a process belongs to a job of this cluster on node `name`."
        return self.is_ours(process, SLURMD_NODENAME=name)

    def is_ours(self, process: psutil.Process, **variables: str) -> bool:
        "Whether another process was started with the environment of this cluster, and `variables`."
        try:
            found = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False
        return process.pid != os.getpid() and (self.environment | variables).items() <= found.items()

    def stop(self):
        "Cancel all jobs and end the daemons that this object started."
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], capture_output=True)
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        time.sleep(1)
        for path in self.folder.glob("*.pid"):
            with suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGTERM)
        _, left = psutil.wait_procs([p for p in psutil.process_iter() if self.is_ours(p)], 5)
        for process in left:  # a daemon waits for its jobs, and a job for its minute
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for name in self.environment:
            os.environ.pop(name, None)
