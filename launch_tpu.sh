#!/usr/bin/env bash
# Runs `aurora train` on TPU pods and on machines that are reached by ssh. `./launch_tpu.sh --help` explains it.
set -euo pipefail

SCRIPT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
ROOT=$(dirname "$SCRIPT")
UV_VERSION=0.13.9
MEGASCALE_PORT=8081
LONGEST_BACKOFF=1800

# ------------------------------------------------------------------------------------------------------------------- help

help() {
  cat <<'TEXT'
usage: launch_tpu.sh VERB [options] [CONFIG.py [--field value ...]]

Trains on a TPU pod, on several slices, or on machines of your own. From nothing to a run that survives preemption:

  ./launch_tpu.sh watch --name cap --zone us-east5-a --accelerator-type v5p-128 --spot --bucket my-bucket \
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

State is read from the cloud and from the hosts; nothing is kept here. Needs gcloud with its alpha component (only there does one
command reach all hosts at once) and, for pods, `ssh-add ~/.ssh/google_compute_engine`.
TEXT
}

help_of() {
  case $1 in
    up) cat <<'TEXT'
usage: launch_tpu.sh up --accelerator-type TYPE [options]

Asks for a queued resource and waits until all its TPU VMs are ready. Repeated, it goes on waiting, or says that it is up. A request that
failed or was suspended is deleted with all its VMs and asked for again, once.

  --accelerator-type T  such as v4-256, v5litepod-256 (v5e), v5p-128, v6e-256: the cloud's names; v4 and v5p count two cores a chip
  --num-slices N        such slices, joined by the data-center network (1)
  --spot | --on-demand | --reserved    spot is cheaper and may be taken away at any time (on-demand)
  --runtime-version V   v4: tpu-ubuntu2204-base, v5e: v2-alpha-tpuv5-lite, v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
  --create-flag FLAG    a further flag of `gcloud compute tpus queued-resources create`, such as --create-flag=--network=default; repeatable
  --no-wait             return when the request is made
TEXT
      ;;
    setup) cat <<'TEXT'
usage: launch_tpu.sh setup [options]

Copies the code at a commit (committed files only) to every host and makes a virtual environment from requirements.txt and
constraints.txt there. What a host has already is kept: the environment until a pin changes.

  --commit C       what to run (HEAD)
  --bucket B       mount gs://B on every host as /mnt/B (gcsfuse), for --output, --initial-checkpoint and tokenizers
  --extras E       of pyproject.toml: tpu brings libtpu; none for machines without TPUs (tpu; with --hosts: none)
  --python PATH    interpreter on the hosts, 3.11 to 3.13; without it the newest there, else one that uv installs
  --venv PATH      use this environment of the hosts and install nothing
TEXT
      ;;
    run) cat <<'TEXT'
usage: launch_tpu.sh run [options] CONFIG.py [--field value ...]

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
Options come before CONFIG.py; everything after it belongs to `aurora train`.
TEXT
      ;;
    watch) cat <<'TEXT'
usage: launch_tpu.sh watch [options of up, setup and run] CONFIG.py [--field value ...]

Brings the run to its end, whatever happens in between. Every --poll seconds it looks at the cloud and at the hosts:
  nothing there                  -> asks for it; when there is no quota, tries again after 1, 2, 4 ... polls, at most half an hour
  waiting, being made            -> waits
  preempted, suspended, failed   -> deletes it with all its VMs, looks that it is gone, then asks again
  there, and no run going on     -> setup, run
  the run is done                -> ends (status 0); --down deletes the TPUs then
  wrong input on a host          -> stops all hosts and ends (status 2)
  stopped by `stop`              -> ends (status 0)
It may be killed and started again at any time: it keeps nothing. Run it on a small machine that stays on (tmux, or a small VM).
TEXT
      ;;
    status) echo "usage: launch_tpu.sh status [options]

Shows the queued resource, its TPU VMs, and a line for every host: state (running, waiting, done, failed, stopped, interrupted, dead, none),
since when, which start, the last exit status and the last line of its log." ;;
    logs) echo "usage: launch_tpu.sh logs [--worker N|all] [--slice S] [--lines L] [--follow] [options]

Prints the last lines (100) of the newest log of a host, worker 0 of slice 0 without more; --follow goes on until Ctrl-C and follows
restarts. Progress is in the log of worker 0 of slice 0; the other hosts log what goes wrong." ;;
    ssh) echo "usage: launch_tpu.sh ssh [--worker N|all] [--slice S] [options] [-- COMMAND]

A shell on a host (worker 0 of slice 0), or a command on it." ;;
    stop) echo "usage: launch_tpu.sh stop [options]

Tells the supervisors of all hosts to end. The hosts agree on a step, save a checkpoint after it and end; one that has not ended after 300 s
is killed. Returns when all have ended. \`run\` with the same command continues from there." ;;
    down) echo "usage: launch_tpu.sh down [--yes] [options]

Deletes the queued resource with all its TPU VMs and waits until they are gone. Asks first; --yes does not. Disks of the VMs go with them:
what is not in a bucket is lost. Nothing there is well, too." ;;
    on-host) echo "usage: launch_tpu.sh on-host ready|install|start|status|stop|log ...

What the other verbs run on the hosts." ;;
    *) die "there is no verb '$1'; launch_tpu.sh --help lists them" ;;
  esac
}

say() { echo "$(date +%T) $*" >&2; }
die() {
  echo "error: $*" >&2
  exit "${STATUS:-2}"
}

# ------------------------------------------------------------------------------------------------ commands, run or printed

# Prints a command as it could be typed.
quoted() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  echo "${line# }"
}

do_or_print() {
  if [[ $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

queued() { # queued VERB ...
  do_or_print gcloud compute tpus queued-resources "$@" ${LOCATION[@]+"${LOCATION[@]}"}
}

tpu_vm() {
  do_or_print gcloud compute tpus tpu-vm "$@" ${LOCATION[@]+"${LOCATION[@]}"}
}

# Only the alpha track talks to all hosts at once; the other one goes from host to host, and a pod's hosts must start together.
tpu_vm_all() {
  do_or_print gcloud alpha compute tpus tpu-vm "$@" ${LOCATION[@]+"${LOCATION[@]}"} --worker=all --batch-size=all --quiet
}

# Runs a function for every argument at once; output lines begin with the argument. Fails if one fails, and says which.
in_parallel() { # in_parallel FUNCTION ITEM...
  local function=$1 item failed="" number=0
  local -a jobs=()
  shift
  for item in "$@"; do
    if [[ $DRY_RUN ]]; then
      "$function" "$item" "$number"
    else
      { "$function" "$item" "$number" 2>&1 | sed -u "s|^|[$item] |"; } &
      jobs+=($!)
    fi
    number=$((number + 1))
  done
  number=0
  for item in "$@"; do
    [[ $DRY_RUN ]] || wait "${jobs[$number]}" || failed+=" $item"
    number=$((number + 1))
  done
  [[ -z $failed ]] || {
    echo "failed on:$failed" >&2
    return 1
  }
}

# ---------------------------------------------------------------------------------------------------- the cloud's state

# STATE, TYPE, SLICES, MODEL (spot, reserved, on-demand) of the queued resource, read from the cloud; STATE is ABSENT if there is none.
# A list that comes back empty is sure; an error is not, and ends us before something is made twice.
read_state() {
  local line kind_spot reserved
  if [[ $DRY_RUN ]]; then
    queued list "--filter=name~/$NAME\$" "--format=$STATE_FORMAT"
    STATE=$ASSUMED TYPE=$ACCELERATOR_TYPE SLICES=$NUM_SLICES MODEL=$PROVISIONING
    return
  fi
  line=$(queued list "--filter=name~/$NAME\$" "--format=$STATE_FORMAT") || return 1
  if [[ -z $line ]]; then
    STATE=ABSENT TYPE="" SLICES=0 MODEL="" REASON=""
    return
  fi
  IFS='|' read -r STATE TYPE SLICES kind_spot reserved REASON <<<"$line"
  SLICES=${SLICES:-1}
  MODEL=on-demand
  [[ -z $kind_spot ]] || MODEL=spot
  [[ $reserved != True ]] || MODEL=reserved
}
# encode() because an empty message, {}, which is how spot looks, prints as nothing otherwise.
STATE_FORMAT='value[separator="|"](state.state,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec[0].multisliceParams.nodeCount,spot.encode(base64),guaranteed.reserved,state.failedData.error.message)'

# NODES: name|state of the TPU VMs that bear our name, whatever made them.
read_nodes() {
  local pattern="--filter=name~\"/$NAME(-[0-9]+)?\$\""
  if [[ $DRY_RUN ]]; then
    tpu_vm list "$pattern" "--format=$NODE_FORMAT"
    NODES=""
    return
  fi
  NODES=$(tpu_vm list "$pattern" "--format=$NODE_FORMAT") || return 1
}
NODE_FORMAT='value[separator="|"](name.basename(),state)'

node_names() { # by the cloud's own rule: NAME, or NAME-0, NAME-1 ... for several slices
  local number
  if ((SLICES == 1)); then
    echo "$NAME"
  else
    for ((number = 0; number < SLICES; number++)); do echo "$NAME-$number"; done
  fi
}

# ready, coming, or lost: the VMs of an ACTIVE queued resource. A preempted VM may lie under a resource that says ACTIVE.
health_of_nodes() {
  local node state health=ready
  [[ ! $DRY_RUN ]] || {
    echo ready
    return
  }
  for node in $(node_names); do
    state=$(sed -n "s/^$node|//p" <<<"$NODES")
    case $state in
      READY) ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | UNHIDING) [[ $health == lost ]] || health=coming ;;
      *)
        say "TPU VM $node is ${state:-gone}"
        health=lost
        ;;
    esac
  done
  echo "$health"
}

require_cloud() {
  [[ -z $HOSTS ]] || die "$VERB: the machines of --hosts are there already, and not ours to make or delete${1:-}"
}

require_active() {
  [[ -z $HOSTS ]] || return 0
  read_state || die "the cloud did not answer"
  [[ $STATE == ACTIVE ]] || die "queued resource $NAME is $STATE; \`launch_tpu.sh up\` or \`watch\` brings it up"
}

# Source of the versions: Google Cloud's page "TPU software versions", the rows for JAX.
require_accelerator() {
  local known=""
  [[ $ACCELERATOR_TYPE ]] || die "$VERB: give --accelerator-type, such as v5p-128"
  case $ACCELERATOR_TYPE in
    v4-*) known=tpu-ubuntu2204-base ;;
    v5litepod-*) known=v2-alpha-tpuv5-lite ;;
    v5p-*) known=v2-alpha-tpuv5 ;;
    v6e-*) known=v2-alpha-tpuv6e ;;
    v5e-*) die "--accelerator-type $ACCELERATOR_TYPE: the cloud calls v5e v5litepod: v5litepod-${ACCELERATOR_TYPE#v5e-}" ;;
    *:*) die "--accelerator-type $ACCELERATOR_TYPE is a topology of \`aurora plan\`; the cloud counts chips (v5litepod-256, v6e-256) or two cores a chip (v4-256, v5p-128)" ;;
  esac
  RUNTIME_VERSION=${RUNTIME_VERSION:-$known}
  [[ $RUNTIME_VERSION ]] || die "--accelerator-type $ACCELERATOR_TYPE: give --runtime-version too; it is known for v4, v5litepod, v5p and v6e"
}

create() {
  local -a flags=("--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION")
  if ((NUM_SLICES == 1)); then flags+=("--node-id=$NAME"); else flags+=("--node-count=$NUM_SLICES" "--node-prefix=$NAME"); fi
  [[ $PROVISIONING == on-demand ]] || flags+=("--$PROVISIONING")
  say "asking for $NUM_SLICES x $ACCELERATOR_TYPE ($PROVISIONING) as queued resource $NAME"
  queued create "$NAME" "${flags[@]}" ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} --quiet
}

# Asks for the resource; 3 when there is no quota. What exists already is no error: an earlier call may have made it without our hearing.
ask() {
  local answer
  if [[ $DRY_RUN ]]; then
    create
    return
  fi
  if answer=$(create 2>&1); then
    echo "$answer" >&2
    return
  fi
  echo "$answer" >&2
  case $answer in
    *ALREADY_EXISTS*) return 0 ;;
    *RESOURCE_EXHAUSTED* | *[Qq]uota*) return 3 ;;
    *) return 1 ;;
  esac
}

# Deletes the queued resource and every VM of its name, and returns when nothing is left that could cost money or hold quota.
delete_all() {
  local node
  if [[ $DRY_RUN ]]; then
    queued delete "$NAME" --force --quiet
    read_state
    read_nodes
    return
  fi
  while true; do
    read_state || return 1
    case $STATE in
      ABSENT) break ;;
      DELETING) ;;
      *)
        say "deleting queued resource $NAME ($STATE) with its TPU VMs"
        queued delete "$NAME" --force --quiet >&2 || say "not deleted; trying again"
        read_state || return 1
        [[ $STATE != ABSENT ]] || break
        ;;
    esac
    sleep "$POLL"
  done
  read_nodes || return 1
  for node in $NODES; do
    node=${node%%|*}
    say "deleting TPU VM $node, which was left behind"
    tpu_vm delete "$node" --quiet >&2 || return 1
  done
}

check_same_request() {
  [[ -z $ACCELERATOR_TYPE || ($TYPE == "$ACCELERATOR_TYPE" && $SLICES == "$NUM_SLICES" && $MODEL == "$PROVISIONING") ]] ||
    die "queued resource $NAME is $SLICES x $TYPE ($MODEL), and you ask for $NUM_SLICES x $ACCELERATOR_TYPE ($PROVISIONING): choose another --name, or \`down\` first"
}

# ------------------------------------------------------------------------------------------------------- all the hosts

SSH_WAY=(-o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15)

on_host() { # on_host HOST NUMBER: one machine of --hosts; REMOTE holds the command, which may use @INDEX@
  # shellcheck disable=SC2029  # expanded here on purpose
  do_or_print ssh ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"} "${SSH_WAY[@]}" "$1" "${REMOTE//@INDEX@/$2}"
}

on_node() { # on_node NODE NUMBER: all hosts of one slice
  tpu_vm_all ssh "$1" "--command=${REMOTE//@INDEX@/$2}"
}

everywhere() { # everywhere COMMAND: on every host of every slice at once
  local REMOTE=$1
  if [[ $HOSTS ]]; then
    in_parallel on_host "${HOST_LIST[@]}"
  else
    # shellcheck disable=SC2046  # names of nodes have no spaces
    in_parallel on_node $(node_names)
  fi
}

copy_to_host() { do_or_print scp -q ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"} "${SSH_WAY[@]}" "$ARCHIVE" "$1:${ARCHIVE##*/}"; }
copy_to_node() { tpu_vm_all scp "$ARCHIVE" "$1:${ARCHIVE##*/}"; }

# A command of `on-host`, for hosts that may have nothing yet.
host_command() { # host_command FALLBACK WORD...
  local fallback=$1
  shift
  echo "if [ -f $REMOTE_DIR/code/launch_tpu.sh ]; then bash $REMOTE_DIR/code/launch_tpu.sh on-host $(quoted "$@"); else $fallback; fi"
}

status_of_hosts() {
  local -a command=(status)
  [[ ${#TRAIN[@]} -eq 0 ]] || command+=("${TRAIN[@]}")
  # shellcheck disable=SC2016  # for the host's shell
  everywhere "$(host_command 'echo "aurora-status $(hostname) none, not set up"' "${command[@]}")"
}

setup_hosts() {
  local commit ready folder
  local -a words=(--extras "$EXTRAS")
  [[ -z $PYTHON_PATH ]] || words+=(--python "$PYTHON_PATH")
  [[ -z $VENV_PATH ]] || words+=(--venv "$VENV_PATH")
  [[ -z $BUCKET ]] || words+=(--bucket "$BUCKET")
  commit=$(git -C "$ROOT" rev-parse --verify --quiet "$COMMIT^{commit}") || die "--commit $COMMIT: no such commit in $ROOT"
  [[ $COMMIT != HEAD || -z $(git -C "$ROOT" status --porcelain --untracked-files=no) ]] || say "note: changes that are not committed stay behind"
  ready=$(host_command 'exit 1' ready "$commit" "${words[@]}")
  if [[ ! $DRY_RUN ]] && everywhere "$ready" >&2; then
    say "set up already, at ${commit:0:12}"
    return
  fi
  folder=$(mktemp -d)
  ARCHIVE=$folder/aurora-${commit:0:12}.tar.gz
  do_or_print git -C "$ROOT" archive --format=tar.gz -o "$ARCHIVE" "$commit" || return 1
  say "copying the code at ${commit:0:12}, then the environment (minutes, the first time)"
  local done_well=1
  if [[ $HOSTS ]]; then
    in_parallel copy_to_host "${HOST_LIST[@]}" || done_well=""
  else
    # shellcheck disable=SC2046
    in_parallel copy_to_node $(node_names) || done_well=""
  fi
  rm -rf "$folder"
  [[ $done_well ]] || return 1
  everywhere "set -e; mkdir -p $REMOTE_DIR/code.$commit; tar -xzf ${ARCHIVE##*/} -C $REMOTE_DIR/code.$commit; rm ${ARCHIVE##*/}; bash $REMOTE_DIR/code.$commit/launch_tpu.sh on-host install $commit $(quoted "${words[@]}")"
}

check_train_command() {
  local config=${TRAIN[0]:-} word previous="" output=""
  [[ $config && $config != -* ]] || die "$VERB: give a config, such as configs/nano_aurora.py; options come before it"
  [[ $config == /* ]] || git -C "$ROOT" cat-file -e "$COMMIT:$config" 2>/dev/null || die "$config is not in the code at $COMMIT: the hosts get committed files only, so commit it first"
  for word in "${TRAIN[@]}"; do
    [[ $previous != --output ]] || output=$word
    [[ $word != --output=* ]] || output=${word#--output=}
    previous=$word
  done
  case $output in
    gs:* | s3:*) die "--output $output: a run writes through the file system: \`setup --bucket B\` mounts gs://B on the hosts, then --output /mnt/B/..." ;;
    /*) ;;
    *)
      [[ $VERB != watch || $HOSTS ]] || die "watch: --output must outlive the TPU VMs, and '${output:-the default of the config}' is on their disks: give --bucket B and --output /mnt/B/..."
      say "note: --output is relative, on each host's own disk, which goes with the VM; a run over several hosts will refuse it"
      ;;
  esac
}

start_on_host() { # start_on_host HOST|NODE NUMBER
  local REMOTE variables
  local -a assignments=("AURORA_HEARTBEAT_SECONDS=$HEARTBEAT" ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"})
  if [[ $HOSTS ]]; then
    if ((${#HOST_LIST[@]} > 1)); then
      assignments+=("JAX_COORDINATOR_ADDRESS=$COORDINATOR:$PORT" "JAX_NUM_PROCESSES=${#HOST_LIST[@]}" "JAX_PROCESS_ID=$2")
    fi
  else
    assignments+=("AURORA_DISTRIBUTED=auto")
    if ((SLICES > 1)); then
      assignments+=("MEGASCALE_COORDINATOR_ADDRESS=$COORDINATOR:$MEGASCALE_PORT" "MEGASCALE_NUM_SLICES=$SLICES" "MEGASCALE_SLICE_ID=$2" "MEGASCALE_PORT=$MEGASCALE_PORT")
    fi
  fi
  variables=$(quoted "${assignments[@]}")
  REMOTE="env $variables bash $REMOTE_DIR/code/launch_tpu.sh on-host start ${AGAIN:+--again }$(quoted "${TRAIN[@]}")"
  if [[ $HOSTS ]]; then on_host "$1" "$2"; else on_node "$1" "$2"; fi
}

run_on_hosts() {
  if [[ $HOSTS ]]; then
    in_parallel start_on_host "${HOST_LIST[@]}"
    return
  fi
  if ((SLICES > 1)); then
    COORDINATOR=$(tpu_vm describe "$NAME-0" '--format=value(networkEndpoints[0].ipAddress)') || return 1
    if [[ $DRY_RUN ]]; then
      echo "$COORDINATOR"
      COORDINATOR=ADDRESS_OF_$NAME-0
    fi
  fi
  # shellcheck disable=SC2046
  in_parallel start_on_host $(node_names)
}

one_host() { # one_host COMMAND: of --worker and --slice; a shell if the command is empty
  local -a terminal=()
  if [[ $HOSTS ]]; then
    [[ $WORKER =~ ^[0-9]+$ && $WORKER -lt ${#HOST_LIST[@]} ]] || die "--worker $WORKER: there are ${#HOST_LIST[@]} hosts, from 0"
    [[ -n $1 ]] || terminal=(-t)
    # shellcheck disable=SC2029
    do_or_print ssh ${terminal[@]+"${terminal[@]}"} ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"} "${HOST_LIST[$WORKER]}" ${1:+"$1"}
  else
    local node=$NAME
    ((SLICES == 1)) || node=$NAME-$SLICE
    if [[ $WORKER == all ]]; then
      tpu_vm_all ssh "$node" "--command=$1"
    else
      tpu_vm ssh "$node" "--worker=$WORKER" ${1:+"--command=$1"}
    fi
  fi
}

# --------------------------------------------------------------------------------------------------------------- verbs

verb_up() {
  local was="" health asked="" why
  require_cloud
  require_accelerator
  ASSUMED=ABSENT
  while true; do
    read_state || STATUS=1 die "the cloud did not answer; nothing was changed"
    [[ $STATE == ABSENT ]] || check_same_request
    [[ $STATE == "$was" ]] || say "queued resource $NAME: $STATE ${REASON:-}"
    was=$STATE
    case $STATE in
      ABSENT)
        [[ ! $asked ]] || STATUS=1 die "queued resource $NAME has gone while we waited"
        read_nodes || STATUS=1 die "the cloud did not answer; nothing was changed"
        [[ -z $NODES ]] || die "a TPU VM of this name is there without a queued resource ($NODES): choose another --name, or \`down\` to delete it"
        ask || case $? in
          3) STATUS=1 die "there is no quota for $NUM_SLICES x $ACCELERATOR_TYPE ($PROVISIONING) in ${ZONE:-this zone}: ask for more in the console (TPU API quotas), try another zone, or let \`watch\` try again and again" ;;
          *) STATUS=1 die "the request was refused; see above" ;;
        esac
        asked=1
        [[ ! $DRY_RUN && ! $NO_WAIT ]] || return 0
        ;;
      FAILED | SUSPENDED)
        why=$STATE${REASON:+: $REASON}
        delete_all || STATUS=1 die "could not delete it; \`down\` tries again"
        [[ ! $asked ]] || STATUS=1 die "the request came to nothing ($why) and was deleted with all it had made"
        continue
        ;;
      ACTIVE)
        read_nodes || STATUS=1 die "the cloud did not answer"
        health=$(health_of_nodes)
        [[ $health != ready ]] || break
        [[ $health != lost ]] || STATUS=1 die "TPU VMs of $NAME are lost: \`watch\` makes them anew, or \`down\` and \`up\`"
        [[ ! $NO_WAIT ]] || return 0
        ;;
      *) [[ ! $NO_WAIT ]] || return 0 ;;
    esac
    sleep "$POLL"
  done
  say "$NAME is up: $SLICES x $TYPE ($MODEL)"
}

verb_setup() {
  require_active
  setup_hosts || STATUS=1 die "setup did not finish on all hosts; the same command goes on"
}

verb_run() {
  check_train_command
  require_active
  run_on_hosts || STATUS=1 die "not started on all hosts; the same command starts the rest (was \`setup\` run?)"
}

# One look at the hosts. 0: the run has ended, well or stopped. 1: go on. 2: ended, badly.
look_at_hosts() {
  local lines states
  if ! lines=$(status_of_hosts); then
    say "not all hosts answer; looking again"
    return 1
  fi
  states=$(sed -n 's/.*aurora-status [^ ]* \([a-z]*\).*/\1/p' <<<"$lines" | sort | uniq -c | awk '{printf "%s%s on %s", sep, $2, $1; sep=", "}')
  [[ $states == "$SEEN" ]] || say "hosts: $states"
  SEEN=$states
  case " $states" in
    *" other on"*) die "another run is going on on these hosts: \`stop\` it first" ;;
    *" failed on"*)
      grep ' failed' <<<"$lines" >&2
      say "wrong input: stopping all hosts"
      everywhere "$(host_command true stop)" >&2 || true
      return 2
      ;;
    *" stopped on"*)
      say "stopped by \`stop\`; the same command continues the run"
      return 0
      ;;
  esac
  if [[ $states =~ ^done\ on\ [0-9]+$ ]]; then
    say "the run is done"
    return 0
  fi
  # Some hosts are done and others are not: for a moment that is how every run ends. If it lasts, the others have lost their last step and
  # cannot meet again unless those that are done start, too.
  if [[ $states == *done* ]]; then
    PARTLY_DONE=$((PARTLY_DONE + 1))
    ((PARTLY_DONE >= 3)) || return 1
  fi
  PARTLY_DONE=0
  if [[ ! $states =~ ^((running|waiting)\ on\ [0-9]+(,\ )?)+$ ]]; then
    AGAIN=""
    [[ $states != *done* ]] || AGAIN=1
    { setup_hosts && run_on_hosts; } >&2 || say "not started on all hosts; trying again"
  fi
  return 1
}

verb_watch() {
  local backoff=$POLL was="" health answer
  SEEN="" PARTLY_DONE=0
  check_train_command
  [[ $HOSTS ]] || require_accelerator
  if [[ $DRY_RUN ]]; then
    if [[ ! $HOSTS ]]; then
      ASSUMED=ABSENT
      read_state
      read_nodes
      ask
      ASSUMED=ACTIVE
    fi
    status_of_hosts
    setup_hosts
    run_on_hosts
    return
  fi
  while true; do
    if [[ $HOSTS ]]; then
      STATE=ACTIVE health=ready
    elif ! read_state || ! read_nodes; then
      say "the cloud did not answer; looking again"
      sleep "$POLL"
      continue
    else
      [[ $STATE == ABSENT ]] || check_same_request
      [[ $STATE == "$was" ]] || say "queued resource $NAME: $STATE ${REASON:-}"
      was=$STATE
      health=""
    fi
    case $STATE in
      ABSENT)
        if [[ $NODES ]]; then
          delete_all || say "not deleted; trying again"
          sleep "$POLL"
          continue
        fi
        answer=0
        ask || answer=$?
        if ((answer != 0)); then
          if ((answer == 3)); then say "no quota for $NUM_SLICES x $ACCELERATOR_TYPE ($PROVISIONING) now; asking again in $backoff s"; else say "the request was refused; asking again in $backoff s"; fi
          sleep "$backoff"
          backoff=$(awk -v b="$backoff" -v m="$LONGEST_BACKOFF" 'BEGIN { b *= 2; print (b > m ? m : b) }')
          continue
        fi
        ;;
      FAILED | SUSPENDED)
        case $STATE-${REASON:-} in
          FAILED-*[Qq]uota* | FAILED-*RESOURCE_EXHAUSTED*)
            say "no quota: ${REASON}; asking again in $backoff s"
            delete_all || say "not deleted; trying again"
            sleep "$backoff"
            backoff=$(awk -v b="$backoff" -v m="$LONGEST_BACKOFF" 'BEGIN { b *= 2; print (b > m ? m : b) }')
            ;;
          *) delete_all || say "not deleted; trying again" ;;
        esac
        continue
        ;;
      ACTIVE)
        [[ $health ]] || health=$(health_of_nodes)
        case $health in
          lost)
            delete_all || say "not deleted; trying again"
            continue
            ;;
          ready)
            backoff=$POLL answer=0
            look_at_hosts || answer=$?
            case $answer in
              0)
                [[ ! $DOWN || $HOSTS ]] || delete_all || STATUS=1 die "the TPUs are not deleted: \`down\` tries again"
                [[ $DOWN || $HOSTS ]] || say "the TPUs are still there and cost money: \`launch_tpu.sh down --name $NAME\` deletes them"
                return 0
                ;;
              2) return 2 ;;
            esac
            ;;
        esac
        ;;
    esac
    sleep "$POLL"
  done
}

verb_status() {
  local node
  if [[ ! $HOSTS ]]; then
    read_state || STATUS=1 die "the cloud did not answer"
    echo "queued resource $NAME: $STATE${TYPE:+, $SLICES x $TYPE ($MODEL)}${REASON:+, $REASON}"
    [[ $STATE != ABSENT ]] || return 0
    read_nodes || STATUS=1 die "the cloud did not answer"
    for node in $NODES; do echo "TPU VM ${node%|*}: ${node#*|}"; done
    [[ $STATE == ACTIVE ]] || return 0
  fi
  status_of_hosts | sed 's/aurora-status //'
}

verb_logs() {
  require_active
  one_host "tail -n $LINES_SHOWN ${FOLLOW:+-F }$REMOTE_DIR/run/log"
}

verb_ssh() {
  require_active
  one_host "${TRAIN[*]:-}"
}

verb_stop() {
  require_active
  everywhere "$(host_command true stop)" || STATUS=1 die "not stopped on all hosts; the same command tries the rest again"
}

verb_down() {
  local answer
  require_cloud "; \`stop\` ends the run"
  read_state || STATUS=1 die "the cloud did not answer"
  read_nodes || STATUS=1 die "the cloud did not answer"
  if [[ $STATE == ABSENT && -z $NODES ]]; then
    say "there is no queued resource $NAME, and no TPU VM of that name"
    return
  fi
  if [[ ! $YES && ! $DRY_RUN ]]; then
    [[ -t 0 ]] || die "down: say --yes where nobody can be asked"
    read -r -p "Delete queued resource $NAME ($STATE, $SLICES x $TYPE) with all its TPU VMs and their disks? [y/N] " answer
    [[ $answer == [yY]* ]] || die "nothing was deleted"
  fi
  delete_all || STATUS=1 die "not all is deleted; the same command goes on"
  [[ $DRY_RUN ]] || say "$NAME is gone"
}

# --------------------------------------------------------------------------------------------------------- on one host

find_python() {
  local candidate
  for candidate in "${PYTHON_PATH:-python3.13}" python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    [[ ! $PYTHON_PATH ]] || die "--python $PYTHON_PATH: not a Python 3.11 to 3.13 with venv on $(hostname)"
  done
}

mount_bucket() {
  ! mountpoint -q "/mnt/$BUCKET" || return 0
  command -v gcsfuse >/dev/null || die "$(hostname) has no gcsfuse, which --bucket needs: install it (Cloud Storage FUSE's own instructions) or leave --bucket out"
  sudo mkdir -p "/mnt/$BUCKET"
  sudo chown "$(id -u):$(id -g)" "/mnt/$BUCKET"
  # A checkpoint is complete when its folder is renamed, which gcsfuse refuses for more files than this.
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 "$BUCKET" "/mnt/$BUCKET"
}

pins_of() { cat "$1/requirements.txt" "$1/constraints.txt" "$1/pyproject.toml" - <<<"$EXTRAS" | sha256sum; }

host_ready() { # host_ready COMMIT: is everything as setup leaves it?
  [[ $(cat "$BASE/code/COMMIT") == "$1" ]] || return 1
  [[ -z $BUCKET ]] || mountpoint -q "/mnt/$BUCKET" || return 1
  if [[ $VENV_PATH ]]; then [[ $(readlink "$BASE/venv") == "$VENV_PATH" ]]; else [[ $(cat "$BASE/venv/pins") == "$(pins_of "$BASE/code")" ]]; fi || return 1
  echo "$(hostname) ready"
}

host_install() { # host_install COMMIT, from the folder that it came in
  local commit=$1 new=$ROOT python
  [[ -z $BUCKET ]] || mount_bucket
  if [[ -f $BASE/code/COMMIT && $(cat "$BASE/code/COMMIT") == "$commit" ]]; then
    rm -rf "$new"
  else
    # A lock that can be had means that nothing runs.
    if [[ -f $BASE/run/lock ]] && ! flock -n "$BASE/run/lock" true; then
      rm -rf "$new"
      die "a run of $(cat "$BASE/code/COMMIT") is going on on $(hostname): \`stop\` it before its code is replaced"
    fi
    echo "$commit" >"$new/COMMIT"
    rm -rf "$BASE/code.old"
    [[ ! -d $BASE/code ]] || mv "$BASE/code" "$BASE/code.old"
    mv "$new" "$BASE/code"
    rm -rf "$BASE/code.old"
  fi
  cd "$BASE"
  if [[ $VENV_PATH ]]; then
    [[ -x $VENV_PATH/bin/python ]] || die "--venv $VENV_PATH: no bin/python there on $(hostname)"
    [[ -L venv ]] || rm -rf venv
    ln -sfn "$VENV_PATH" venv
  elif [[ ! -f venv/pins || $(cat venv/pins) != "$(pins_of code)" ]]; then
    rm -rf venv
    python=$(find_python)
    if [[ $python ]]; then
      "$python" -m venv venv
    else
      # Ubuntu 22.04, which TPU VMs run, has Python 3.10.
      python3 -m pip install --quiet --user "uv==$UV_VERSION"
      python3 -m uv venv --quiet --seed --python 3.12 venv
    fi
    local extras="[$EXTRAS]"
    [[ $EXTRAS != none ]] || extras=""
    venv/bin/python -m pip install --quiet --disable-pip-version-check -c code/constraints.txt -e "./code$extras"
    pins_of code >venv/pins
  fi
  (cd code && ../venv/bin/python -c 'import jax')
  echo "$(hostname) ready"
}

verb_on_host() {
  local action=${1:-} commit
  shift || true
  [[ -d $BASE/venv || $action == ready || $action == install ]] || die "$(hostname) is not set up: run \`launch_tpu.sh setup\`"
  case $action in
    ready | install)
      commit=$1
      "host_$action" "$commit"
      ;;
    start)
      local -a again=()
      [[ ! $AGAIN ]] || again=(--again)
      cd "$BASE/code"
      exec ../venv/bin/python -m aurora_jax.supervise start ../run ${again[@]+"${again[@]}"} -- ../venv/bin/python -m aurora_jax train "$@"
      ;;
    status)
      cd "$BASE/code"
      if (($#)); then set -- -- ../venv/bin/python -m aurora_jax train "$@"; fi
      exec ../venv/bin/python -m aurora_jax.supervise status ../run "$@"
      ;;
    stop)
      cd "$BASE/code"
      exec ../venv/bin/python -m aurora_jax.supervise stop ../run
      ;;
    *) help_of on-host ;;
  esac
}

# ------------------------------------------------------------------------------------------------------------- arguments

VERB="" NAME=aurora ZONE="" HOSTS="" REMOTE_DIR=aurora DRY_RUN="" POLL=60 ASSUMED=ACTIVE
ACCELERATOR_TYPE="" NUM_SLICES=1 PROVISIONING=on-demand RUNTIME_VERSION="" NO_WAIT=""
COMMIT=HEAD BUCKET="" EXTRAS="" PYTHON_PATH="" VENV_PATH=""
HEARTBEAT=100 AGAIN="" COORDINATOR="" PORT=8476 DOWN="" WORKER=0 SLICE=0 LINES_SHOWN=100 FOLLOW="" YES=""
STATE="" TYPE="" SLICES=1 MODEL="" REASON="" NODES="" SEEN="" ARCHIVE=""
LOCATION=() SSH_OPTIONS=() CREATE_FLAGS=() ENVIRONMENT=() TRAIN=() HOST_LIST=()

need() { [[ $# -ge 2 ]] || die "$1 needs a value"; }

while (($#)); do
  case $1 in
    -h | --help | help)
      if [[ $VERB ]]; then help_of "$VERB"; else help; fi
      exit 0
      ;;
    --*=*)
      # --option=value is --option value, but what follows = may itself begin with dashes.
      option=${1%%=*} value=${1#*=}
      shift
      set -- "$option" "$value" "$@"
      continue
      ;;
    --name) need "$@"; NAME=$2; shift 2 ;;
    --zone) need "$@"; ZONE=$2; LOCATION+=("--zone=$2"); shift 2 ;;
    --project) need "$@"; LOCATION+=("--project=$2"); shift 2 ;;
    --hosts) need "$@"; HOSTS=$2; shift 2 ;;
    --ssh-options) need "$@"; read -r -a SSH_OPTIONS <<<"$2"; shift 2 ;;
    --remote-dir) need "$@"; REMOTE_DIR=$2; shift 2 ;;
    --poll) need "$@"; POLL=$2; shift 2 ;;
    --accelerator-type) need "$@"; ACCELERATOR_TYPE=$2; shift 2 ;;
    --num-slices) need "$@"; NUM_SLICES=$2; shift 2 ;;
    --runtime-version) need "$@"; RUNTIME_VERSION=$2; shift 2 ;;
    --create-flag) need "$@"; CREATE_FLAGS+=("$2"); shift 2 ;;
    --commit) need "$@"; COMMIT=$2; shift 2 ;;
    --bucket) need "$@"; BUCKET=${2#gs://}; shift 2 ;;
    --extras) need "$@"; EXTRAS=$2; shift 2 ;;
    --python) need "$@"; PYTHON_PATH=$2; shift 2 ;;
    --venv) need "$@"; VENV_PATH=$2; shift 2 ;;
    --env) need "$@"; ENVIRONMENT+=("$2"); shift 2 ;;
    --heartbeat) need "$@"; HEARTBEAT=$2; shift 2 ;;
    --coordinator) need "$@"; COORDINATOR=$2; shift 2 ;;
    --port) need "$@"; PORT=$2; shift 2 ;;
    --worker) need "$@"; WORKER=$2; shift 2 ;;
    --slice) need "$@"; SLICE=$2; shift 2 ;;
    --lines) need "$@"; LINES_SHOWN=$2; shift 2 ;;
    --spot | --on-demand | --reserved) PROVISIONING=${1#--}; shift ;;
    --no-wait) NO_WAIT=1; shift ;;
    --again) AGAIN=1; shift ;;
    --down) DOWN=1; shift ;;
    --follow | -f) FOLLOW=1; shift ;;
    --yes | -y) YES=1; shift ;;
    --dry-run) DRY_RUN=1; shift ;;
    --) shift; TRAIN=("$@"); break ;;
    -*) die "there is no option $1; launch_tpu.sh ${VERB:+$VERB }--help lists them${VERB:+ (those of aurora train come after CONFIG.py)}" ;;
    *)
      if [[ ! $VERB ]]; then
        VERB=$1
        shift
        help_of "$VERB" >/dev/null
        if [[ $VERB == on-host ]]; then
          TRAIN=("$@")
          break
        fi
      else
        TRAIN=("$@")
        break
      fi
      ;;
  esac
done

if [[ ! $VERB ]]; then
  help
  exit 2
fi
[[ $POLL =~ ^[0-9]+([.][0-9]+)?$ ]] || die "--poll $POLL: seconds, such as 60"
[[ $NUM_SLICES =~ ^[1-9][0-9]*$ ]] || die "--num-slices $NUM_SLICES: a number from 1"
[[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name $NAME: lower-case letters, digits and dashes, beginning with a letter"
[[ $HEARTBEAT =~ ^[1-9][0-9]*$ ]] || die "--heartbeat $HEARTBEAT: whole seconds"
[[ $REMOTE_DIR =~ ^[A-Za-z0-9_./-]+$ ]] || die "--remote-dir $REMOTE_DIR: letters, digits, ., _, / and - only"
if [[ $HOSTS ]]; then
  IFS=, read -r -a HOST_LIST <<<"$HOSTS"
  COORDINATOR=${COORDINATOR:-${HOST_LIST[0]##*@}}
fi
case $VERB in
  up | status | logs | stop | down | setup) [[ ${#TRAIN[@]} -eq 0 ]] || die "$VERB takes no '${TRAIN[*]}'" ;;
esac

if [[ $VERB == on-host ]]; then
  # Options of on-host come after its action, and everything else is the command of the run.
  BASE=$(dirname "$ROOT")
  set -- "${TRAIN[@]}"
  words=() TRAIN=()
  action=${1:-}
  while (($#)); do
    case $action-$1 in
      ready---extras | install---extras) EXTRAS=$2; shift 2 ;;
      ready---python | install---python) PYTHON_PATH=$2; shift 2 ;;
      ready---venv | install---venv) VENV_PATH=$2; shift 2 ;;
      ready---bucket | install---bucket) BUCKET=$2; shift 2 ;;
      start---again) AGAIN=1; shift ;;
      *) words+=("$1"); shift ;;
    esac
  done
  verb_on_host ${words[@]+"${words[@]}"}
else
  if [[ ! $EXTRAS ]]; then EXTRAS=tpu; [[ ! $HOSTS ]] || EXTRAS=none; fi
  [[ $DRY_RUN || $HOSTS ]] || command -v gcloud >/dev/null || die "gcloud is not installed; it is part of the Google Cloud CLI (with --hosts it is not needed)"
  "verb_$VERB"
fi
