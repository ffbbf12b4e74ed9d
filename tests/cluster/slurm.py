"""A real Slurm on the three hosts of `tests.cluster.network`: a controller on the first, a node on each."""

import time
from pathlib import Path

from tests.cluster.network import HOSTS, Cluster, installed

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "sinfo")
CONFIGURATION = """
ClusterName=longform
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=10
ReturnToService=2
NodeName=node[1-3] CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""
"""Who asks is believed; a node that says nothing for ten seconds is lost; a job may begin again after five."""
NO_CONTROL_GROUPS = "CgroupPlugin=cgroup/v1\n"  # which is not asked for any: the hosts have none mounted


def missing_slurm() -> str | None:
    """Which of Slurm's programs this machine lacks, in words."""
    missing = [name for name in PROGRAMS if not installed(name)]
    return f"not installed: {', '.join(missing)}" if missing else None


class Slurm:
    """Slurm until a command ends that `cluster.start` began, or the cluster; a killed host's node is started by `boot`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._folder = cluster, cluster.folder / "slurm"
        self._folder.mkdir()
        (self._folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self._folder))
        (self._folder / "cgroup.conf").write_text(NO_CONTROL_GROUPS)
        self._variables = {"SLURM_CONF": str(self._folder / "slurm.conf"), "USER": "root"}
        self._serve(["slurmctld", "-D", "-c"], "node1")
        for host in HOSTS:
            self.boot(host)
        self._wait_until_idle()

    def boot(self, host: str) -> None:
        self._serve(["slurmd", "-D", "-N", host], host)

    def tell(self, *command: str, cwd: Path | None = None) -> str:
        """What one of Slurm's commands prints, on the first host."""
        return self._cluster.ask(command, self._variables, cwd)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.tell("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _serve(self, command: list[str], host: str) -> None:
        self._cluster.serve(command, self._variables, host, self._folder / f"{command[0]}-{host}.log")

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                found = self.tell("sinfo", "--noheader", "--format=%t %D").split()
            except RuntimeError as error:  # the controller does not answer yet
                found = [str(error)]
            if found == ["idle", str(len(HOSTS))]:
                return
            if time.monotonic() > deadline:
                logs = "\n".join(log.read_text() for log in sorted(self._folder.glob("*.log")))
                raise RuntimeError(f"Slurm's nodes are not ready: {' '.join(found)}\n{logs}")
            time.sleep(0.2)
