"""`watch`: looks, decides (`decision.py`) and acts, until the run is done. It may be killed at any time: it
keeps nothing."""

import time
from collections import Counter

from aurora_jax.launch import decision, deployment
from aurora_jax.launch.cloud import Asked, Cloud, NoAnswer
from aurora_jax.launch.commands import BAD_INPUT, FAILED, Commands, Stop, say, to_stderr
from aurora_jax.launch.decision import CloudAction, HostsAction
from aurora_jax.launch.hosts import Hosts, SshHosts, TpuHosts
from aurora_jax.launch.options import Options
from aurora_jax.launch.states import HostStatus, NodeHealth, QueuedResource, QueuedResourceState, health_of

LONGEST_BACKOFF = 1800.0
"""Seconds between two requests when there is no quota, at most."""
NO_PROGRESS, UNREACHABLE = 3, 4
"""Exit statuses of `watch`."""


class Watch:
    """One run, brought to its end.

    Args:
        options: of the command line.
        commands: that run or print.
    """

    def __init__(self, options: Options, commands: Commands):
        self._options = options
        self._commands = commands
        self._cloud = Cloud(options, commands)
        self._limits = decision.Limits(options.fruitless_starts or None, options.unreachable or None)
        self._memory = decision.Memory()
        self._backoff = options.poll
        self._said_state = ""
        self._said_hosts = ""
        self._given = deployment.resolve(options.commit)
        self._commit: str | None = None
        """The code of the run, once it is known; from then on it stays."""

    def run(self) -> int:
        """Returns the exit status. Raises Stop."""
        if self._options.hosts:
            hosts = SshHosts(self._options, self._commands)
            while (status := self._look_at_hosts(hosts)) is None:
                time.sleep(self._options.poll)
            return status
        while True:
            try:
                resource = self._cloud.read()
                nodes = self._cloud.nodes()
            except NoAnswer:
                say("the cloud did not answer; looking again")
                time.sleep(self._options.poll)
                continue
            status, pause = self._act(
                resource, bool(nodes), self._health(resource, self._cloud.nodes_of(resource, nodes))
            )
            if status is not None:
                return status
            time.sleep(pause)

    def _health(self, resource: QueuedResource, nodes: list) -> NodeHealth:
        if resource.state is not QueuedResourceState.ACTIVE:
            return NodeHealth.COMING
        for node in nodes:
            if node.health is NodeHealth.LOST:
                say(f"TPU VM {node.name} is {node.state}")
        return health_of(nodes)

    def _act(self, resource: QueuedResource, nodes_there: bool, health: NodeHealth) -> tuple[int | None, float]:
        """The exit status, or None and the seconds until the next look."""
        options = self._options
        if resource.state is not QueuedResourceState.ABSENT:
            self._cloud.require_same_request(resource)
        if resource.said != self._said_state:
            say(f"queued resource {options.name}: {resource.said} {resource.reason}".rstrip())
        self._said_state = resource.said
        action = decision.about_cloud(resource, nodes_there, health, self._memory, self._limits)
        if action is CloudAction.LOOK_AT_HOSTS:
            self._backoff = options.poll
            return self._look_at_hosts(TpuHosts(options, self._commands, self._cloud, resource)), options.poll
        if action is CloudAction.GIVE_UP:
            return self._give_up(
                f"{self._memory.fruitless} starts in a row ended without a new checkpoint", NO_PROGRESS
            ), 0
        if action is CloudAction.ASK:
            return None, self._ask()
        if action is CloudAction.WAIT:
            return None, options.poll
        pause = 0.0 if action is CloudAction.DELETE else options.poll
        if action is CloudAction.DELETE_FOR_QUOTA:
            pause = self._backoff
            say(f"no quota: {resource.reason}; asking again in {pause:g} s")
            self._back_off()
        if not self._cloud.delete_all():
            say("not deleted; trying again")
            return None, options.poll
        self._memory = self._memory.after_loss()
        return None, pause

    def _ask(self) -> float:
        asked = self._cloud.ask()
        if asked is Asked.MADE:
            return self._options.poll
        pause = self._backoff
        why = f"no quota for {self._options.request} now" if asked is Asked.NO_QUOTA else "the request was refused"
        say(f"{why}; asking again in {pause:g} s")
        self._back_off()
        return pause

    def _back_off(self) -> None:
        self._backoff = min(2 * self._backoff, LONGEST_BACKOFF)

    def _look_at_hosts(self, hosts: Hosts) -> int | None:
        """The exit status; None where the watch goes on."""
        asked = time.monotonic()
        answer = hosts.status(limit=self._limits.unreachable)
        found = [status for line in answer.lines if (status := HostStatus.parse(line)) is not None]
        known = self._memory.known
        action, self._memory = decision.about_hosts(
            found, all_answered=answer.well, asked=asked, now=time.monotonic(), memory=self._memory, limits=self._limits
        )
        if not answer.well:
            if action is HostsAction.UNREACHABLE:
                to_stderr("\n".join(answer.lines))
                silent = [host for host in known if host not in {status.host for status in found}]
                names = ", ".join([*answer.failed, *(f"host {host}" for host in silent)])
                return self._give_up(
                    f"not all hosts have answered for {self._options.unreachable:g} s ({names}); nothing was stopped",
                    UNREACHABLE,
                )
            say("not all hosts answer; looking again")
            return None
        self._say_states(found)
        if action is HostsAction.OTHER_RUN:
            raise Stop("another run is going on on these hosts: `stop` it first")
        if action in (HostsAction.GO_ON, HostsAction.START, HostsAction.START_AGAIN):
            self._pin(found)
        if action in (HostsAction.START, HostsAction.START_AGAIN):
            well = self._start(hosts, again=action is HostsAction.START_AGAIN)
            if not well:
                say("not started on all hosts; trying again")
            self._memory = self._memory.after_start(well=well)
        if action is HostsAction.DONE:
            say("the run is done")
            return self._end_well()
        if action is HostsAction.STOPPED:
            say("stopped by `stop`; `run` with the same command continues the run")
            return self._end_well()
        if action is HostsAction.WRONG_INPUT:
            to_stderr("\n".join(status.line for status in found if status.state.value == "failed"))
            say("wrong input: stopping all hosts")
            hosts.stop(to_stderr)
            self._say_costs()
            return BAD_INPUT
        if action is HostsAction.NO_PROGRESS:
            to_stderr("\n".join(status.line for status in found))
            say("stopping all hosts")
            hosts.stop(to_stderr)
            return self._give_up(
                f"{self._memory.fruitless} starts in a row ended without a new checkpoint (`logs` says why, "
                "`run` begins anew)",
                NO_PROGRESS,
            )
        return None

    def _say_states(self, found: list[HostStatus]) -> None:
        count = Counter(status.state.value for status in found)
        states = ", ".join(f"{state} on {number}" for state, number in sorted(count.items()))
        if states != self._said_hosts:
            say(f"hosts: {states}")
        self._said_hosts = states

    # ---------------------------------------------------------------------------------------------- the code of the run

    def _pin(self, found: list[HostStatus]) -> None:
        """Takes the code that the hosts have this very run from; --commit is for the first setup, unless it
        names a commit by its hash."""
        codes = {status.code for status in found if status.code is not None}
        if self._commit is not None or not codes:
            return
        if deployment.is_hash(self._options.commit, self._given):
            others = sorted(code for code in codes if not self._given.startswith(code))
            going = [status for status in found if status.code in others and status.state in decision.GOING]
            if going:
                raise Stop(
                    f"the run is going on with the code at {going[0].code} on {going[0].host}, and --commit "
                    f"says {self._given[:12]}: "
                    "`stop` it first, or leave --commit out"
                )
            self._commit = self._given
            if others:
                say(f"the run moves from the code at {' and '.join(others)} to {self._given[:12]}, as --commit says")
            return
        if len(codes) > 1:
            raise Stop(
                f"the hosts have had this run with the code at {' and '.join(sorted(codes))}: say which, --commit HASH"
            )
        self._keep(codes.pop())

    def _keep(self, code: str) -> None:
        self._commit = code
        if not self._given.startswith(code):
            now = f"{self._options.commit} is {self._given[:12]}"
            say(f"the run keeps the code at {code[:12]} of its first setup; {now} (--commit HASH moves the run)")

    def _start(self, hosts: Hosts, *, again: bool) -> bool:
        first = self._commit is None
        if not self._set_up(hosts, self._commit or self._given):
            return False
        if first:
            # New hosts know nothing of the run, but they see its checkpoints now.
            answer = hosts.status(limit=self._limits.unreachable)
            if not answer.well:
                return False
            found = [
                status.newest
                for line in answer.lines
                if (status := HostStatus.parse(line)) is not None and status.newest
            ]
            written = [newest for newest in found if newest.step is not None and newest.revision is not None]
            code = max(written, key=lambda newest: newest.step or 0).revision if written else None
            if code is None or self._given.startswith(code):
                self._commit = self._given
            elif deployment.is_hash(self._options.commit, self._given):
                say(
                    f"the newest checkpoint is of the code at {code}; the run moves to {self._given[:12]}, as "
                    "--commit says"
                )
                self._commit = self._given
            else:
                self._keep(code)
                if not self._set_up(hosts, code):
                    return False
        return hosts.start(to_stderr, again=again)

    def _set_up(self, hosts: Hosts, commit: str) -> bool:
        found = deployment.git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
        if found is None:
            raise Stop(
                f"the run has the code at {commit}, which is not in this repository: fetch it, or move the "
                "run with --commit HASH"
            )
        deployment.require_config(self._options.train[0], found)
        return deployment.set_up(self._options, self._commands, hosts, found, to_stderr)

    # -----------------------------------------------------------------------------------------------------------
    # the end

    def _end_well(self) -> int:
        if self._options.down and not self._options.hosts:
            if not self._cloud.delete_all():
                raise Stop("the TPUs are not deleted: `down` tries again", FAILED)
            return 0
        self._say_costs()
        return 0

    def _give_up(self, why: str, status: int) -> int:
        say(f"giving up: {why}")
        self._say_costs()
        return status

    def _say_costs(self) -> None:
        """What still costs money."""
        options = self._options
        if options.hosts:
            return
        try:
            resource = self._cloud.read()
            nodes = self._cloud.nodes()
        except NoAnswer:
            say(f"the cloud did not answer; what is there still costs money: `{options.down_command}` deletes it")
            return
        if resource.state is QueuedResourceState.ABSENT and not nodes:
            say(f"nothing of {options.name} is there any more that costs money; the run's folder is kept")
            return
        there = ", ".join(
            [f"{resource.description}, {resource.said}", *(f"TPU VM {node.name} {node.state}" for node in nodes)]
        )
        say(f"the TPUs are still there and cost money: {there}: `{options.down_command}` deletes them")
