"""States of the queued resource, of its TPU VMs and of the run on each host."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from aurora_jax.launch.progress import Newest


class QueuedResourceState(Enum):
    """The cloud's states (`QueuedResourceState.State` of the Cloud TPU API, v2), and ABSENT: there is none of
    the name."""

    ABSENT = "ABSENT"
    CREATING = "CREATING"
    ACCEPTED = "ACCEPTED"
    PROVISIONING = "PROVISIONING"
    WAITING_FOR_RESOURCES = "WAITING_FOR_RESOURCES"
    ACTIVE = "ACTIVE"
    FAILED = "FAILED"
    SUSPENDING = "SUSPENDING"
    SUSPENDED = "SUSPENDED"
    DELETING = "DELETING"
    UNKNOWN = "UNKNOWN"
    """A state that we do not know: waited out."""

    @classmethod
    def _missing_(cls, value: object) -> "QueuedResourceState":
        return cls.UNKNOWN


@dataclass(frozen=True)
class QueuedResource:
    """What the cloud says of the queued resource.

    Attributes:
        state: its state; `said`: as the cloud spelt it.
        accelerator_type: of each slice, such as v5p-128.
        provisioning: spot, reserved or on-demand.
        reason: why it failed, if it did.
    """

    state: QueuedResourceState
    said: str
    accelerator_type: str = ""
    slices: int = 0
    provisioning: str = ""
    reason: str = ""

    @classmethod
    def parse(cls, line: str) -> "QueuedResource":
        """A line in `cloud.STATE_FORMAT`; an empty one means that there is none."""
        if not line:
            return cls(QueuedResourceState.ABSENT, "ABSENT")
        said, kind, slices, spot, reserved, reason = (line.split("|", 5) + [""] * 5)[:6]
        provisioning = "reserved" if reserved == "True" else "spot" if spot else "on-demand"
        return cls(QueuedResourceState(said), said, kind, int(slices or 1), provisioning, reason)

    @property
    def description(self) -> str:
        """Such as `2 x v5p-128 (spot)`."""
        return f"{self.slices} x {self.accelerator_type} ({self.provisioning})"

    @property
    def lacks_quota(self) -> bool:
        """Did it fail for want of quota, which waiting may mend?"""
        return self.state is QueuedResourceState.FAILED and is_about_quota(self.reason)


def is_about_quota(message: str) -> bool:
    """Does a message of the cloud's say that there is no quota?"""
    return re.search("[Qq]uota|RESOURCE_EXHAUSTED", message) is not None


class NodeHealth(Enum):
    """Of the TPU VMs of an ACTIVE queued resource, taken together: a preempted one may lie under a resource
    that says ACTIVE."""

    READY = "ready"
    COMING = "coming"
    LOST = "lost"


COMING_STATES = frozenset({"CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "UNHIDING"})
"""States of a TPU VM (`Node.State` of the API) that become READY by themselves."""


@dataclass(frozen=True)
class Node:
    """A TPU VM: a slice, of one or many hosts."""

    name: str
    state: str

    @property
    def health(self) -> NodeHealth:
        """What its state means for the run."""
        if self.state == "READY":
            return NodeHealth.READY
        return NodeHealth.COMING if self.state in COMING_STATES else NodeHealth.LOST


def health_of(nodes: Sequence[Node]) -> NodeHealth:
    """One lost loses all."""
    found = {node.health for node in nodes}
    return next((health for health in (NodeHealth.LOST, NodeHealth.COMING) if health in found), NodeHealth.READY)


class HostState(Enum):
    """Of the run on a host, as `supervise.Status` says it."""

    RUNNING = "running"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"
    DEAD = "dead"
    NONE = "none"
    OTHER = "other"


HOST_LINE = re.compile(r"(?:\[(?P<item>[^\]]*)\] )?aurora-status (?P<host>\S+) (?P<state>[a-z]+)(?P<rest>.*)")


@dataclass(frozen=True)
class HostStatus:
    """A host's line of `status`.

    Attributes:
        host: its own name.
        code: the commit, abbreviated, that this very run was last started with here; None if it was not, or
            an older version does not say.
        newest: the run's newest checkpoint as this host sees it; None if it does not say.
        fruitless: starts in a row that ended without a new checkpoint.
        line: what it printed.
    """

    host: str
    state: HostState
    line: str = ""
    code: str | None = None
    newest: Newest | None = None
    fruitless: int = 0

    @classmethod
    def parse(cls, line: str) -> "HostStatus | None":
        """None if the line is something else that a host printed."""
        found = HOST_LINE.match(line)
        if found is None or found["state"] not in {state.value for state in HostState}:
            return None
        state = HostState(found["state"])
        facts = found["rest"].split(", log: ")[0]  # a log may say anything
        code = re.search(r", code (\S+?)(?=,|$)", facts)
        newest = re.search(r", checkpoint (none|[0-9]+)(?: \(code (\S+)\))?", facts)
        fruitless = re.search(r", ([0-9]+) starts without a new one", facts)
        ours = code and code[1] != "unknown" and state not in (HostState.NONE, HostState.OTHER)
        return cls(
            found["host"],
            state,
            line,
            code[1] if code and ours else None,
            Newest(None if newest[1] == "none" else int(newest[1]), newest[2]) if newest else None,
            int(fruitless[1]) if fruitless else 0,
        )
