"""Three hosts on one machine: namespaces with an address, a name, a hosts file and an sshd each, at one switch.

`Cluster` starts this module as a keeper process, which makes everything, and takes it away again when its standard input
ends: when the test run closes it, and also when the test run is killed. What a killed keeper leaves is swept by the next one.
A host can be taken from the others (its link cut or slowed, or all of it killed) and given back.
Nothing is written to ~/.ssh. Names contain the keeper's process id, so two test runs do not meet.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.processes import ROOT, RunningCommand, clean_environment, start_cli

HOSTS = {"node1": "10.77.0.1", "node2": "10.77.0.2", "node3": "10.77.0.3"}
INTERFACE = "eth0"
SWITCH = "switch"  # a namespace with a bridge, whose ports have the names of the hosts
BRIDGE = "bridge0"
SSHD_TITLE = "sshd: /"  # the one that listens, not those of its sessions
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOSTS_FILES = Path("/etc/netns")  # `ip netns exec NAME` shows /etc/netns/NAME/hosts as /etc/hosts
NAMESPACE = re.compile(rf"longform-(\d+)-(node\d|{SWITCH})")


def missing_device() -> str | None:
    """What this machine lacks to hold the hosts, in words."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    programs = ("ip", "tc", "unshare", "hostname", "sshd", "ssh", "ssh-keygen", "pdsh", "pkill", "pgrep")
    if missing := [name for name in programs if not installed(name)]:
        return f"not installed: {', '.join(missing)}"
    name = f"longform-{os.getpid()}-node0"
    needed = [["netns", "add", name], ["-n", name, "link", "add", BRIDGE, "type", "bridge"]]
    try:
        for words in needed:
            made = subprocess.run([installed("ip"), *words], capture_output=True, text=True)
            if made.returncode:
                return f"`ip {' '.join(words)}` fails: {made.stderr.strip()}"
        slowed = ["-n", name, "qdisc", "add", "dev", "lo", "root", *_rate(1)]
        made = subprocess.run([installed("tc"), *slowed], capture_output=True, text=True)
        return f"`tc qdisc add ... tbf` fails: {made.stderr.strip()}" if made.returncode else None
    finally:
        subprocess.run([installed("ip"), "netns", "delete", name], capture_output=True)


class Cluster:
    """The three hosts, for as long as the `with` block lasts; `run` and `start` act on one of them as its user would."""

    def __enter__(self) -> "Cluster":
        command = [sys.executable, "-m", "tests.cluster.network"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # A session of its own: a Ctrl-C in the terminal must not end the keeper before it has cleaned up.
        self._keeper = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), start_new_session=True, **pipes)
        answer = self._keeper.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"the hosts could not be made (exit code {self._keeper.wait()}), see stderr")
        self.folder = Path(answer)
        self._disturbed: set[str] = set()
        self._served: list[subprocess.Popen] = []
        return self

    def __exit__(self, *_) -> None:
        self._keeper.stdin.close()
        self._keeper.wait(30)
        for service in self._served:
            service.wait(30)

    def namespace(self, host: str) -> str:
        return f"longform-{self._keeper.pid}-{host}"

    def processes(self, host: str, word: str) -> list[psutil.Process]:
        """What runs on a host with this word in its command line."""
        found = []
        for process in _processes_in(self.namespace(host)):
            with contextlib.suppress(psutil.Error):
                if word in process.cmdline():
                    found.append(process)
        return found

    def cut(self, host: str) -> None:
        """Pulls the host's cable: packets vanish, connections stay open on both sides until somebody gives up."""
        self._disturbed.add(host)
        _ip("-n", self.namespace(SWITCH), "link", "set", host, "down")

    def slow(self, host: str, mbit: float) -> None:
        """Lets no more than `mbit` megabits a second from and to the host (a token bucket at both ends of its cable)."""
        self._disturbed.add(host)
        for namespace, device in ((host, INTERFACE), (SWITCH, host)):
            _tc("-n", self.namespace(namespace), "qdisc", "replace", "dev", device, "root", *_rate(mbit))

    def kill(self, host: str) -> None:
        """Takes the host's power: nothing runs there any more, and nobody is told (no connection is closed)."""
        self.cut(host)
        _kill_all_in(self.namespace(host))

    def restore(self, host: str) -> None:
        """The host is there again at full speed with its sshd, whatever was done to it; a killed one as after booting."""
        if not any(_listens(process) for process in _processes_in(self.namespace(host))):
            self._served.append(_start_sshd(self._keeper.pid, self.folder, host))
        for namespace, device in ((host, INTERFACE), (SWITCH, host)):
            if "tbf" in _tc("-n", self.namespace(namespace), "qdisc", "show", "dev", device):
                _tc("-n", self.namespace(namespace), "qdisc", "delete", "dev", device, "root")
        _ip("-n", self.namespace(SWITCH), "link", "set", host, "up")
        self._disturbed.discard(host)

    def restore_all(self) -> None:
        if disturbed := sorted(self._disturbed):
            for host in disturbed:
                self.restore(host)
            _wait_until_reachable(self._keeper.pid, self.folder)

    def serve(self, command: Sequence[str], env: Mapping[str, str], host: str, log: Path) -> None:
        """Starts a service on a host: it is there until the host is killed, or a command ends that `start` began."""
        words, environment = [*_on(self.namespace(host), host), *command], clean_environment(self._variables | env)
        with log.open("ab") as output:
            options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            self._served.append(subprocess.Popen(words, env=environment, **options))

    def ask(self, command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> str:
        """What a short command on the first host says; services go on."""
        words, environment = (
            [*_on(self.namespace("node1"), "node1"), *command],
            clean_environment(self._variables | env),
        )
        done = subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    @property
    def _variables(self) -> dict[str, str | None]:
        return {
            "PATH": os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), SYSTEM_PATH]),
            "HOME": str(self.folder / "home"),
            "GLOO_SOCKET_IFNAME": None,
            "DS_ACCELERATOR": None,
        }

    @contextlib.contextmanager
    def start(
        self,
        command: Sequence[str | os.PathLike[str]],
        cwd: Path,
        env: Mapping[str, str | None] | None = None,
        host: str = "node1",
    ) -> Iterator[RunningCommand]:
        """Starts a command; when the block ends, nothing that it started runs on any host."""
        words = [*_on(self.namespace(host), host), *command]
        try:
            with start_cli(words, env=self._variables | (env or {}), cwd=cwd) as running:
                yield running
        finally:
            for each in HOSTS:
                _kill_all_in(self.namespace(each), spare=_listens)

    def run(self, command: Sequence[str | os.PathLike[str]], cwd: Path, timeout: float = 120, **options):
        """Runs a command to its end, whatever its exit code."""
        with self.start(command, cwd, **options) as running:
            return running.finish(timeout)


def installed(name: str) -> str | None:
    return shutil.which(name, path=SYSTEM_PATH)


def _ip(*words: str) -> str:
    return subprocess.run([installed("ip"), *words], check=True, capture_output=True, text=True).stdout


def _tc(*words: str) -> str:
    return subprocess.run([installed("tc"), *words], check=True, capture_output=True, text=True).stdout


def _rate(mbit: float) -> list[str]:
    return ["tbf", "rate", f"{mbit:g}mbit", "burst", "64kb", "latency", "200ms"]


def _on(namespace: str, host: str) -> list[str]:
    """What turns a command into one of this host; its mounts and its hostname are its own, and its children's."""
    name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
    return [installed("ip"), "netns", "exec", namespace, *name]


def _processes_in(namespace: str) -> list[psutil.Process]:
    found = []
    command = [installed("ip"), "netns", "pids", namespace]
    for pid in subprocess.run(command, capture_output=True, text=True).stdout.split():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(pid)))
    return found


def _listens(process: psutil.Process) -> bool:
    """Whether this is a host's sshd, and not one of its sessions."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).startswith(SSHD_TITLE)
    return False


def _kill_all_in(namespace: str, spare: Callable[[psutil.Process], bool] = lambda process: False) -> None:
    """Kills what runs on a host, except what is to be spared."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        alive = 0
        for process in _processes_in(namespace):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and not spare(process):
                    process.kill()
                    alive += 1
        if not alive:
            return
        time.sleep(0.02)


def _sweep(pid: int) -> None:
    """Take away everything that the process with this id made."""
    for owner, host in NAMESPACE.findall(_ip("netns", "list")):
        if int(owner) == pid:
            _kill_all_in(f"longform-{pid}-{host}")
            subprocess.run([installed("ip"), "netns", "delete", f"longform-{pid}-{host}"], capture_output=True)
    for folder in [*HOSTS_FILES.glob(f"longform-{pid}-*"), _folder(pid)]:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        HOSTS_FILES.rmdir()  # when it is empty


def _folder(pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"longform-{pid}"


def _make_keys(folder: Path) -> None:
    """One key for the hosts, one for the user, an ssh that knows both, earlier on PATH than the real one."""
    for name in ("host", "user"):
        key = ["-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run([installed("ssh-keygen"), *key], check=True)
    host_key = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{name},{address} {host_key}" for name, address in HOSTS.items()))
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user\nIdentitiesOnly yes\nStrictHostKeyChecking yes\n"
        f"UserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nMaxStartups 100\n"
        f"SetEnv PATH={folder}/host_bin:{SYSTEM_PATH}\n"
    )
    (folder / "bin").mkdir()
    _wrap(folder / "bin" / "ssh", f"-F {folder}/ssh_config")
    (folder / "host_bin").mkdir()
    for program in ("pkill", "pgrep"):  # by which `deepspeed` and the supervisor find what runs on a host
        _wrap(folder / "host_bin" / program, "--ns $$ --nslist net")


def _wrap(wrapper: Path, options: str) -> None:
    wrapper.write_text(f'#!/bin/sh\nexec {installed(wrapper.name)} {options} "$@"\n')
    wrapper.chmod(0o755)


def _make_hosts(pid: int, folder: Path) -> None:
    """Namespaces, the switch between them, their /etc/hosts, and two folders that not all of them see."""
    lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in HOSTS.items())]
    switch = f"longform-{pid}-{SWITCH}"
    _ip("netns", "add", switch)
    _ip("-n", switch, "link", "add", BRIDGE, "up", "type", "bridge", "stp_state", "0")
    for host, address in HOSTS.items():
        namespace = f"longform-{pid}-{host}"
        files = HOSTS_FILES / namespace
        files.mkdir(parents=True)
        (files / "hosts").write_text("\n".join(lines) + "\n")
        (files / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody answers there: unknown names fail at once
        _ip("netns", "add", namespace)
        _ip("link", "add", INTERFACE, "netns", namespace, "type", "veth", "peer", "name", host, "netns", switch)
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
        for device in ("lo", INTERFACE):
            _ip("-n", namespace, "link", "set", device, "up")
        _ip("-n", switch, "link", "set", host, "up", "master", BRIDGE)
    for name in ("home", "only_node1", "differs", "differs_node2"):
        (folder / name).mkdir()


def _start_sshd(pid: int, folder: Path, host: str) -> subprocess.Popen:
    """sshd in the host's namespaces: `ip netns exec` gives it mounts of its own, which its sessions inherit."""
    script = ["mount -t tmpfs tmpfs /run", "mkdir /run/sshd"]
    if host != "node1":
        script += [f"mount -t tmpfs tmpfs {folder}/only_node1"]
    if host == "node2":
        script += [f"mount --bind {folder}/differs_node2 {folder}/differs"]
    script += [f"exec {installed('sshd')} -D -e -f {folder}/sshd_config"]
    command = [*_on(f"longform-{pid}-{host}", host), "sh", "-ec", "; ".join(script)]
    with (folder / f"sshd-{host}.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def _wait_until_reachable(pid: int, folder: Path) -> None:
    deadline = time.monotonic() + 20
    for host in HOSTS:
        ssh = [installed("ip"), "netns", "exec", f"longform-{pid}-node1", str(folder / "bin/ssh"), host, "true"]
        while (done := subprocess.run(ssh, capture_output=True, text=True)).returncode:
            if time.monotonic() > deadline:
                log = (folder / f"sshd-{host}.log").read_text()
                raise RuntimeError(f"{host} does not answer: {done.stderr}\n{log}")
            time.sleep(0.1)


def _keep() -> None:
    """The keeper's life: sweep, make, say where, wait for the end of standard input, take away."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    for pid in {int(pid) for pid, _ in NAMESPACE.findall(_ip("netns", "list"))}:
        if not psutil.pid_exists(pid):
            _sweep(pid)
    own = os.getpid()
    folder = _folder(own)
    try:
        folder.mkdir(mode=0o700)
        _make_keys(folder)
        _make_hosts(own, folder)
        for host in HOSTS:
            _start_sshd(own, folder, host)
        _wait_until_reachable(own, folder)
        print(folder, flush=True)
        sys.stdin.read()
    finally:
        _sweep(own)


if __name__ == "__main__":
    _keep()
