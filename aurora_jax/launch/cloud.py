"""The queued resource and its TPU VMs, through gcloud. State is read from the cloud; nothing is kept here."""

import subprocess
import sys
import time
from enum import Enum

from aurora_jax.launch.commands import FAILED, Commands, Stop, say
from aurora_jax.launch.options import Options, runtime_version
from aurora_jax.launch.states import Node, QueuedResource, QueuedResourceState, is_about_quota

# encode() because an empty message, {}, which is how spot looks, prints as nothing otherwise.
STATE_FORMAT = (
    'value[separator="|"](state.state,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec[0].multisliceParams.nodeCount,'
    "spot.encode(base64),guaranteed.reserved,state.failedData.error.message)"
)
NODE_FORMAT = 'value[separator="|"](name.basename(),state)'


class Asked(Enum):
    """What came of asking for a queued resource."""

    MADE = "made"
    NO_QUOTA = "no quota"
    REFUSED = "refused"


class NoAnswer(Stop):
    """The cloud did not answer: an error says nothing of what is there, and ends us before something is made twice."""

    def __init__(self, consequence: str = ""):
        super().__init__(f"the cloud did not answer{consequence}", FAILED)


class Cloud:
    """gcloud's commands for one queued resource.

    Args:
        options: of the command line.
        commands: that run or print.
    """

    def __init__(self, options: Options, commands: Commands):
        self._options = options
        self._commands = commands
        self.assumed = QueuedResourceState.ACTIVE
        """In a dry run, the state that the cloud is taken to be in."""

    def queued(self, *words: str) -> list[str]:
        """A command about queued resources."""
        return ["gcloud", "compute", "tpus", "queued-resources", *words, *self._options.location]

    def tpu_vm(self, *words: str) -> list[str]:
        """A command about TPU VMs."""
        return ["gcloud", "compute", "tpus", "tpu-vm", *words, *self._options.location]

    def tpu_vm_all(self, *words: str) -> list[str]:
        """A command for all hosts of a TPU VM at once.

        Only the alpha track has it; the other one goes from host to host, and a pod's hosts must start together.
        """
        everyone = ["--worker=all", "--batch-size=all", "--quiet"]
        return ["gcloud", "alpha", "compute", "tpus", "tpu-vm", *words, *self._options.location, *everyone]

    def read(self) -> QueuedResource:
        """The queued resource; a list that comes back empty is sure. Raises NoAnswer."""
        options = self._options
        printed = self._commands.output(
            self.queued("list", f"--filter=name~/{options.name}$", f"--format={STATE_FORMAT}")
        )
        if printed is None:
            raise NoAnswer
        if options.dry_run:
            return QueuedResource(
                self.assumed, self.assumed.value, options.accelerator_type, options.num_slices, options.provisioning
            )
        return QueuedResource.parse(next(iter(printed.splitlines()), ""))

    def nodes(self) -> list[Node]:
        """The TPU VMs that bear our name, whatever made them. Raises NoAnswer."""
        pattern = f'--filter=name~"/{self._options.name}(-[0-9]+)?$"'
        printed = self._commands.output(self.tpu_vm("list", pattern, f"--format={NODE_FORMAT}"))
        if printed is None:
            raise NoAnswer
        return [Node(name, state) for name, _, state in (line.partition("|") for line in printed.splitlines() if line)]

    def names_of(self, resource: QueuedResource) -> list[str]:
        """Of its TPU VMs, by the cloud's own rule: NAME, or NAME-0, NAME-1 ... for several slices."""
        name = self._options.name
        return [name] if resource.slices == 1 else [f"{name}-{number}" for number in range(resource.slices)]

    def nodes_of(self, resource: QueuedResource, nodes: list[Node]) -> list[Node]:
        """Those that the resource should have; what is not there is said, and counts as lost."""
        state_of = {node.name: node.state for node in nodes}
        return [Node(name, state_of.get(name, "gone")) for name in self.names_of(resource)]

    def address_of(self, node: str) -> str | None:
        """Of its first host; None if the cloud does not answer. In a dry run, a word that says so."""
        printed = self._commands.output(self.tpu_vm("describe", node, "--format=value(networkEndpoints[0].ipAddress)"))
        return f"ADDRESS_OF_{node}" if self._options.dry_run else printed

    def require_same_request(self, resource: QueuedResource) -> None:
        """Raises Stop if what is there is not what is asked for."""
        options = self._options
        if options.accelerator_type and resource.description != options.request:
            raise Stop(
                f"queued resource {options.name} is {resource.description}, and you ask for {options.request}: "
                "choose another --name, or `down` first"
            )

    def ask(self) -> Asked:
        """Makes the queued resource. What exists already is no error: an earlier call may have made it
        without our hearing."""
        options = self._options
        flags = [f"--accelerator-type={options.accelerator_type}", f"--runtime-version={runtime_version(options)}"]
        if options.num_slices == 1:
            flags.append(f"--node-id={options.name}")
        else:
            flags += [f"--node-count={options.num_slices}", f"--node-prefix={options.name}"]
        if options.provisioning != "on-demand":
            flags.append(f"--{options.provisioning}")
        say(f"asking for {options.request} as queued resource {options.name}")
        command = self.queued("create", options.name, *flags, *options.create_flags, "--quiet")
        if options.dry_run:
            self._commands.run(command)
            return Asked.MADE
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        print(done.stdout.strip("\n"), file=sys.stderr, flush=True)
        if done.returncode == 0 or "ALREADY_EXISTS" in done.stdout:
            return Asked.MADE
        return Asked.NO_QUOTA if is_about_quota(done.stdout) else Asked.REFUSED

    def delete_all(self) -> bool:
        """Deletes the queued resource and every VM of its name.

        Returns:
            True when nothing is left that could cost money or hold quota; False if the cloud did not answer or refused.
        """
        options = self._options
        deletion = self.queued("delete", options.name, "--force", "--quiet")
        if options.dry_run:
            self._commands.run(deletion)
            self.read()
            self.nodes()
            return True
        try:
            while (resource := self.read()).state is not QueuedResourceState.ABSENT:
                if resource.state is not QueuedResourceState.DELETING:
                    say(f"deleting queued resource {options.name} ({resource.said}) with its TPU VMs")
                    if not self._commands.run(deletion, to_stderr=True):
                        say("not deleted; trying again")
                    if self.read().state is QueuedResourceState.ABSENT:
                        break
                time.sleep(options.poll)
            for node in self.nodes():
                say(f"deleting TPU VM {node.name}, which was left behind")
                if not self._commands.run(self.tpu_vm("delete", node.name, "--quiet"), to_stderr=True):
                    return False
        except NoAnswer:
            return False
        return True
