"""What `launch_tpu.sh --help` and `launch_tpu.sh VERB --help` print."""

GENERAL = """usage: launch_tpu.sh VERB [options] [CONFIG.py [--field value ...]]

Trains on a TPU pod, on several slices, or on machines of your own. From nothing to a run that survives preemption:

  ./launch_tpu.sh watch --name cap --zone us-east5-a --accelerator-type v5p-128 --spot --bucket my-bucket \\
      configs/starcoderplus_v5p_128.py --initial-checkpoint /mnt/my-bucket/starcoderplus --output /mnt/my-bucket/runs/cap

or step by step, each of which may be repeated: nothing is made twice, and what is done already is left as it is.

  up       asks for the TPUs (a queued resource) and waits until they are there
  setup    puts the code at a commit and a virtual environment from the pins on all hosts
  run      starts `aurora train CONFIG.py ...` on all hosts of all slices, under a supervisor that restarts it; returns at once
  watch    does all three and keeps doing them: what is preempted is deleted, asked for again, set up and resumed, until the run is done
  status   the queued resource, its TPU VMs, and the run on every host
  logs     what a host has logged
  ssh      a shell, or a command, on a host
  stop     ends the run on all hosts; each saves a checkpoint first
  down     deletes the queued resource and its TPU VMs (asks first)

Options of all verbs (`launch_tpu.sh VERB --help` has the verb's own):
  --name NAME          of the queued resource and its TPU VMs (aurora)
  --zone, --project    where; gcloud's own defaults without them
  --hosts A,B,C        no cloud: machines that are already there, [user@]address each, reached by ssh; the first is the coordinator
  --ssh-options "..."  given to ssh and scp with --hosts, such as "-F my_ssh_config" or "-i key -o Port=2222"
  --remote-dir DIR     where things are on the hosts, under the home folder or absolute (aurora)
  --dry-run            prints every command and runs none
  --poll SECONDS       between two looks at the cloud (60)

State is read from the cloud and from the hosts; nothing is kept here. Needs Python 3.10 here and on the hosts, gcloud with its alpha
component (only there does one command reach all hosts at once) and, for pods, `ssh-add ~/.ssh/google_compute_engine`."""

VERBS = {
    "up": """usage: launch_tpu.sh up --accelerator-type TYPE [options]

Asks for a queued resource and waits until all its TPU VMs are ready. Repeated, it goes on waiting, or says that it is up. A request that
failed or was suspended is deleted with all its VMs and asked for again, once.

  --accelerator-type T  such as v4-256, v5litepod-256 (v5e), v5p-128, v6e-256: the cloud's names; v4 and v5p count two cores a chip
  --num-slices N        such slices, joined by the data-center network (1)
  --spot | --on-demand | --reserved    spot is cheaper and may be taken away at any time (on-demand)
  --runtime-version V   v4: tpu-ubuntu2204-base, v5e: v2-alpha-tpuv5-lite, v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
  --create-flag FLAG    a further flag of `gcloud compute tpus queued-resources create`, such as --create-flag=--network=default; repeatable
  --no-wait             return when the request is made""",
    "setup": """usage: launch_tpu.sh setup [options]

Copies the code at a commit (committed files only) to every host and makes a virtual environment from requirements.txt and
constraints.txt there. What a host has already is kept: the environment until a pin changes.

  --commit C       what to run (HEAD)
  --bucket B       mount gs://B on every host as /mnt/B (gcsfuse), for tokenizers and sources; --output and
                   --initial-checkpoint take gs:// as it is
  --extras E       of pyproject.toml: tpu brings libtpu; none for machines without TPUs (tpu; with --hosts: none)
  --python PATH    interpreter on the hosts, 3.11 to 3.13; without it the newest there, else one that uv installs
  --venv PATH      use this environment of the hosts and install nothing""",
    "run": """usage: launch_tpu.sh run [options] CONFIG.py [--field value ...]

Starts `aurora train CONFIG.py --field value ...` on all hosts at once and returns. On each host a supervisor that outlives the session
  - restarts it when it ends with an error, after 5 s, 10 s, 20 s ... up to 300 s (5 s again after ten good minutes);
  - ends when the run is done (status 0) or the input is wrong (status 2): see `status` and `logs`;
  - keeps the log of every start in REMOTE_DIR/run/logs (the newest 30).
A run resumes from its newest checkpoint. When one host dies the others end within --heartbeat seconds, and all start again and meet:
they look for each other for 300 s, then try anew. Repeated, it starts what is not running and leaves the rest alone.

Several hosts must share --output: /mnt/B/... after `setup --bucket B`, or a network file system. `aurora train` checks that they do.

  --env NAME=VALUE     in the environment of the run; repeatable
  --heartbeat SECONDS  silence after which a host counts as dead (100)
  --again              start even if this very run is done already
  --coordinator ADDR   with --hosts: address of the first host as the others see it (its name in --hosts)
  --port PORT          with --hosts: of the coordinator (8476)
With --hosts and no TPUs, each host's own name must have the address that the others reach it by (not 127.0.1.1, see its /etc/hosts).
Options come before CONFIG.py; everything after it belongs to `aurora train`.""",
    "watch": """usage: launch_tpu.sh watch [options of up, setup and run] CONFIG.py [--field value ...]

Brings the run to its end, whatever happens in between. Every --poll seconds it looks at the cloud and at the hosts:
  nothing there                  -> asks for it; when there is no quota, tries again after 1, 2, 4 ... polls, at most half an hour
  waiting, being made            -> waits
  preempted, suspended, failed   -> deletes it with all its VMs, looks that it is gone, then asks again
  there, and no run going on     -> setup, run
  the run is done                -> ends (status 0); --down deletes the TPUs then
  wrong input on a host          -> stops all hosts and ends (status 2)
  stopped by `stop`              -> ends (status 0)
  starts, and no new checkpoint  -> after --fruitless-starts of them in a row stops all hosts and ends (status 3)
  a host does not answer         -> looks again; after --unreachable seconds ends and stops nothing (status 4)
Whenever it ends it says what still costs money.

The run keeps the code of its first setup, whatever HEAD is later: the hosts know it, or the newest checkpoint says what wrote it.
A hash (--commit 1a2b3c4) moves a run that does not go on just now to that commit; HEAD and branches are for the first setup only.

  --fruitless-starts N   starts in a row that end without a new checkpoint in --output, after an error as after a preemption; 0: any (10)
  --unreachable SECONDS  for which not all hosts answer, or one look at them lasts; 0: for ever (1800)

It may be killed and started again at any time: it keeps nothing. Run it on a small machine that stays on (tmux, or a small VM).""",
    "status": """usage: launch_tpu.sh status [options]

Shows the queued resource, its TPU VMs, and a line for every host: state (running, waiting, done, failed, stopped, interrupted, dead, none),
since when, which start, the code's commit, the newest checkpoint, starts that ended without a new one, the last exit status and the last
line of its log.""",
    "logs": """usage: launch_tpu.sh logs [--worker N|all] [--slice S] [--lines L] [--follow] [options]

Prints the last lines (100) of the newest log of a host, worker 0 of slice 0 without more; --follow goes on until Ctrl-C and follows
restarts. Progress is in the log of worker 0 of slice 0; the other hosts log what goes wrong.""",
    "ssh": """usage: launch_tpu.sh ssh [--worker N|all] [--slice S] [options] [-- COMMAND]

A shell on a host (worker 0 of slice 0), or a command on it.""",
    "stop": """usage: launch_tpu.sh stop [options]

Tells the supervisors of all hosts to end. The hosts agree on a step, save a checkpoint after it and end; one that has not ended after 300 s
is killed. Returns when all have ended. `run` with the same command continues from there.""",
    "down": """usage: launch_tpu.sh down [--yes] [options]

Deletes the queued resource with all its TPU VMs and waits until they are gone. Asks first; --yes does not. Disks of the VMs go with them:
what is not in a bucket is lost. Nothing there is well, too.""",
    "on-host": """usage: launch_tpu.sh on-host ready|install|start|status|stop|log ...

What the other verbs run on the hosts.""",
}
