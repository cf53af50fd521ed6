"""Launching: nothing outlives its parent, and the error that is shown is the cause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import psutil
import pytest
from helpers import SNAPSHOT, planted_config, write_config, write_planted
from patience import wait_for

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch, train


def write_error(folder: Path, rank: int, message: str, when: float) -> None:
    path = folder / "run_x" / "attempt_0" / str(rank) / "error.json"
    path.parent.mkdir(parents=True)
    extra = {"py_callstack": f"Traceback of {message}", "timestamp": "1"}
    path.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    os.utime(path, (when, when))


def test_the_cause_is_the_earliest_error_whichever_rank_has_it(tmp_path: Path) -> None:
    assert launch.first_failure(str(tmp_path)) is None
    write_error(tmp_path, 0, "RuntimeError: Connection closed by peer", 100.5)
    write_error(tmp_path, 1, "ValueError: the cause", 100.2)
    found = launch.first_failure(str(tmp_path))
    assert found is not None and (found.rank, found.kind, found.message) == (1, "ValueError", "the cause")
    assert found.traceback == "Traceback of ValueError: the cause"


def test_an_error_file_that_is_half_written_is_passed_over(tmp_path: Path) -> None:
    write_error(tmp_path, 0, "ValueError: the cause", 100.5)
    torn = tmp_path / "run_x" / "attempt_0" / "1" / "error.json"
    torn.parent.mkdir()
    torn.write_text('{"message": {"mess')
    found = launch.first_failure(str(tmp_path))
    assert found is not None and found.rank == 0


def test_the_command_names_the_store_every_override_and_one_node(tmp_path: Path) -> None:
    config = planted_config()
    command = launch.torchrun_command(
        config, "c.yaml", Store(str(tmp_path)), SNAPSHOT, "/logs", ["training.num_epochs=3", "train_data.limit=5"]
    )
    text = " ".join(command)
    assert (
        "--standalone --local-addr=127.0.0.1 --nproc-per-node=2 --max-restarts=0 --tee=3 --log-dir=/logs "
        "-m twhin_pipeline.training.train" in text
    )
    assert text.endswith(
        f"--config c.yaml --snapshot {SNAPSHOT} --home {tmp_path} --set training.num_epochs=3 --set train_data.limit=5"
    )


def test_several_nodes_meet_at_the_endpoint_of_the_first(tmp_path: Path) -> None:
    nodes = {"nproc_per_node": 8, "nnodes": 3, "node_rank": 2, "rdzv_endpoint": "first:29400"}
    command = launch.torchrun_command(planted_config(launch=nodes), "c.yaml", Store(str(tmp_path)), SNAPSHOT, "/logs")
    assert {"--nnodes=3", "--node-rank=2", "--rdzv-endpoint=first:29400", "--nproc-per-node=8"} <= set(command)
    assert "--standalone" not in command


def test_the_environment_has_threads_and_the_configured_variables() -> None:
    config = planted_config(launch={"threads_per_process": 3, "env": {"NCCL_DEBUG": "INFO"}})
    found = launch.environment(config)
    assert found["OMP_NUM_THREADS"] == "3" and found["NCCL_DEBUG"] == "INFO"


def test_ranks_do_not_repeat_what_the_configuration_warns_of(tmp_path: Path) -> None:
    config = planted_config()
    path = write_config(config, tmp_path)
    code = f"from twhin_pipeline.config import load_config; load_config({path!r}, ['launch.duckdb_threads=2'])"
    told = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stderr
        for env in (os.environ, {**os.environ, **launch.environment(config)})
    ]
    assert "is now named launch.data_threads" in told[0] and told[1] == ""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of the GNU C library")
def test_ranks_of_one_node_meet_without_a_network_and_those_of_several_do_not_ask_for_the_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert launch.environment(planted_config())["GLOO_SOCKET_IFNAME"].startswith("lo")
    nodes = {"nnodes": 2, "node_rank": 1, "rdzv_endpoint": "first:29500"}
    assert "GLOO_SOCKET_IFNAME" not in launch.environment(planted_config(launch=nodes))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert "GLOO_SOCKET_IFNAME" not in launch.environment(planted_config()), "what is set outside stays"


def test_a_loopback_that_is_down_is_told_before_torchrun_waits_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.check_meeting(planted_config())

    def unreachable(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", unreachable)
    with pytest.raises(UserError, match=r"127.0.0.1, which cannot be reached .*ip link set lo up"):
        launch.check_meeting(planted_config())
    nodes = {"nnodes": 2, "node_rank": 0, "rdzv_endpoint": "first:29500"}
    launch.check_meeting(planted_config(launch=nodes))


def test_what_a_step_frees_is_not_given_back_to_the_system() -> None:
    code = (
        "import resource, torch\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "step = lambda: [torch.ones(10_000_000) for _ in range(3)]\n"
        "for _ in range(5): step()\n"  # until the freed pieces fit
        "before = faults()\n"
        "for _ in range(10): step()\n"
        "print(faults() - before)"
    )
    # Without huge pages, so that each page that is taken anew is counted.
    env = {**os.environ, **launch.environment(planted_config()), "THP_MEM_ALLOC_ENABLE": "0"}
    plain = {name: value for name, value in env.items() if not name.startswith("MALLOC_")}
    faults = [
        int(subprocess.run([sys.executable, "-c", code], env=each, capture_output=True, text=True, check=True).stdout)
        for each in (env, plain)
    ]
    # Where the pieces lie, and so whether a last one must be taken, differs between machines.
    assert 4 * faults[0] < faults[1]


def test_the_wrapper_ends_its_command_when_the_parent_is_killed(tmp_path: Path) -> None:
    sleeper = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    script = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'twhin_pipeline.training.with_parent', "
        f"sys.executable, '-c', {sleeper!r}])"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    pid = int(_wait_for(lambda: (tmp_path / "pid").read_text() if (tmp_path / "pid").exists() else ""))
    parent.kill()
    parent.wait()
    _wait_for(lambda: not _alive(pid))


def test_killing_the_parent_ends_torchrun_and_every_rank_and_a_retry_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = planted_config(training={"num_epochs": 300, "num_eval_steps": 0})
    store = Store(str(tmp_path / "home"))
    write_planted(store, config)
    path = write_config(config, tmp_path)
    script = (
        "from twhin_pipeline.training import launch; from twhin_pipeline.config import load_config\n"
        "from twhin_pipeline.store import Store\n"
        f"launch.run(load_config({path!r}), {path!r}, [], Store({store.root!r}), {SNAPSHOT!r})"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert any("step 20 of" in line for line in parent.stdout)
        family = [p.pid for p in psutil.Process(parent.pid).children(recursive=True)]
        assert len(family) == 3  # torchrun and two ranks
        parent.kill()
        _wait_for(lambda: not any(_alive(pid) for pid in family), seconds=10)
    # The same training in this process: told to stop at once, and early enough only if it goes on from a checkpoint.
    stop = threading.Event()
    stop.set()
    with pytest.raises(launch.TrainingCancelled):
        train.run(config, store, SNAPSHOT, stop=stop)
    lines = capsys.readouterr().out.splitlines()
    resumed = next(line for line in lines if line.startswith("resumed from step"))
    assert int(resumed.split()[3].replace(",", "")) >= 14


def test_the_failing_ranks_own_traceback_is_shown(tmp_path: Path) -> None:
    # Python imports a module of this name at its start, in every process.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from twhin_pipeline.training import dataset\n"
        "    def planted_failure(*args): raise ZeroDivisionError('only on rank 1')\n"
        "    dataset.EdgesDataset._batch = planted_failure\n"
    )
    config = planted_config(launch={"env": {"PYTHONPATH": python_path(tmp_path)}})
    store = Store(str(tmp_path / "home"))
    write_planted(store, config)
    with pytest.raises(launch.TrainingFailed) as error:
        launch.run(config, write_config(config, tmp_path), [], store, SNAPSHOT, output=lambda line: None)
    assert "rank 1 failed" in str(error.value)
    assert "planted_failure" in str(error.value) and "ZeroDivisionError: only on rank 1" in str(error.value)
    assert not store.exists("twhin_model", SNAPSHOT)


def python_path(folder: Path) -> str:
    """Return a PYTHONPATH with a folder in front."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def launch_with(tmp_path: Path, **launch_fields: object) -> str:
    """Train with two ranks, which fails, and return what the command would show."""
    config = planted_config(launch=launch_fields)
    store = Store(str(tmp_path / "home"))
    write_planted(store, config)
    with pytest.raises(launch.TrainingFailed) as error:
        launch.run(config, write_config(config, tmp_path), [], store, SNAPSHOT, output=lambda line: None)
    return str(error.value)


def test_a_library_that_does_not_load_in_a_rank_is_the_last_line(tmp_path: Path) -> None:
    (tmp_path / "torchrec.py").write_text("raise ImportError('libfbgemm.so: undefined symbol: _ZN3foo')")
    lines = launch_with(tmp_path, env={"PYTHONPATH": python_path(tmp_path)}).splitlines()
    assert lines[0] in ("rank 0 failed:", "rank 1 failed:")
    assert lines[-1] == "ImportError: libfbgemm.so: undefined symbol: _ZN3foo"
    assert any("torchrec.py" in line for line in lines)


def test_a_library_that_does_not_load_in_torchrun_is_the_last_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    lines = launch_with(tmp_path, env={"PYTHONPATH": python_path(tmp_path)}).splitlines()
    assert "before any rank failed" in lines[0]
    assert lines[-1] == "OSError: libtorch_cpu.so: cannot open shared object file"


@pytest.mark.parametrize(
    ("death", "last"),
    [
        ("os.kill(os.getpid(), 9)", "rank 1 was ended by SIGKILL, which the kernel sends when memory runs out"),
        ("(print('native: bad symbol', file=sys.stderr, flush=True), os.abort())", "native: bad symbol"),
        ("(print('gone', file=sys.stderr, flush=True), os._exit(3))", "gone"),
    ],
)
def test_a_rank_that_dies_without_an_error_of_its_own_is_named(tmp_path: Path, death: str, last: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\nif os.environ.get('RANK') == '1': {death}\n")
    lines = launch_with(tmp_path, env={"PYTHONPATH": python_path(tmp_path)}).splitlines()
    assert lines[0] == "rank 1 failed:" and lines[1].startswith("rank 1 ")
    assert lines[-1] == last


def test_a_users_mistake_in_a_rank_comes_back_as_one_message(tmp_path: Path) -> None:
    config = planted_config()
    store = Store(str(tmp_path / "home"))
    write_planted(store, config)
    changed = planted_config(train_data={"global_negatives": 9}, launch={"nproc_per_node": 1})
    lines: list[str] = []
    with pytest.raises(UserError, match=r"global_negatives.*twhin sample") as error:
        launch.run(changed, write_config(changed, tmp_path), [], store, SNAPSHOT, output=lines.append)
    assert "\n" not in str(error.value)
    assert not any("Traceback" in line for line in lines)


def test_training_alone_exits_with_2_and_one_line_on_a_mistake(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_config(planted_config(), tmp_path)
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        train.main(["--config", path, "--snapshot", SNAPSHOT, "--home", str(tmp_path / "home")])
    assert ended.value.code == 2
    told = capfd.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("UserError: ") and "twhin " in told[0]


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_for(condition: object, seconds: float = 20) -> str:
    return str(wait_for(condition, seconds, "it happened"))


def test_a_signal_that_ends_torchrun_before_a_rank_says_why_is_a_stop_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backfill that someone interrupted was noted as failed, and the next try waited for a quarter of an hour."""
    source = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    monkeypatch.setattr(launch, "torchrun_command", lambda *given: [sys.executable, "-c", source])
    store = Store(str(tmp_path / "home"))
    with pytest.raises(launch.TrainingCancelled, match="stopped by a signal"):
        launch.run(planted_config(), "unused", [], store, SNAPSHOT, log_dir=str(tmp_path / "logs"))


def test_what_starts_torchrun_loads_the_standard_library_alone() -> None:
    """It loaded configuration, store and pandas first, half a second of each training."""
    told = "import sys, twhin_pipeline.training.with_parent; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "twhin_pipeline" in loaded and not loaded & {"numpy", "pyarrow", "pandas", "pydantic", "torch", "duckdb"}
