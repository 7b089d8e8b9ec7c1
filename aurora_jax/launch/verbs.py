"""What each verb does. Each returns its exit status, or raises Stop."""

import sys
import time
from collections.abc import Callable

from aurora_jax.launch import deployment
from aurora_jax.launch.cloud import Asked, Cloud, NoAnswer
from aurora_jax.launch.commands import FAILED, Commands, Stop, say, to_stdout
from aurora_jax.launch.hosts import Hosts, SshHosts, TpuHosts
from aurora_jax.launch.options import Options, runtime_version
from aurora_jax.launch.progress import output_of
from aurora_jax.launch.states import NodeHealth, QueuedResourceState, health_of
from aurora_jax.launch.watch import Watch


def up(options: Options, commands: Commands) -> int:
    """Asks for the queued resource and waits until its TPU VMs are ready."""
    _require_cloud(options)
    runtime_version(options)
    cloud = Cloud(options, commands)
    cloud.assumed = QueuedResourceState.ABSENT
    said, asked = "", False
    while True:
        try:
            resource = cloud.read()
            nodes = cloud.nodes() if resource.state in (QueuedResourceState.ABSENT, QueuedResourceState.ACTIVE) else []
        except NoAnswer as error:
            raise NoAnswer("" if asked else "; nothing was changed") from error
        if resource.state is not QueuedResourceState.ABSENT:
            cloud.require_same_request(resource)
        if resource.said != said:
            say(f"queued resource {options.name}: {resource.said} {resource.reason}".rstrip())
        said = resource.said
        if resource.state is QueuedResourceState.ABSENT:
            if asked:
                raise Stop(f"queued resource {options.name} has gone while we waited", FAILED)
            if nodes:
                names = " ".join(f"{node.name}|{node.state}" for node in nodes)
                raise Stop(
                    f"a TPU VM of this name is there without a queued resource ({names}): choose another "
                    "--name, or `down` to delete it"
                )
            _ask(options, cloud)
            asked = True
            if options.dry_run:
                return 0
        elif resource.state in (QueuedResourceState.FAILED, QueuedResourceState.SUSPENDED):
            why = f"{resource.said}: {resource.reason}" if resource.reason else resource.said
            if not cloud.delete_all():
                raise Stop("could not delete it; `down` tries again", FAILED)
            if asked:
                raise Stop(f"the request came to nothing ({why}) and was deleted with all it had made", FAILED)
            continue
        elif resource.state is QueuedResourceState.ACTIVE:
            ours = cloud.nodes_of(resource, nodes)
            health = health_of(ours)
            for node in ours:
                if node.health is NodeHealth.LOST:
                    say(f"TPU VM {node.name} is {node.state}")
            if health is NodeHealth.READY:
                say(f"{options.name} is up: {resource.description}")
                return 0
            if health is NodeHealth.LOST:
                raise Stop(f"TPU VMs of {options.name} are lost: `watch` makes them anew, or `down` and `up`", FAILED)
        if options.no_wait:
            return 0
        time.sleep(options.poll)


def _ask(options: Options, cloud: Cloud) -> None:
    answer = cloud.ask()
    if answer is Asked.NO_QUOTA:
        raise Stop(
            f"there is no quota for {options.request} in {options.zone or 'this zone'}: ask for more in the "
            "console (TPU API quotas), "
            "try another zone, or let `watch` try again and again",
            FAILED,
        )
    if answer is Asked.REFUSED:
        raise Stop("the request was refused; see above", FAILED)


def setup(options: Options, commands: Commands) -> int:
    """Puts the code and its environment on all hosts."""
    hosts = _hosts(options, commands)
    if not deployment.set_up(options, commands, hosts, deployment.resolve(options.commit), to_stdout):
        raise Stop("setup did not finish on all hosts; the same command goes on", FAILED)
    return 0


def run(options: Options, commands: Commands) -> int:
    """Starts the run on all hosts."""
    _require_train_command(options)
    if not _hosts(options, commands).start(again=options.again):
        raise Stop("not started on all hosts; the same command starts the rest (was `setup` run?)", FAILED)
    return 0


def watch(options: Options, commands: Commands) -> int:
    """Brings the run to its end."""
    _require_train_command(options)
    if not options.hosts:
        runtime_version(options)
    if not options.dry_run:
        return Watch(options, commands).run()
    hosts: Hosts = SshHosts(options, commands)
    if not options.hosts:
        cloud = Cloud(options, commands)
        cloud.assumed = QueuedResourceState.ABSENT
        absent = cloud.read()
        cloud.nodes()
        cloud.ask()
        hosts = TpuHosts(options, commands, cloud, absent)
    hosts.status()
    deployment.set_up(options, commands, hosts, deployment.resolve(options.commit), to_stdout)
    hosts.start()
    return 0


def status(options: Options, commands: Commands) -> int:
    """Shows the queued resource, its TPU VMs, and the run on every host."""
    hosts: Hosts = SshHosts(options, commands)
    if not options.hosts:
        cloud = Cloud(options, commands)
        resource = cloud.read()
        reason = f", {resource.reason}" if resource.reason else ""
        request = f", {resource.description}" if resource.accelerator_type else ""
        print(f"queued resource {options.name}: {resource.said}{request}{reason}", flush=True)
        if resource.state is QueuedResourceState.ABSENT:
            return 0
        for node in cloud.nodes():
            print(f"TPU VM {node.name}: {node.state}", flush=True)
        if resource.state is not QueuedResourceState.ACTIVE:
            return 0
        hosts = TpuHosts(options, commands, cloud, resource)
    answer = hosts.status(show=lambda line: to_stdout(line.replace("aurora-status ", "", 1)))
    return 0 if answer.well else FAILED


def logs(options: Options, commands: Commands) -> int:
    """Shows the newest log of a host."""
    follow = "-F " if options.follow else ""
    _hosts(options, commands).one(f"tail -n {options.lines} {follow}{options.remote_dir}/run/log")
    return 0


def ssh(options: Options, commands: Commands) -> int:
    """A shell, or a command, on a host."""
    _hosts(options, commands).one(" ".join(options.train))
    return 0


def stop(options: Options, commands: Commands) -> int:
    """Ends the run on all hosts."""
    if not _hosts(options, commands).stop():
        raise Stop("not stopped on all hosts; the same command tries the rest again", FAILED)
    return 0


def down(options: Options, commands: Commands) -> int:
    """Deletes the queued resource and its TPU VMs."""
    _require_cloud(options, "; `stop` ends the run")
    cloud = Cloud(options, commands)
    resource, nodes = cloud.read(), cloud.nodes()
    if resource.state is QueuedResourceState.ABSENT and not nodes:
        say(f"there is no queued resource {options.name}, and no TPU VM of that name")
        return 0
    if not options.yes and not options.dry_run:
        if not sys.stdin.isatty():
            raise Stop("down: say --yes where nobody can be asked")
        what = f"{options.name} ({resource.said}, {resource.slices} x {resource.accelerator_type})"
        print(
            f"Delete queued resource {what} with all its TPU VMs and their disks? [y/N] ",
            end="",
            file=sys.stderr,
            flush=True,
        )
        if not sys.stdin.readline().lower().startswith("y"):
            raise Stop("nothing was deleted")
    if not cloud.delete_all():
        raise Stop("not all is deleted; the same command goes on", FAILED)
    if not options.dry_run:
        say(f"{options.name} is gone")
    return 0


VERBS: dict[str, Callable[[Options, Commands], int]] = {
    verb.__name__: verb for verb in (up, setup, run, watch, status, logs, ssh, stop, down)
}


def _require_cloud(options: Options, hint: str = "") -> None:
    if options.hosts:
        raise Stop(f"{options.verb}: the machines of --hosts are there already, and not ours to make or delete{hint}")


def _hosts(options: Options, commands: Commands) -> Hosts:
    """The hosts of the queued resource that is up, or those of --hosts. Raises Stop if it is not."""
    if options.hosts:
        return SshHosts(options, commands)
    cloud = Cloud(options, commands)
    resource = cloud.read()
    if resource.state is not QueuedResourceState.ACTIVE:
        raise Stop(f"queued resource {options.name} is {resource.said}; `launch_tpu.sh up` or `watch` brings it up")
    return TpuHosts(options, commands, cloud, resource)


def _require_train_command(options: Options) -> None:
    """Raises Stop where the hosts could not run it, or where its results would go with the VMs."""
    config = options.train[0] if options.train else ""
    if not config or config.startswith("-"):
        raise Stop(f"{options.verb}: give a config, such as configs/nano_aurora.py; options come before it")
    deployment.require_config(config, options.commit)
    output = output_of(options.train) or ""
    if output.startswith("s3:"):
        raise Stop(f"--output {output}: a run does not write to s3://; give --output gs://B/... or a folder")
    if not output.startswith(("/", "gs://")):
        if options.verb == "watch" and not options.hosts:
            raise Stop(
                f"watch: --output must outlive the TPU VMs, and '{output or 'the default of the config'}' is "
                "on their disks: "
                "give --output gs://B/... (or --bucket B and --output /mnt/B/...)"
            )
        say(
            "note: --output is relative, on each host's own disk, which goes with the VM; a run over several "
            "hosts will refuse it"
        )
