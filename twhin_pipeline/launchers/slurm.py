"""Slurm: one job a training, with one task a node that runs torchrun, by `sbatch` and `srun`.

Nodes and this machine share the folder of the logs, as they share the user's home on most clusters: the job's output is
read from there while it grows. The job gets this process's environment, as sbatch has it by default, so that nothing
of it stands in the script. https://slurm.schedmd.com/sbatch.html
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from twhin_pipeline import remote
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.configuration_file import LARGEST
from twhin_pipeline.config.schedulers import SlurmConfig
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.launchers.job import ENDED, State, Training
from twhin_pipeline.training.reporting import RECORD_MARK, parse_record
from twhin_pipeline.training.with_parent import STOP_SIGNAL

CHECKPOINT_S = 120
"""How long before the limit of time ranks are told to write a checkpoint."""
ASK_S = 5.0
"""How often Slurm's controller is asked for the job's state, s."""
OUTPUT_S = 3.0
"""How long a shared file system may take to show the last lines of a job that has ended, s."""
OVER = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
}  # fmt: skip
REMEDY = {
    "TIMEOUT": "; give it more with launch.slurm.time, or train again: it goes on from the last checkpoint",
    "OUT_OF_MEMORY": "; `twhin plan` says what a node needs, and launch.slurm.sbatch: [--mem=…] asks for it",
    "CANCELLED": "; the same command trains again, from the last checkpoint",
}


def script(config: TwhinConfig, training: Training, config_path: str, output: str, log_dir: str) -> str:
    """Return the batch script of a training.

    Args:
        config: With `launch.kind: slurm`.
        training: What is trained.
        config_path: Where nodes read the configuration.
        output: The file for the job's output, in which `%j` is the job's number.
        log_dir: The folder, seen by nodes, for logs of their ranks.
    """
    asked = config.launch.slurm or SlurmConfig()
    options = {
        "job-name": training.name,
        "nodes": config.launch.nnodes,
        "ntasks-per-node": 1,
        # A try begins when the one before has ended, also where its submitter was killed.
        "dependency": "singleton",
        "output": output,
        "open-mode": "append",
        "partition": asked.partition,
        "account": asked.account,
        "time": asked.time,
        "signal": None if asked.time is None else f"{STOP_SIGNAL.name.removeprefix('SIG')}@{CHECKPOINT_S}",
        "gpus-per-node": asked.gpus_per_node,
        "cpus-per-task": asked.cpus_per_node,
    }
    lines = [f"#SBATCH --{name}={_quoted(str(value))}" for name, value in options.items() if value is not None]
    lines += [f"#SBATCH {option}" for option in asked.sbatch]
    # srun does not take over sbatch's --cpus-per-task.
    srun = [
        "srun",
        "--kill-on-bad-exit=1",
        *([f"--cpus-per-task={asked.cpus_per_node}"] if asked.cpus_per_node else []),
    ]
    arguments = [sys.executable, *training.node_arguments(config_path), "--log-dir", log_dir]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            *asked.setup,
            "# Nodes meet at the address by which Slurm itself reaches the first of them.",
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            """address=$(scontrol show node --oneliner "$first" | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)""",
            f'{" ".join(srun)} {shlex.join(arguments)} --endpoint "$address:$((20000 + SLURM_JOB_ID % 10000))"',
            "code=$?",
            f"""printf '\\n%b%s {{"code": %s}}\\n' '{_escaped(RECORD_MARK)}' {ENDED} $code""",
            "exit $code",
            "",
        ]
    )


def _quoted(value: str) -> str:
    """Return a value as sbatch reads it from a script's comment, where a space ends it."""
    return f'"{value}"' if re.search(r"[\s#]", value) else value


def _escaped(text: str) -> str:
    """Return `text` with the control signs as printf's `%b` reads them, so that the script is plain text."""
    return "".join(f"\\0{ord(sign):03o}" if ord(sign) < 32 else sign for sign in text)


class SlurmJob:
    """A training as a job of Slurm."""

    def __init__(self, config: TwhinConfig, training: Training, log_dir: str) -> None:
        """Take what to train.

        Args:
            config: With `launch.kind: slurm`.
            training: What is trained.
            log_dir: The folder, seen by nodes, for the script, the job's output and a copy of the configuration.
        """
        self.config, self.training, self.folder = config, training, Path(log_dir).absolute()
        self.number = ""
        self.code: int | None = None
        """The exit code that the script printed, once it has."""
        self._output: IO[bytes] | None = None
        self._rest = b""
        self._state, self._asked = State("waiting"), float("-inf")
        self._over_since: float | None = None

    def start(self) -> str:
        """Submit the job.

        Raises:
            UserError: Slurm is not installed here, or refuses the job.
            UnavailableError: Its controller does not answer.
        """
        if shutil.which("sbatch") is None:
            raise UserError(
                "launch.kind: slurm needs sbatch, which is not here; run this on a machine of the cluster on which "
                "sbatch works, or set launch.kind=local"
            )
        # The file may change while the job waits; its nodes need not see where it is.
        folder = self.folder.with_name(f"{self.folder.name}.nodes") / str(time.time_ns())
        folder.mkdir(parents=True)
        copy = folder / "config.yaml"
        copy.touch(0o600)  # its owner may have kept the original to himself
        copy.write_text(remote.text(self.training.config_path, LARGEST, "a YAML file"), encoding="utf-8")
        output = str(folder).replace("%", "%%") + "/job-%j.out"
        path = folder / "job.sbatch"
        path.write_text(script(self.config, self.training, str(copy), output, str(folder)), encoding="utf-8")
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, encoding="utf-8")
        if done.returncode:
            said = " ".join(done.stderr.replace("sbatch: error:", "").split())
            if re.search(r"[Uu]nable to contact|timed out", said):
                raise UnavailableError(f"Slurm's controller does not take the job now: {said}; try again later")
            raise UserError(f"Slurm refuses the job: {said}; correct launch.slurm, or see {path}")
        self.number = done.stdout.strip().partition(";")[0]
        self.output = folder / f"job-{self.number}.out"
        return f"Slurm job {self.number}"

    def lines(self) -> list[str]:
        """Return the whole lines that were added to the job's output."""
        if self._output is None:
            if not self.output.exists():
                return []
            self._output = self.output.open("rb")
        *lines, self._rest = (self._rest + self._output.read()).split(b"\n")
        result = []
        for line in (one.decode("utf-8", errors="replace") for one in lines):
            record = parse_record(line)
            if record is not None and record[0] == ENDED:
                self.code = int(record[1]["code"])
            elif line:
                result.append(line)
        return result

    def state(self) -> State:
        """Return where the job is: by its own last line, else by Slurm's controller, which is asked every 5 s."""
        if self.code is not None:
            return State("ended", f"ended with exit code {self.code}", succeeded=self.code == 0)
        now = time.monotonic()
        if self._over_since is not None:
            return self._state if now - self._over_since > OUTPUT_S else State("running")
        # At first a job passes its states quickly.
        if now - self._asked >= (ASK_S if self._output is not None else 1.0):
            self._asked = now
            self._state = self._look()
            if self._state.phase == "ended":
                self._over_since = now
                return State("running")
        return self._state

    def _look(self) -> State:
        command = ["scontrol", "show", "job", "--oneliner", self.number]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            if "Invalid job id" in done.stderr:
                return State("ended", "has ended, and Slurm does not know any more how")
            return self._state  # the controller is busy or away: the job goes on
        values = dict(re.findall(r"(\w+)=(\S*)", done.stdout))
        state = values["JobState"]
        if state in OVER:
            return State("ended", f"ended as {state}{REMEDY.get(state, '')}", succeeded=state == "COMPLETED")
        if state == "PENDING":
            return State("waiting", f"waits ({values.get('Reason', 'no reason given')})")
        nodes = values.get("NodeList", "(null)")
        return State("running", "" if nodes == "(null)" else f"runs on {nodes}")

    def stop(self) -> None:
        """Let torchrun end the ranks after a checkpoint; a job that has not printed anything has none to write."""
        started = self._output is not None and self._output.tell() > 0
        self._cancel([f"--signal={STOP_SIGNAL.name}"] if started else [])

    def kill(self) -> None:
        """Cancel the job."""
        self._cancel([])

    def _cancel(self, options: Sequence[str]) -> None:
        done = subprocess.run(["scancel", *options, self.number], capture_output=True, encoding="utf-8")
        self._asked = float("-inf")
        if done.returncode and not re.search(r"already completing|Invalid job id", done.stderr):
            raise UnavailableError(" ".join(done.stderr.split()))
