"""The hosts of a run: those of TPU VMs, reached through gcloud, or machines of --hosts, reached by ssh. All
are asked at once."""

import abc
from collections.abc import Callable

from aurora_jax.launch.cloud import Cloud
from aurora_jax.launch.commands import Answer, Commands, Stop, quoted, to_stdout
from aurora_jax.launch.options import Options
from aurora_jax.launch.states import QueuedResource

SSH_WAY = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15")
MEGASCALE_PORT = 8081
Show = Callable[[str], None]


class Hosts(abc.ABC):
    """All hosts of a run. A place is what one command reaches: a machine of --hosts, or a slice with all its hosts."""

    def __init__(self, options: Options, commands: Commands):
        self._options = options
        self._commands = commands

    @property
    @abc.abstractmethod
    def places(self) -> list[str]:
        """Names, in order."""

    @abc.abstractmethod
    def _on(self, place: str, remote: str) -> list[str]:
        """The command that runs one on all hosts of a place."""

    @abc.abstractmethod
    def _copy(self, place: str, archive: str) -> list[str]:
        """The command that copies a file into the home folder of all hosts of a place."""

    @abc.abstractmethod
    def variables(self) -> list[list[str]] | None:
        """NAME=VALUE by place: how the processes of a run find each other; None if that could not be found out."""

    @abc.abstractmethod
    def one(self, remote: str) -> None:
        """Becomes a command on the host of --worker and --slice; a shell if it is empty."""

    def everywhere(self, remote: str, show: Show | None = to_stdout, limit: float | None = None) -> Answer:
        """Runs a command on every host."""
        return self._commands.everywhere({place: self._on(place, remote) for place in self.places}, show, limit)

    def copy(self, archive: str, show: Show | None = to_stdout) -> Answer:
        """Copies a file to every host."""
        return self._commands.everywhere({place: self._copy(place, archive) for place in self.places}, show)

    def start(self, show: Show | None = to_stdout, *, again: bool = False) -> bool:
        """Starts the run on every host: on those that run it already, nothing happens."""
        options = self._options
        variables = self.variables()
        if variables is None:
            return False
        everyone = [f"AURORA_HEARTBEAT_SECONDS={options.heartbeat}", *options.env]
        action = [*(["--again"] if again else []), *options.train]
        starts = {
            place: self._on(
                place,
                f"env {quoted([*everyone, *own])} bash {options.remote_dir}/code/launch_tpu.sh on-host start "
                f"{quoted(action)}",
            )
            for place, own in zip(self.places, variables, strict=True)
        }
        return self._commands.everywhere(starts, show).well

    def on_host(self, fallback: str, *words: str) -> str:
        """A command of `on-host`, for hosts that may have nothing yet: then they run `fallback`."""
        script = f"{self._options.remote_dir}/code/launch_tpu.sh"
        return f"if [ -f {script} ]; then bash {script} on-host {quoted(words)}; else {fallback}; fi"

    def status(self, show: Show | None = None, limit: float | None = None) -> Answer:
        """A line of every host, as `supervise.Status` makes it."""
        return self.everywhere(
            self.on_host('echo "aurora-status $(hostname) none, not set up"', "status", *self._options.train),
            show,
            limit,
        )

    def stop(self, show: Show | None = to_stdout) -> bool:
        """Ends the run everywhere."""
        return self.everywhere(self.on_host("true", "stop"), show).well


class SshHosts(Hosts):
    """Machines of --hosts."""

    @property
    def places(self) -> list[str]:
        return list(self._options.hosts)

    def _on(self, place: str, remote: str) -> list[str]:
        return ["ssh", *self._options.ssh_options, *SSH_WAY, place, remote]

    def _copy(self, place: str, archive: str) -> list[str]:
        return ["scp", "-q", *self._options.ssh_options, *SSH_WAY, archive, f"{place}:{archive.rpartition('/')[2]}"]

    def variables(self) -> list[list[str]]:
        places = self.places
        if len(places) == 1:
            return [[]]
        coordinator = self._options.coordinator or places[0].rpartition("@")[2]
        shared = [f"JAX_COORDINATOR_ADDRESS={coordinator}:{self._options.port}", f"JAX_NUM_PROCESSES={len(places)}"]
        return [[*shared, f"JAX_PROCESS_ID={number}"] for number in range(len(places))]

    def one(self, remote: str) -> None:
        worker, places = self._options.worker, self.places
        if not worker.isascii() or not worker.isdigit() or int(worker) >= len(places):
            raise Stop(f"--worker {worker}: there are {len(places)} hosts, from 0")
        terminal = [] if remote else ["-t"]
        self._commands.become(
            ["ssh", *terminal, *self._options.ssh_options, places[int(worker)], *([remote] if remote else [])]
        )


class TpuHosts(Hosts):
    """Hosts of the TPU VMs of a queued resource."""

    def __init__(self, options: Options, commands: Commands, cloud: Cloud, resource: QueuedResource):
        super().__init__(options, commands)
        self._cloud = cloud
        self._resource = resource

    @property
    def places(self) -> list[str]:
        return self._cloud.names_of(self._resource)

    def _on(self, place: str, remote: str) -> list[str]:
        return self._cloud.tpu_vm_all("ssh", place, f"--command={remote}")

    def _copy(self, place: str, archive: str) -> list[str]:
        return self._cloud.tpu_vm_all("scp", archive, f"{place}:{archive.rpartition('/')[2]}")

    def variables(self) -> list[list[str]] | None:
        places = self.places
        if len(places) == 1:
            return [["AURORA_DISTRIBUTED=auto"]]
        address = self._cloud.address_of(places[0])
        if address is None:
            return None
        return [
            [
                "AURORA_DISTRIBUTED=auto",
                f"MEGASCALE_COORDINATOR_ADDRESS={address}:{MEGASCALE_PORT}",
                f"MEGASCALE_NUM_SLICES={len(places)}",
                f"MEGASCALE_SLICE_ID={number}",
                f"MEGASCALE_PORT={MEGASCALE_PORT}",
            ]
            for number in range(len(places))
        ]

    def one(self, remote: str) -> None:
        options, name = self._options, self._options.name
        node = name if self._resource.slices == 1 else f"{name}-{options.slice}"
        if options.worker == "all":
            self._commands.become(self._cloud.tpu_vm_all("ssh", node, f"--command={remote}"))
        else:
            command = [f"--command={remote}"] if remote else []
            self._commands.become(self._cloud.tpu_vm("ssh", node, f"--worker={options.worker}", *command))
