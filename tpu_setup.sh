#!/usr/bin/env bash
# From an empty cloud project to a run that comes back by itself. Every command may be given again at any time.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ./tpu_setup.sh [options] COMMAND [-- PROGRAM ARGUMENT ...]

With a name (--name or $TPU_NAME) a command acts on all workers of that TPU through gcloud; without one, on this
machine: a TPU worker, or any Linux, where the CPU stands in.

  create    ask for the TPU through a queued resource and wait until it is there
  setup     bring this checkout to every worker, make its environment, sum a one over all devices (`check`)
  check     the sum over all devices of all workers; anything but the number of devices is a failure
  run       check, then start PROGRAM on every worker; it goes on when this terminal closes. Without a name: here, in
            the foreground. A program that ends with status 75 (saved, start me again) is started again
  watch     create, setup, run, and again whenever the TPU was taken away or the program asks for it; ends with it
  status    what each worker is doing: running, none, lost (without a word), or exit N
  logs      the output of worker 0 (--worker=N), followed to its end by --follow
  stop      ask the program on every worker to save and end (like Ctrl-C: it is not started again)
  delete    give the TPU back

options, or the variable in brackets
  --name=NAME       [TPU_NAME]      --zone=ZONE   [TPU_ZONE]      --project=ID  [TPU_PROJECT, else gcloud's own]
  --type=v5p-128    [TPU_TYPE]      --runtime=V   [TPU_RUNTIME, else by type]
  --tier=spot|on-demand|reserved    [TPU_TIER, spot]
  --python=PATH     [KIMI_PYTHON]   an environment that is already made, for commands on this machine
  --poll=SECONDS    [TPU_POLL, 30]  between looks at the TPU
  --retries=N       [TPU_RETRIES, 20]  restarts without an hour of work between them, after which `watch` gives up
  --dry-run         print every command instead of running it
TEXT
}

readonly RESTART=75   # kimi_jax.hosts.RESTART: saved, start me again
readonly ABORTED=134  # jax ends the other hosts this way when one is lost
readonly HEALTHY=3600 # seconds of work after which earlier restarts are forgotten
readonly FOLDER=kimi_jax

name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} type=${TPU_TYPE:-} runtime=${TPU_RUNTIME:-}
tier=${TPU_TIER:-spot} python=${KIMI_PYTHON:-} poll=${TPU_POLL:-30} retries=${TPU_RETRIES:-20}
worker=0 dry_run='' detach='' follow='' command='' program=()
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state_folder=${KIMI_STATE:-$here/.run} # log, status and number of what `run` started

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

act() { # runs what changes something, or prints it
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@" | sed 's/^/+ /; s/ $//'
        echo
    else
        "$@"
    fi
}

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            --name=*) name=${1#*=} ;;
            --zone=*) zone=${1#*=} ;;
            --project=*) project=${1#*=} ;;
            --type=*) type=${1#*=} ;;
            --runtime=*) runtime=${1#*=} ;;
            --tier=*) tier=${1#*=} ;;
            --python=*) python=${1#*=} ;;
            --poll=*) poll=${1#*=} ;;
            --retries=*) retries=${1#*=} ;;
            --worker=*) worker=${1#*=} ;;
            --local) name='' ;;
            --detach) detach=yes ;;
            --follow) follow=yes ;;
            --dry-run) dry_run=yes ;;
            -h | --help) usage; exit 0 ;;
            --) shift; program=("$@"); return ;;
            -*) fail "unknown option $1; --help lists them" ;;
            *) [ -z "$command" ] || fail "one command at a time, not $command and $1; the program comes after --"
               command=$1 ;;
        esac
        shift
    done
}

# ------------------------------------------------------------------------------------------------- this machine

is_tpu_worker() { compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; }

choose_python() {
    [ -n "$python" ] || python=$here/.venv/bin/python
    is_tpu_worker || export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
}

local_setup() {
    if [ -z "$python" ]; then
        local extras=demo wanted=''
        if is_tpu_worker; then
            extras=demo,serve,tpu
            if ! (cd "$here" && .ci/find_python 3.11 3.12 >/dev/null 2>&1); then
                act sudo apt-get update -qq
                act sudo apt-get install -y -qq python3.12-venv || act sudo apt-get install -y -qq python3.11-venv
            fi
        fi
        # the same question that `make` asks: is the environment of these pins there?
        wanted=$(cd "$here" && cat setup.py constraints/py311.txt constraints/py312.txt | sha256sum | cut -c1-16)-$extras
        if [ "$(cat "$here/.venv/.tpu_setup" 2>/dev/null)" != "$wanted" ]; then
            (cd "$here" && act .ci/venv .venv "3.11 3.12" "$extras")
            [ -n "$dry_run" ] || echo "$wanted" >"$here/.venv/.tpu_setup"
        fi
    fi
    local_check
}

local_check() {
    choose_python
    (cd "$here" && act "$python" -m kimi_jax.hosts)
}

put() { # writes a file of the state folder so that a reader never finds it empty
    echo "$2" >"$state_folder/$1.$$" && mv "$state_folder/$1.$$" "$state_folder/$1"
}

local_run() {
    [ ${#program[@]} -gt 0 ] || fail "run what? ./tpu_setup.sh run -- python -m kimi_jax.train --config=..."
    mkdir -p "$state_folder"
    if [ -n "$detach" ]; then
        if [ "$(local_status)" = running ]; then
            say "already running"
            return
        fi
        # on many workers only `watch` can start all of them again; default-signal: bash cannot trap what it inherits
        # as ignored
        local again=(env --default-signal=INT TPU_NAME='' "KIMI_PYTHON=$python" "$here/tpu_setup.sh" --retries=0)
        again+=(run -- "${program[@]}")
        if [ -n "$dry_run" ]; then
            act "${again[@]}"
            return
        fi
        rm -f "$state_folder/status" "$state_folder/pid"
        setsid nohup "${again[@]}" >>"$state_folder/log" 2>&1 </dev/null &
        put pid $! # setsid and env are replaced by the script, so this stays its number
        return
    fi
    choose_python
    PATH=$(dirname "$python"):$PATH
    if [ -n "$dry_run" ]; then
        local_check
        act "${program[@]}"
        return
    fi
    rm -f "$state_folder/status"
    put pid $$
    local code=0
    restart_loop || code=$?
    put status "exit $code"
    exit "$code"
}

restart_loop() {
    local child='' stopping='' code started failures=0
    # the first signal is for the program, which saves; it must not be started again after it
    trap 'stopping=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
    trap 'stopping=yes; [ -z "$child" ] || kill -INT "$child" 2>/dev/null || true' INT
    while :; do
        local_check || { code=$?; say "the devices do not add up; nothing was started"; return "$code"; }
        [ -z "$stopping" ] || return 130
        started=$SECONDS
        say "starting ${program[*]}"
        # a background job of a shell would ignore SIGINT
        env --default-signal=INT "${program[@]}" &
        child=$!
        while :; do # a trap ends `wait` early
            code=0
            wait "$child" || code=$?
            kill -0 "$child" 2>/dev/null || break
        done
        wait "$child" 2>/dev/null || code=$?
        child=''
        say "ended with status $code"
        if [ "$code" -ne "$RESTART" ] || [ -n "$stopping" ] || [ "$retries" -eq 0 ]; then return "$code"; fi
        [ $((SECONDS - started)) -lt "$HEALTHY" ] || failures=0
        failures=$((failures + 1))
        [ "$failures" -le "$retries" ] || { say "started again $retries times; giving up"; return "$code"; }
    done
}

local_status() {
    local pid
    pid=$(cat "$state_folder/pid" 2>/dev/null || true)
    if [ -f "$state_folder/status" ]; then
        cat "$state_folder/status"
    elif [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
        echo running
    elif [ -n "$pid" ]; then
        echo lost # gone without a word: killed, or the machine was started anew
    else
        echo none
    fi
}

local_logs() { tail -n 100 ${follow:+-f} "$state_folder/log"; }

local_stop() {
    local pid
    pid=$(cat "$state_folder/pid" 2>/dev/null || true)
    if [ "$(local_status)" = running ]; then act kill -INT "$pid"; fi
}

# ----------------------------------------------------------------------------------------------- from a workstation

need_cloud() {
    [ -n "$zone" ] || fail "which zone? --zone=us-east5-a, or TPU_ZONE"
    command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
    where=(--zone="$zone" ${project:+--project="$project"})
}

runtime_of() { # the software of a TPU VM, by chip
    case $1 in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
        tpu7x-*) fail "Ironwood (tpu7x) has no TPU VMs; start the workers with GKE and use ./tpu_setup.sh run in them" ;;
        *) fail "no runtime known for --type=$1; name one with --runtime" ;;
    esac
}

queue() { act gcloud compute tpus queued-resources "$@" "${where[@]}"; }

state() { # of the queued resource; empty if there is none
    if [ -n "$dry_run" ]; then
        queue describe "$name" --format='value(state.state)' >&2
        return
    fi
    local found
    if ! found=$(queue describe "$name" --format='value(state.state)' 2>&1); then
        case $found in
            *NOT_FOUND* | *"not found"*) return ;;
            *) say "gcloud: $found"; echo UNKNOWN ;;
        esac
    else
        echo "$found"
    fi
}

on_workers() { # on_workers WHICH TEXT: a shell command on workers
    act gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

there() { # the same script on the workers, as a text for their shell
    printf 'cd %s && ./tpu_setup.sh --local ' "$FOLDER"
    printf '%q ' "$@"
}

cloud_create() {
    [ -n "$type" ] || fail "which TPU? --type=v5p-128, or TPU_TYPE"
    [ -n "$runtime" ] || runtime=$(runtime_of "$type")
    local tier_flag=() now last=''
    case $tier in
        spot) tier_flag=(--spot) ;;
        reserved) tier_flag=(--reserved) ;;
        on-demand) ;;
        *) fail "--tier is spot, on-demand or reserved, not $tier" ;;
    esac
    while :; do
        now=$(state)
        [ "$now" = "$last" ] || say "$name: ${now:-not there}"
        last=$now
        case $now in
            ACTIVE) return ;;
            '')
                queue create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" \
                    "${tier_flag[@]}"
                [ -z "$dry_run" ] || return 0
                ;;
            FAILED | SUSPENDED) queue delete "$name" --force --quiet ;; # the only way on from there
        esac
        sleep "$poll"
    done
}

cloud_setup() {
    local bundle tree
    bundle=$(mktemp -d)
    # tracked files as they are now, uncommitted changes included
    tree=$(git -C "$here" -c user.name=me -c user.email=me@localhost stash create 2>/dev/null || true)
    act git -C "$here" archive --format=tar.gz --output="$bundle/code.tar.gz" "${tree:-HEAD}"
    act gcloud compute tpus tpu-vm scp "$bundle/code.tar.gz" "$name:code.tar.gz" "${where[@]}" --worker=all
    rm -rf "$bundle"
    on_workers all "mkdir -p $FOLDER && tar -xzf code.tar.gz -C $FOLDER && $(there setup)"
}

cloud_run() {
    [ ${#program[@]} -gt 0 ] || fail "run what? ./tpu_setup.sh --name=$name run -- python -m kimi_jax.train --config=..."
    on_workers all "$(there --detach run -- "${program[@]}")"
}

cloud_status() { on_workers all "$(there status)"; }

# What all workers together mean: running, again (start them), done, unknown, or exit N. A cause counts more than its
# consequences: hosts that jax aborts because one went away, or that saved and ask to be started again, do not hide it.
verdict() {
    local answers cause
    answers=$(grep -Eo '^(running|none|lost|exit [0-9]+)' <<<"$1" | sort -u || true)
    cause=$(grep -Ev "^(none|lost|exit (0|$RESTART|$ABORTED))$" <<<"$answers" | head -n 1 || true)
    case $answers in
        '') echo unknown ;;
        *running*) echo running ;;
        "exit 0") echo "done" ;;
        *) echo "${cause:-again}" ;;
    esac
}

cloud_watch() {
    [ ${#program[@]} -gt 0 ] || fail "watch what? ./tpu_setup.sh --name=$name watch -- python -m kimi_jax.train --config=..."
    local now started=$SECONDS failures=0 silent=0 setup=yes
    while :; do
        if [ "$(state)" != ACTIVE ]; then
            cloud_create
            setup=yes
        fi
        now=$(verdict "$([ -n "$dry_run" ] || cloud_status 2>/dev/null || true)")
        if [ "$now" = unknown ] && [ -z "$setup" ]; then # a machine that is being started anew does not answer either
            silent=$((silent + 1))
            if [ "$silent" -gt 10 ]; then setup=yes; fi
        elif [ "$now" = running ]; then
            setup='' silent=0
        elif [ -z "$setup" ] && [ "$now" = "done" ]; then
            say "the program is done"
            return 0
        elif [ -z "$setup" ] && [ "$now" != again ] && [ "$(state)" != ACTIVE ]; then
            say "the TPU was taken away" # which ends programs in many ways, and shows after they have ended
        elif [ -z "$setup" ] && [ "$now" != again ]; then
            say "the program ended with status ${now#exit }; look at: ./tpu_setup.sh --name=$name logs"
            return "${now#exit }"
        else
            [ $((SECONDS - started)) -lt "$HEALTHY" ] || failures=0
            [ "$failures" -le "$retries" ] || { say "started $failures times; giving up"; return "$RESTART"; }
            failures=$((failures + 1)) started=$SECONDS silent=0
            if { [ -z "$setup" ] || cloud_setup; } && cloud_run; then setup=''; fi
            if [ -n "$dry_run" ]; then cloud_status; return; fi
        fi
        sleep "$poll"
    done
}

cloud_delete() {
    if [ -n "$dry_run" ] || [ -n "$(state)" ]; then queue delete "$name" --force --quiet; fi
}

# ------------------------------------------------------------------------------------------------------------- main

main() {
    parse "$@"
    case $command in
        create | watch | delete) [ -n "$name" ] || fail "$command needs a TPU: --name=NAME, or TPU_NAME" ;;
        setup | check | run | status | logs | stop) ;;
        '') usage >&2; exit 2 ;;
        *) fail "unknown command $command; --help lists them" ;;
    esac
    if [ -z "$name" ]; then
        "local_$command"
        return
    fi
    need_cloud
    case $command in
        check | stop) on_workers all "$(there "$command")" ;;
        logs) on_workers "$worker" "$(there ${follow:+--follow} logs)" ;;
        *) "cloud_$command" ;;
    esac
}

main "$@"
