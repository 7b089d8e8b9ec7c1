"""Hosts on one machine: network namespaces with an address, a name, a home and an sshd of their own, on one
bridge. Needs root."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


def missing() -> str | None:
    """Why there can be no such hosts here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("/usr/sbin/sshd", "openssh-server"), ("ssh", "openssh-client")):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: apt-get install {package})"
    probe = f"aurora-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return f"network namespaces are not allowed here: {made.stderr.strip()}" if made.returncode else None


def run(*command: str) -> None:
    subprocess.run(command, check=True)


class NetworkHosts:
    """Two or more hosts and the namespace in which the launcher is, all on one bridge.

    Attributes:
        addresses: of the hosts.
        homes: their home folders; everything else is shared, as by a network file system.
        ssh_config: for `ssh -F`.
    """

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self.count = count
        self.tag = f"au{os.getpid()}"
        self.launcher = f"{self.tag}-launcher"
        self.addresses = [f"10.213.7.{number + 1}" for number in range(count)]
        self.homes = [folder / f"host{number}" for number in range(count)]
        self.ssh_config = folder / "ssh_config"

    def in_launcher(self, *command: str) -> list[str]:
        """The command, in the launcher's namespace."""
        return ["ip", "netns", "exec", self.launcher, *command]

    def link(self, number: int, state: str) -> None:
        """Pulls the network cable of a host out (`down`) or puts it in again (`up`)."""
        run(*self.in_launcher("ip", "link", "set", f"{self.tag}v{number}", state))

    @contextlib.contextmanager
    def up(self) -> Iterator["NetworkHosts"]:
        with contextlib.ExitStack() as stack:
            self._namespace(stack, self.launcher)
            run(*self.in_launcher("ip", "link", "add", "bridge0", "type", "bridge"))
            run(*self.in_launcher("ip", "address", "add", "10.213.7.254/24", "dev", "bridge0"))
            run(*self.in_launcher("ip", "link", "set", "bridge0", "up"))
            key = self.folder / "key"
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
            options = [
                "IdentityFile " + str(key),
                "IdentitiesOnly yes",
                "StrictHostKeyChecking accept-new",
                "User root",
            ]
            self.ssh_config.write_text(
                "Host *\n" + "".join(f"  {line}\n" for line in [*options, f"UserKnownHostsFile {self.folder}/known"])
            )
            Path("/run/sshd").mkdir(exist_ok=True)
            for number in range(self.count):
                self._host(stack, number, key)
            for address in self.addresses:
                while subprocess.run(
                    self.in_launcher("ssh", "-F", str(self.ssh_config), address, "true"), capture_output=True
                ).returncode:
                    time.sleep(0.1)
            yield self

    def _namespace(self, stack: contextlib.ExitStack, name: str) -> None:
        run("ip", "netns", "add", name)
        stack.callback(run, "ip", "netns", "del", name)
        run("ip", "-n", name, "link", "set", "lo", "up")

    def _host(self, stack: contextlib.ExitStack, number: int, key: Path) -> None:
        name, home, cable = f"{self.tag}-{number}", self.homes[number], f"{self.tag}v{number}"
        self._namespace(stack, name)
        run("ip", "-n", self.launcher, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "-n", self.launcher, "link", "set", cable, "master", "bridge0", "up")
        run("ip", "-n", name, "address", "add", f"{self.addresses[number]}/24", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        (home / ".ssh").mkdir(parents=True)
        shutil.copy(key.with_suffix(".pub"), home / ".ssh" / "authorized_keys")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / "host_key"))
        (home / "passwd").write_text(
            f"root:x:0:0:root:{home}:/bin/bash\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n"
        )
        # gloo announces the address that the host's own name has.
        (home / "hosts").write_text(f"127.0.0.1 localhost\n{self.addresses[number]} host{number}\n")
        settings = [
            f"ListenAddress {self.addresses[number]}",
            f"HostKey {home}/host_key",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",
        ]
        (home / "sshd_config").write_text(
            "\n".join(
                [
                    *settings,
                    "PasswordAuthentication no",
                    "PermitRootLogin yes",
                    "MaxStartups 100",
                    "Subsystem sftp internal-sftp",
                ]
            )
            + "\n"
        )
        mounts = " && ".join(f"mount --bind {home}/{name} /etc/{name}" for name in ("passwd", "hosts"))
        script = (
            f"mount --make-rprivate / && {mounts} && hostname host{number} && exec /usr/sbin/sshd -D -f "
            f"{home}/sshd_config"
        )
        # A process namespace of its own: when its first process ends, so does all that was started on the host.
        namespaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        daemon = subprocess.Popen(
            ["ip", "netns", "exec", name, *namespaces, "bash", "-c", script], stderr=(home / "sshd.log").open("w")
        )
        stack.callback(daemon.wait)
        stack.callback(daemon.kill)
