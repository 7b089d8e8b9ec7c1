"""What `watch` does next: functions of what it has seen, without processes, files or clocks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from aurora_jax.launch.states import HostState, HostStatus, NodeHealth, QueuedResource, QueuedResourceState

PATIENCE = 3
"""Looks for which some hosts may be done and others not: for a moment that is how every run ends. If it
lasts, the others have lost their last step and cannot meet again unless those that are done start, too."""
GOING = {HostState.RUNNING, HostState.WAITING}


class CloudAction(Enum):
    """What to do about the queued resource."""

    ASK = "nothing is there: ask for it"
    WAIT = "it is on its way"
    DELETE = "it is lost: delete it and all its VMs, then look again at once"
    CLEAR = "VMs are left without a queued resource: delete them, then look again after a while"
    DELETE_FOR_QUOTA = "it failed for want of quota: delete it, then look again after a longer while"
    LOOK_AT_HOSTS = "it is there"
    GIVE_UP = "it was there so often for nothing: do not ask again"


class HostsAction(Enum):
    """What to do about the run; those after START_AGAIN end the watch."""

    GO_ON = "all is well, or may become so by itself"
    START = "set up and start what does not run"
    START_AGAIN = "start also the hosts that are done"
    DONE = "the run is done"
    STOPPED = "the user stopped it"
    WRONG_INPUT = "a host refused its input"
    OTHER_RUN = "the hosts have another run"
    NO_PROGRESS = "too many starts without a new checkpoint"
    UNREACHABLE = "a host has not answered for too long"


@dataclass(frozen=True)
class Limits:
    """When to give up; None: never.

    Attributes:
        fruitless_starts: starts in a row that ended without a new checkpoint.
        unreachable: seconds for which not all hosts answered.
    """

    fruitless_starts: int | None = 10
    unreachable: float | None = 1800.0


@dataclass(frozen=True)
class Memory:
    """What a watch remembers between two looks; one that begins anew remembers nothing, and does no harm.

    Attributes:
        begun: has the run been started on, or seen on, the VMs that are there?
        fruitful: has a new checkpoint been seen since?
        newest: step of the newest checkpoint that was seen.
        lost: starts without a new checkpoint whose hosts cannot tell of them any more, or that did not come about.
        here: such starts by what the hosts say.
        partly_done: looks in a row at which some hosts were done.
        silent_since: time of the first of the looks in a row at which not all hosts answered.
        known: names of the hosts that answered last time.
    """

    begun: bool = False
    fruitful: bool = False
    newest: int | None = None
    lost: int = 0
    here: int = 0
    partly_done: int = 0
    silent_since: float | None = None
    known: tuple[str, ...] = ()

    @property
    def fruitless(self) -> int:
        """Starts in a row that ended without a new checkpoint."""
        return self.lost + self.here

    def after_loss(self) -> "Memory":
        """The VMs are gone, and a start with them if there was one."""
        return Memory(newest=self.newest, lost=self.fruitless + (self.begun and not self.fruitful))

    def after_start(self, *, well: bool) -> "Memory":
        """The run was started on all hosts, or was not.

        A start that did not come about counts once, though the VMs may be found lost next; after a new
        checkpoint it does not: it is the end of a start that was worth its money.
        """
        return replace(self, begun=well, fruitful=False, lost=self.lost + (not well and not self.fruitful))


def about_cloud(
    resource: QueuedResource, nodes_there: bool, health: NodeHealth, memory: Memory, limits: Limits
) -> CloudAction:
    """Decides by the queued resource, the VMs of its name, and their health if it is ACTIVE."""
    state = resource.state
    if state is QueuedResourceState.ABSENT:
        if nodes_there:
            return CloudAction.CLEAR
        return CloudAction.GIVE_UP if _exceeds(memory.fruitless, limits.fruitless_starts) else CloudAction.ASK
    if state in (QueuedResourceState.FAILED, QueuedResourceState.SUSPENDED):
        return CloudAction.DELETE_FOR_QUOTA if resource.lacks_quota else CloudAction.DELETE
    if state is QueuedResourceState.ACTIVE:
        if health is NodeHealth.LOST:
            return CloudAction.DELETE
        if health is NodeHealth.READY:
            return CloudAction.LOOK_AT_HOSTS
    return CloudAction.WAIT


def about_hosts(
    hosts: Sequence[HostStatus], *, all_answered: bool, asked: float, now: float, memory: Memory, limits: Limits
) -> tuple[HostsAction, Memory]:
    """Decides by what the hosts say.

    Args:
        hosts: those that answered.
        all_answered: did every host?
        asked: seconds, of a clock that never goes back: when they were asked.
        now: when they had answered, or we ceased to wait.

    Returns:
        The action, and what to remember.
    """
    if not all_answered:
        since = asked if memory.silent_since is None else memory.silent_since
        lasted = limits.unreachable is not None and now - since >= limits.unreachable
        return HostsAction.UNREACHABLE if lasted else HostsAction.GO_ON, replace(memory, silent_since=since)
    states = Counter(host.state for host in hosts)
    memory = _with_progress(hosts, memory)
    if states[HostState.OTHER]:
        return HostsAction.OTHER_RUN, memory
    if states[HostState.FAILED]:
        return HostsAction.WRONG_INPUT, memory
    if states[HostState.STOPPED]:
        return HostsAction.STOPPED, memory
    if set(states) == {HostState.DONE}:
        return HostsAction.DONE, memory
    if _exceeds(memory.fruitless, limits.fruitless_starts):
        return HostsAction.NO_PROGRESS, memory
    if states[HostState.DONE] and memory.partly_done + 1 < PATIENCE:
        return HostsAction.GO_ON, replace(memory, partly_done=memory.partly_done + 1)
    memory = replace(memory, partly_done=0)
    if states and set(states) <= GOING:
        return HostsAction.GO_ON, replace(memory, begun=True)
    return HostsAction.START_AGAIN if states[HostState.DONE] else HostsAction.START, memory


def _with_progress(hosts: Sequence[HostStatus], memory: Memory) -> Memory:
    """What is remembered, with what the hosts say of checkpoints: a new one, and earlier starts count no longer."""
    steps = [host.newest.step for host in hosts if host.newest is not None and host.newest.step is not None]
    newest = max(steps, default=memory.newest)
    if memory.newest is not None and newest is not None:
        newest = max(newest, memory.newest)
    # Hosts that cannot say where the run's folder is cannot count: that the run runs must do.
    silent = all(host.newest is None for host in hosts) and {host.state for host in hosts} <= GOING
    return replace(
        memory,
        newest=newest,
        lost=0 if newest != memory.newest or silent else memory.lost,
        fruitful=memory.fruitful or newest != memory.newest,
        here=max((host.fruitless for host in hosts), default=0),
        silent_since=None,
        known=tuple(host.host for host in hosts),
    )


def _exceeds(count: int, limit: int | None) -> bool:
    return limit is not None and count >= limit
