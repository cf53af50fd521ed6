"""Starting training under torchrun, and finding out why it failed. This module imports no torch."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any

from twhin_pipeline import remote
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.training import PREVIOUS
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.sharding.machine import threads_per_process
from twhin_pipeline.store import Store
from twhin_pipeline.training import nodes
from twhin_pipeline.training.reporting import (
    KINDS,
    PROGRESS,
    RECORDS_ENV,
    VALIDATION,
    ProgressBar,
    ValidationRecord,
    parse_record,
)

LOOPBACK = "127.0.0.1"
CANCELLED_EXIT = 75
"""A rank's exit code after it was told to stop and has written a checkpoint (EX_TEMPFAIL: try again later)."""
# A rank in torchrun's list of failures.
_FAILED_RANK = re.compile(
    r"time +: (?P<time>\S+)\s+host +: \S+\s+rank +: (?P<rank>\d+) \(local_rank: (?P<local_rank>\d+)\)\s+"
    r"exitcode +: (?P<code>-?\d+) \(pid: \d+\)[^\n]*\s+error_file: (?P<file>[^\n]+)"
)
_RANK_LINE = re.compile(r"^\[[a-z]+(\d+)\]:(.*)$", re.DOTALL)


class TrainingFailed(Exception):  # noqa: N818 (it is what happened, not what to mend)
    """Training ended with an error that is not the user's; the message is the failing rank's own traceback."""


class TrainingCancelled(Exception):  # noqa: N818
    """Training was told to stop and did, after a checkpoint; the same command goes on from there."""


@dataclass(frozen=True)
class Failure:
    """What the first rank to fail wrote."""

    rank: int
    kind: str
    """The exception's name."""
    message: str
    traceback: str
    when: int = 0
    """Nanoseconds since the epoch, by the clock of the rank's machine."""

    @property
    def words(self) -> str:
        """Which rank failed, and its traceback; of a job that failed as a whole, what it is known to have done."""
        return self.traceback if self.rank < 0 else f"rank {self.rank} failed:\n{self.traceback}"


def command(
    config: TwhinConfig,
    config_path: str,
    store: Store,
    snapshot: str,
    log_dir: str,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Return the command that trains `snapshot` where `launch.kind` says, and ends with its parent.

    On this machine it is torchrun. Else it is a process that submits a job, prints the lines of its ranks, cancels it
    on a signal, and leaves its first failure in `log_dir`, as torchrun does. The arguments are `torchrun_command`'s.
    """
    if config.launch.kind == "local":
        return torchrun_command(config, config_path, store, snapshot, log_dir, overrides)
    submitter = [sys.executable, "-m", "twhin_pipeline.launchers.submit", "--log-dir", log_dir]
    return [*submitter, *train_arguments(config_path, store, snapshot, overrides)]


def train_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of what `train_arguments` makes, for whatever stands between it and `train.main`."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--config", required=True, help="YAML file: path or URL")
    parser.add_argument("--snapshot", required=True, help="YYYY-MM-DD")
    parser.add_argument("--home", help="the store's root (default: TWHIN_HOME, else .twhin)")
    parser.add_argument("--view", help="a view of the store, such as refit: its training set and model")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a field")
    return parser


def train_arguments(config_path: str, store: Store, snapshot: str, overrides: Sequence[str]) -> list[str]:
    """Return the command-line arguments by which `train.main` finds what to train."""
    arguments = ["--config", config_path, "--snapshot", snapshot, "--home", store.root]
    arguments += ["--view", store.view] if store.view else []
    for override in overrides:
        arguments += ["--set", override]
    return arguments


def torchrun_command(
    config: TwhinConfig,
    config_path: str,
    store: Store,
    snapshot: str,
    log_dir: str,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Return the command that trains `snapshot`: torchrun in a wrapper that ends it with its parent.

    `log_dir` gets each rank's output and, where a rank fails, its error (`first_failure`). Run it with `environment`.
    """
    launch = config.launch
    if launch.nnodes == 1:
        # Ranks of one node need no network, and no name of the machine that resolves.
        meeting = ["--standalone", f"--local-addr={LOOPBACK}"]
    else:
        meeting = [
            f"--nnodes={launch.nnodes}",
            f"--node-rank={launch.node_rank}",
            "--rdzv-backend=c10d",
            # Ranks compare their configurations, so that one that differs is an error and not a wait.
            f"--rdzv-id=twhin-{snapshot}-{store.view or 'model'}",
            f"--rdzv-endpoint={launch.rdzv_endpoint}",
            f"--local-addr={nodes.label(config)}",
            f"--rdzv-conf=is_host={int(not nodes.joins(config))},join_timeout={math.ceil(launch.join_timeout_s)}",
        ]
    torchrun = [
        *meeting,
        f"--nproc-per-node={launch.nproc_per_node}",
        f"--max-restarts={launch.max_restarts}",
        "--tee=3",
        f"--log-dir={log_dir}",
    ]
    train = train_arguments(config_path, store, snapshot, overrides)
    wrapper = [sys.executable, "-m", "twhin_pipeline.training.with_parent"]
    return [
        *wrapper,
        sys.executable,
        "-m",
        "torch.distributed.run",
        *torchrun,
        "-m",
        "twhin_pipeline.training.train",
        *train,
    ]


def environment(config: TwhinConfig) -> dict[str, str]:
    """Return the environment variables to add for the training processes."""
    # What loading the configuration warns of, the process that starts the ranks has shown already.
    ignored = [os.environ.get("PYTHONWARNINGS"), "ignore::UserWarning:twhin_pipeline.config.twhin_config"]
    return {
        "PYTHONWARNINGS": ",".join(filter(None, ignored)),
        **({"GLOO_SOCKET_IFNAME": interface} if (interface := _interface(config)) else {}),
        # The nodes that stay would look for the place of a former rank 0 where that came back as a new process.
        **({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if config.launch.nnodes > 1 else {}),
        "OMP_NUM_THREADS": str(threads_per_process(config)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        # Huge pages: a step's tensors then cause no page faults, and random rows of a table fewer misses.
        "THP_MEM_ALLOC_ENABLE": "1",
        # What a step frees, the next one takes. Given back to the system, it is found and set to 0 anew each time.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_TOP_PAD_": str(2**27),
        **config.launch.env,
    }


def check_meeting(config: TwhinConfig, say: Callable[[str], None] = print) -> None:
    """See whether the processes of one node can meet; torchrun would find out after minutes. Wait for node 0.

    Raises:
        UserError: They cannot.
        UnavailableError: This node joins node 0, which does not open its training in time.
    """
    if nodes.joins(config):
        nodes.wait_for_first(config, say)
    if config.launch.nnodes > 1 or config.launch.kind != "local":
        return
    try:
        with (
            socket.create_server((LOOPBACK, 0)) as listening,
            socket.create_connection(listening.getsockname(), timeout=10),
        ):
            return
    except OSError as error:
        raise UserError(
            f"training processes meet on {LOOPBACK}, which cannot be reached ({error.strerror or error}); bring the "
            "loopback interface up (`ip link set lo up`), or start the container with one"
        ) from error


def _interface(config: TwhinConfig) -> str | None:
    """Return the interface by which ranks meet; None where it is set, or not known."""
    if "GLOO_SOCKET_IFNAME" in os.environ or config.launch.kind != "local":
        return None
    if config.launch.nnodes > 1:
        return nodes.interface(config)
    names = {name for _, name in socket.if_nameindex()}
    return next((name for name in ("lo", "lo0") if name in names), None)


def check_places(config: TwhinConfig) -> None:
    """Raise UserError where checkpoints could not be written, or an earlier model not be read, before ranks start."""
    save_dir, initial = config.training.save_dir, config.training.initial_checkpoint_dir
    if initial is not None and initial != PREVIOUS:
        with remote.reading(f"training.initial_checkpoint_dir: {initial}", "correct it, or install what it needs"):
            remote.filesystem(initial)
    if save_dir is None:
        return
    remedy = "give a folder or URL that can be written, or leave it out: checkpoints then go to the store"
    try:
        fs, inner = remote.filesystem(save_dir)
        fs.makedirs(inner, exist_ok=True)
        if remote.local_path(save_dir) is not None and not os.access(inner, os.W_OK):
            raise PermissionError(f"no right to write {inner}")
    except Exception as error:  # each file system has errors of its own
        raise UserError(
            f"training.save_dir: {save_dir}: cannot be written ({remote.reason(error)}); {remedy}"
        ) from error


def run(
    config: TwhinConfig,
    config_path: str,
    overrides: Sequence[str],
    store: Store,
    snapshot: str,
    *,
    log_dir: str | None = None,
    output: Callable[[str], None] | None = None,
    on_validation: Callable[[ValidationRecord], None] | None = None,
    on_record: Callable[[str, dict[str, Any]], None] | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> None:
    """Train where `launch.kind` says and wait for it; SIGINT and SIGTERM are passed on, once each.

    torchrun's own lines go to `<log_dir>/torchrun.log`.

    Args:
        config: As `config_path` and `overrides` make it.
        config_path: The YAML file, which the ranks read.
        overrides: Fields set over it.
        store: Where the training set is and the model goes.
        snapshot: Which one.
        log_dir: Where ranks' logs go; left out, `default_log_dir`.
        output: Gets the ranks' lines; left out, they are printed, with a progress bar on a terminal.
        on_validation: Gets each evaluation, from the thread that called this.
        on_record: Gets the kind and the values of every record of rank 0 (`reporting.KINDS`), in place of `output` and
            `on_validation`.
        on_failure: Gets the failure of the rank that failed first, before the error is raised.

    Raises:
        UserError: A rank met a mistake of the user's.
        UnavailableError: Node 0 did not come, or not come back, in time.
        TrainingCancelled: A signal came; a checkpoint was written where a rank had begun to train.
        TrainingFailed: Anything else, with the failing rank's traceback.
    """
    check_meeting(config)
    if config.launch.kind == "local":  # else each node looks for itself
        check_places(config)
    folder = Path(log_dir or default_log_dir(store, snapshot))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    starting = command(config, config_path, store, snapshot, str(folder), overrides)
    env = {**os.environ, **environment(config)}
    handlers: dict[str, Callable[[dict[str, Any]], None]] = {}
    if on_validation is not None:
        handlers[VALIDATION] = lambda values: on_validation(ValidationRecord(**values))
    if on_record is not None:
        handlers = {kind: partial(on_record, kind) for kind in KINDS}
    with _display(output) as (show, bar):
        if bar is not None:
            handlers[PROGRESS] = lambda values: bar.update(**values)
        env[RECORDS_ENV] = ",".join(handlers)
        # Libraries load for some 10 s, and loops that are new compile for longer: silence would look like a hang.
        ranks = config.launch.nproc_per_node
        if config.launch.kind == "local":
            show(f"starting {ranks} training process{'es' if ranks > 1 else ''}; the first step is taken in 10 to 60 s")
        left = config.launch.max_restarts if nodes.joins(config) else 0
        try:
            # torchrun itself starts ranks again. It ends where node 0 is gone, and with it the place to meet.
            while (failed := _started(starting, env, folder, show, handlers, single=ranks == 1)) is not None:
                if not (left and failed.lost_first_node):
                    break
                left -= 1
                show("the connection to node 0 was lost")
                nodes.wait_for_first(config, show)
        finally:
            keep_logs(store, snapshot, config, folder, began)
    if failed is not None:
        if failed.cause is not None and on_failure is not None:
            on_failure(failed.cause)
        raise failed.error("torchrun" if config.launch.kind == "local" else "the job's submitter")


@dataclass(frozen=True)
class _Failed:
    """How a training ended that did not end well."""

    code: int
    cause: Failure | None
    signalled: bool
    output: str

    @property
    def lost_first_node(self) -> bool:
        """Whether the connection to node 0 was lost, which may come back."""
        mistaken = self.cause is not None and mistake_of(self.cause) is not None
        return not self.signalled and not mistaken and any(name in self.output for name in nodes.LOST)

    def error(self, starter: str) -> Exception:
        """Return the exception to raise; `starter` is what started the ranks."""
        if self.cause is None:
            if self.signalled:  # before a rank could write a checkpoint, or after it had ended
                return TrainingCancelled("training was stopped by a signal; the same command trains again")
            last = _last_lines(self.output)
            return TrainingFailed(
                f"{starter} ended with exit code {self.code} before any rank failed; its last lines:\n{last}"
            )
        if (mistake := mistake_of(self.cause)) is not None:
            return mistake
        if self.cause.kind == "TrainingCancelled":
            return TrainingCancelled(self.cause.message)
        return TrainingFailed(self.cause.words)


def _started(
    command: Sequence[str],
    env: Mapping[str, str],
    folder: Path,
    show: Callable[[str], None],
    handlers: Mapping[str, Callable[[dict[str, Any]], None]],
    *,
    single: bool,
) -> _Failed | None:
    """Run what starts the ranks to its end; return how it failed, None where it did not."""
    # Failures of earlier launches must not be taken for this one's.
    before = set(_rank_files(str(folder)))
    # A session of its own: a Ctrl-C in the terminal then reaches torchrun once, from us.
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    with (
        _forwarded_signals(process) as forwarded,
        (folder / "torchrun.log").open("a+", encoding="utf-8", errors="replace") as log,
    ):
        begin = log.tell()
        _relay(process.stdout, show, handlers, log, single=single)
        code = process.wait()
        log.seek(begin)
        output = log.read()
    if code == 0:
        return None
    return _Failed(code, first_failure(str(folder), before, output), bool(forwarded), output)


def keep_logs(store: Store, snapshot: str, config: TwhinConfig, folder: str | Path, since: float = 0) -> None:
    """Copy this node's logs of a training, written `since` then, to a remote store: `logs/train/<snapshot>/node-<n>`.

    Where the store does not take them, training has not failed of that: they stay where they are.
    """
    if store.is_local or config.launch.kind != "local":  # the nodes of a job do it
        return
    target = store.path("logs", "train", snapshot, f"node-{config.launch.node_rank}")
    try:
        for path in sorted(file for file in Path(folder).rglob("*") if file.is_file()):
            if path.stat().st_mtime < since:
                continue
            store.fs.put_file(str(path), f"{target}/{path.relative_to(folder)}")
    except Exception as error:  # of any kind of store
        print(f"the logs are in {folder} alone: {remote.reason(error)}", file=sys.stderr)


def mistake_of(cause: Failure) -> UserError | None:
    """Return the mistake of the user's that a rank met, or what it found unavailable; None for any other failure."""
    kinds = {kind.__name__: kind for kind in (UserError, UnavailableError)}
    return kinds[cause.kind](cause.message) if cause.kind in kinds else None


def default_log_dir(store: Store, snapshot: str) -> str:
    """Return where ranks' logs go: in a local store `logs/train/<snapshot>`, else under the working directory."""
    return store.path("logs", "train", snapshot) if store.is_local else f"twhin-logs/train/{snapshot}"


def first_failure(log_dir: str, ignoring: Collection[str] = (), output_of_torchrun: str = "") -> Failure | None:
    """Return the failure of the rank that failed first: the cause, where other ranks failed because of it.

    Args:
        log_dir: Where ranks wrote their errors and logs.
        ignoring: Files of earlier launches.
        output_of_torchrun: torchrun's own lines, which name ranks that ended without a word, such as by a signal.
    """
    files = [path for path in _rank_files(log_dir) if path not in ignoring]
    # Where torchrun started the ranks again, the last time counts.
    last = max(map(_attempt, files), default=0)
    files = [path for path in files if _attempt(path) == last]
    result = _deaths(output_of_torchrun, files)
    for path in files:
        if not path.endswith("error.json"):
            continue
        try:
            message = json.loads(Path(path).read_text(encoding="utf-8"))["message"]
        except (OSError, ValueError, KeyError):
            continue
        rank = Path(path).parent.name
        text, extra = (message["message"], message["extraInfo"]) if isinstance(message, dict) else (str(message), {})
        kind, _, rest = text.partition(": ")
        failure = Failure(int(rank) if rank.isdigit() else -1, kind, rest, str(extra.get("py_callstack") or text))
        # torch's own timestamp has whole seconds, within which the others already feel the broken connection.
        result.append((Path(path).stat().st_mtime_ns, failure))
    if not result:
        return None
    when, failure = min(result, key=lambda item: (item[0], item[1].rank))
    return replace(failure, when=when)


def _attempt(path: str) -> int:
    """Return the number of the start, from 0, that a rank's file is of."""
    match = re.search(r"/attempt_(\d+)/", path)
    return int(match[1]) if match else 0


def _rank_files(log_dir: str) -> list[str]:
    """Return the files with ranks' errors and with what they wrote to standard error."""
    return [str(path) for name in ("error.json", "stderr.log") for path in Path(log_dir).rglob(name)]


def _deaths(output_of_torchrun: str, files: Sequence[str]) -> list[tuple[int, Failure]]:
    """Return the ranks that ended without an error file, each after the time of its last line, in nanoseconds.

    Left out are those that torchrun itself ended because another rank had failed.
    """
    deaths = []
    ranks = [match.groupdict() for match in _FAILED_RANK.finditer(output_of_torchrun)]
    times = [datetime.fromisoformat(each["time"]) for each in ranks]
    for each, at in zip(ranks, times, strict=True):
        rank, local_rank, code = each["rank"], each["local_rank"], int(each["code"])
        if each["file"].strip() != "<N/A>" or code == -signal.SIGTERM or at - min(times) > timedelta(seconds=2):
            continue
        logs = [Path(file) for file in files if file.endswith(f"/{local_rank}/stderr.log")]
        when = logs[0].stat().st_mtime_ns if logs else 0
        if code == -signal.SIGKILL:
            text = f"rank {rank} was ended by SIGKILL, which the kernel sends when memory runs out"
        else:
            how = f"ended with exit code {code}"
            if code < 0:
                how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
            last = _last_lines(logs[0].read_text(errors="replace", encoding="utf-8")) if logs else ""
            text = f"rank {rank} {how}; its last lines:\n{last}"
        deaths.append((when, Failure(int(rank), "RankDied", text.partition("\n")[0], text)))
    return deaths


def _last_lines(text: str, count: int = 30) -> str:
    return "\n".join(text.splitlines()[-count:])


@contextmanager
def _forwarded_signals(process: subprocess.Popen[str]) -> Iterator[set[int]]:
    """Pass signals on; yield those that came."""
    sent: set[int] = set()

    def forward(number: int, _frame: Any) -> None:
        if number not in sent and process.poll() is None:
            sent.add(number)
            process.send_signal(number)

    try:
        previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are the caller's
        yield sent
        return
    try:
        yield sent
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _relay(
    lines: IO[str],
    show: Callable[[str], None],
    handlers: Mapping[str, Callable[[dict[str, Any]], None]],
    log: IO[str],
    *,
    single: bool,
) -> None:
    """Pass on what torchrun prints: records to the handler of their kind, ranks' lines to `show`, others to `log`."""
    for line in lines:
        match = _RANK_LINE.match(line.rstrip("\n"))
        if match is None:
            log.write(line)
            log.flush()
        elif (record := parse_record(match[2])) is not None:
            kind, values = record
            handlers[kind](values)
        else:
            show(match[2] if single or match[1] == "0" else f"[rank {match[1]}] {match[2]}")


@contextmanager
def _display(output: Callable[[str], None] | None) -> Iterator[tuple[Callable[[str], None], ProgressBar | None]]:
    """Yield what to call with each line of a rank, and the progress bar where there is one."""
    if output is not None or not sys.stdout.isatty():
        yield output or (lambda line: print(line, flush=True)), None
        return
    with ProgressBar() as bar:
        yield bar.print, bar
