"""tpu_setup.sh against a cloud that is a folder: a `gcloud` on PATH that records its calls and has two real workers.

Each worker is a home folder in which the script's remote commands really run. The psum of `check` has its own test in
tests/train/test_hosts.py; here a stand-in says what it would say, so that no test waits for jax.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.environment import REPO

SCRIPT = REPO / "tpu_setup.sh"
PATIENCE = 600  # seconds that a test waits for what must happen; never how long something takes
POD = ["--name=pod", "--zone=us-east5-a", "--project=mine", "--type=v5p-16", "--poll=0"]

# A queued resource waits for one look before it is there; SUSPENDED is what a spot TPU becomes when it is taken away.
GCLOUD = r"""#!/usr/bin/env bash
set -eu
cd "$CLOUD"
printf '%q ' "$@" | sed 's/ $//' >>calls; echo >>calls
homes() { case " $* " in *" --worker=0 "*) echo w0 ;; *) echo w0 w1 ;; esac; }
case "$3 $4" in
    "queued-resources describe")
        [ -f state ] || { echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; }
        cat state; [ "$(cat state)" != WAITING_FOR_RESOURCES ] || echo ACTIVE >state ;;
    "queued-resources create") [ ! -f state ]; echo WAITING_FOR_RESOURCES >state; mkdir w0 w1 ;;
    "queued-resources delete") # `run --detach` starts a session of its own on each worker, which ends with the machine
        for w in w0 w1; do kill -KILL -- "-$(cat "$w/kimi_jax/.run/pid")" || true; done 2>/dev/null
        rm -rf state w0 w1 ;;
    "tpu-vm scp") for w in $(homes "$@"); do cp "$5" "$w/${6#*:}"; done ;;
    "tpu-vm ssh")
        [ "$(cat state)" = ACTIVE ]
        for last; do :; done
        for w in $(homes "$@"); do (cd "$w"; HOME=$PWD TPU_NAME= WORKER=$w bash -c "${last#--command=}"); done ;;
    *) echo "no such command: $*" >&2; exit 9 ;;
esac
"""
# Stands in for the environment's Python: the check passes or not, everything else is the real one.
PYTHON = rf"""#!/usr/bin/env bash
if [ "$*" = "-m kimi_jax.hosts" ]; then
    echo "psum over 8 devices: 8" >>"$CLOUD/checks"
    exit "$(cat "$CLOUD/check_code" 2>/dev/null || echo 0)"
fi
exec {sys.executable} "$@"
"""


@pytest.fixture
def cloud(tmp_path):
    """The folder that is the cloud."""
    for name, text in (("gcloud", GCLOUD), ("python", PYTHON)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def environment(cloud: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "KIMI_"))}
    return clean | {
        "PATH": f"{cloud / 'bin'}:{os.environ['PATH']}",
        "CLOUD": str(cloud),
        "KIMI_PYTHON": str(cloud / "bin" / "python"),
        "KIMI_STATE": "",  # each worker its own, below its checkout
    }


def call(cloud: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    command, env = [str(SCRIPT), *arguments], environment(cloud) | more
    return subprocess.run(command, cwd=cloud, env=env, capture_output=True, text=True, timeout=PATIENCE)


def calls(cloud: Path) -> list[list[str]]:
    """The calls of gcloud, each as words without `compute tpus`, and without looks at the state."""
    path = cloud / "calls"
    lines = [shlex.split(line)[2:] for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line[1] != "describe"]


def kinds(cloud: Path) -> list[str]:
    return [call[1] for call in calls(cloud)]


def program(cloud: Path, body: str) -> list[str]:
    """A program for the workers; `$N` counts its starts on this worker, over all lives of the TPU."""
    path = cloud / "program"
    path.write_text('#!/usr/bin/env bash\necho start >>"$CLOUD/starts.$WORKER"\nN=$(wc -l <"$CLOUD/starts.$WORKER")\n')
    with path.open("a") as file:
        file.write(body)
    path.chmod(0o755)
    return ["--", str(path), "an argument with 'quotes' and $signs"]


def until(condition: Callable[[], bool]) -> None:
    """Waits for what must happen, and not for a time; a test that would wait for ever fails."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)  # the core is for those who are waited for


def starts(cloud: Path, worker: str) -> int:
    return len((cloud / f"starts.{worker}").read_text().splitlines())


# ------------------------------------------------------------------------------------------------ from a workstation


def test_create_asks_once_waits_and_gives_back_once(cloud):
    for _ in range(2):
        out = call(cloud, *POD, "create")
        assert out.returncode == 0, out.stderr
    where = ["--zone=us-east5-a", "--project=mine"]
    wanted = ["--node-id=pod", "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5", "--spot", *where]
    assert calls(cloud) == [["queued-resources", "create", "pod", *wanted]]
    for _ in range(2):
        assert call(cloud, *POD, "delete").returncode == 0
    assert calls(cloud)[1:] == [["queued-resources", "delete", "pod", "--force", "--quiet", *where]]


@pytest.mark.parametrize("lost", ["SUSPENDED", "FAILED"])
def test_create_asks_anew_for_what_cannot_come_back(cloud, lost):
    (cloud / "state").write_text(lost)
    assert call(cloud, *POD, "create").returncode == 0
    assert kinds(cloud) == ["delete", "create"]


def test_setup_brings_the_code_and_checks_every_worker(cloud):
    call(cloud, *POD, "create")
    for _ in range(2):
        out = call(cloud, *POD, "setup")
        assert out.returncode == 0, out.stderr
    assert kinds(cloud) == ["create", "scp", "ssh", "scp", "ssh"]
    for worker in ("w0", "w1"):
        assert (cloud / worker / "kimi_jax" / "kimi_jax" / "train" / "loop.py").exists()
    assert len((cloud / "checks").read_text().splitlines()) == 4


def test_watch_survives_a_request_to_restart_and_a_preemption(cloud):
    """Status 75 first; then the TPU is taken away under the program; then it runs to its end. One command for all."""
    body = """
[ "$1" = "an argument with 'quotes' and \\$signs" ] || exit 3
case $WORKER$N in
    w01 | w11) exit 75 ;;
    w02) echo SUSPENDED >"$CLOUD/state"; touch "$CLOUD/taken"; exit 143 ;;
    *) until [ -f "$CLOUD/taken" ]; do read -rt 0.1 <> <(:) || true; done ;;
esac
"""
    out = call(cloud, *POD, "watch", *program(cloud, body))
    assert out.returncode == 0, out.stderr
    names = [name for name in kinds(cloud) if name in ("create", "delete", "scp")]
    assert names == ["create", "scp", "delete", "create", "scp"]  # set up once for each TPU
    assert starts(cloud, "w0") >= 3 and "the program is done" in out.stderr
    # and every start came after a check on that worker
    assert len((cloud / "checks").read_text().splitlines()) >= starts(cloud, "w0") + starts(cloud, "w1")


@pytest.mark.parametrize("body, code", [("exit 7", 7), ("exit 75", 75), ("[ $WORKER = w1 ] || exit 134; exit 5", 5)])
def test_watch_ends_with_an_error_that_a_restart_would_not_mend(cloud, body, code):
    """Also with one that comes back each time, and with the cause where other hosts only followed."""
    out = call(cloud, *POD, "--retries=2", "watch", *program(cloud, body))
    assert out.returncode == code, out.stderr
    assert starts(cloud, "w1") == (3 if code == 75 else 1)


def test_watch_goes_on_with_a_program_that_is_running(cloud):
    body = 'trap "exit 130" INT; while [ ! -f "$CLOUD/go" ]; do read -rt 0.1 <> <(:) || true; done'
    run = program(cloud, body)
    call(cloud, *POD, "create")
    call(cloud, *POD, "setup")
    for _ in range(2):
        out = call(cloud, *POD, "run", *run)
        assert out.returncode == 0, out.stderr
    assert "already running" in out.stderr
    assert call(cloud, *POD, "status").stdout.split() == ["running", "running"]
    before = len(kinds(cloud))
    watching = subprocess.Popen([str(SCRIPT), *POD, "watch", *run], cwd=cloud, env=environment(cloud))
    until(lambda: len(kinds(cloud)) >= before + 2)  # it has looked
    (cloud / "go").touch()
    assert watching.wait(PATIENCE) == 0
    assert set(kinds(cloud)[before:]) == {"ssh"} and starts(cloud, "w0") == starts(cloud, "w1") == 1
    logs = call(cloud, *POD, "--worker=0", "logs").stdout
    assert "starting" in logs and "ended with status 0" in logs


def test_stop_ends_the_program_for_good(cloud):
    run = program(cloud, 'trap "exit 130" INT; touch "$CLOUD/up.$WORKER"; while :; do read -rt 0.1 <> <(:) || :; done')
    call(cloud, *POD, "create")
    call(cloud, *POD, "setup")
    assert call(cloud, *POD, "run", *run).returncode == 0
    until(lambda: all((cloud / f"up.{w}").exists() for w in ("w0", "w1")))
    assert call(cloud, *POD, "stop").returncode == 0
    until(lambda: "running" not in call(cloud, *POD, "status").stdout)
    assert call(cloud, *POD, "status").stdout.splitlines() == ["exit 130", "exit 130"]


def test_dry_run_prints_the_commands_and_calls_nothing(cloud):
    out = call(cloud, *POD, "--dry-run", "watch", "--", "python", "-m", "kimi_jax.train", "--config=a b.py")
    assert out.returncode == 0 and not (cloud / "calls").exists(), out.stderr
    printed = [shlex.split(line.removeprefix("+ ")) for line in out.stdout.splitlines() if line.startswith("+ gcloud")]
    assert [line[4] for line in printed] == ["create", "scp", "ssh", "ssh", "ssh"]
    assert r"run -- python -m kimi_jax.train --config=a\ b.py" in printed[3][-1]
    for command in (["create"], ["setup"], ["check"], ["run", "--", "x"], ["status"], ["logs"], ["stop"], ["delete"]):
        out = call(cloud, *POD, "--dry-run", *command)
        assert out.returncode == 0 and "+ gcloud compute tpus" in out.stdout, (command, out.stderr)
        assert call(cloud, *POD[4:], "--dry-run", *command).returncode in (0, 1, 2)  # on this machine, or a reason
    assert not (cloud / "calls").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["create"], "--name=NAME"),
        (["--name=pod", "create"], "--zone="),
        (["--name=pod", "--zone=z", "create"], "--type="),
        (["--name=pod", "--zone=z", "--type=h100-8", "create"], "no runtime known for --type=h100-8"),
        (["--name=pod", "--zone=z", "--type=tpu7x-16", "create"], "GKE"),
        (["--name=pod", "--zone=z", "--type=v4-8", "--tier=free", "create"], "--tier is spot"),
        (["--nam=pod", "create"], "unknown option --nam=pod"),
        (["fly"], "unknown command fly"),
        (["run"], "run what?"),
    ],
)
def test_mistakes_say_what_to_give(cloud, arguments, message):
    out = call(cloud, *arguments)
    assert out.returncode == 2 and message in out.stderr and not kinds(cloud)


# --------------------------------------------------------------------------------------------------- on this machine


def test_here_a_program_that_asks_for_it_is_started_again(cloud):
    run = program(cloud, '[ "$N" -ge 3 ] && exit 0; exit 75')
    out = call(cloud, "run", *run, WORKER="here", KIMI_STATE=str(cloud / "state_here"))
    assert out.returncode == 0 and starts(cloud, "here") == 3, out.stderr
    assert call(cloud, "status", KIMI_STATE=str(cloud / "state_here")).stdout == "exit 0\n"
    out = call(cloud, "--retries=1", "run", *program(cloud, "exit 75"), WORKER="b", KIMI_STATE=str(cloud / "b"))
    assert out.returncode == 75 and starts(cloud, "b") == 2 and "giving up" in out.stderr


def test_nothing_starts_where_the_devices_do_not_add_up(cloud):
    (cloud / "check_code").write_text("1")
    out = call(cloud, "run", *program(cloud, ""), WORKER="here", KIMI_STATE=str(cloud / "state_here"))
    assert out.returncode == 1 and "nothing was started" in out.stderr
    assert not (cloud / "starts.here").exists()


def test_signal_reaches_the_program_which_is_not_started_again(cloud):
    run = program(cloud, 'trap "exit 75" TERM; touch "$CLOUD/up"; while :; do read -rt 0.1 <> <(:) || :; done')
    here = environment(cloud) | {"WORKER": "here", "KIMI_STATE": str(cloud / "state_here")}
    process = subprocess.Popen([str(SCRIPT), "run", *run], cwd=cloud, env=here)
    until(lambda: (cloud / "up").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75 and starts(cloud, "here") == 1


def test_shellcheck_has_nothing_to_say():
    beside = Path(sys.executable).with_name("shellcheck")
    tool = str(beside) if beside.exists() else shutil.which("shellcheck")
    if tool is None:
        if os.environ.get("CI") == "true":
            pytest.fail("shellcheck is missing; it comes with the extra [test]")
        pytest.skip("shellcheck is not installed; it comes with the extra [test]")
    out = subprocess.run([tool, str(SCRIPT)], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout
