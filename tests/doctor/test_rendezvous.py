"""Time limits, the alarm, places, comparison and table: the parts that hold the checks together."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest

from broken_rank import command
from runs import environment
from w2r2_ds.doctor import place, run
from w2r2_ds.doctor import timeouts as limits_of_time
from w2r2_ds.doctor.clocks import Skew, judge
from w2r2_ds.doctor.compare import differences
from w2r2_ds.doctor.rendezvous import Coming, Meeting, Unreachable, missing_sentences
from w2r2_ds.doctor.report import merged, results, sentences, show
from w2r2_ds.doctor.result import CheckResult, Report
from w2r2_ds.doctor.timeouts import Alarm, TooLong, bounded


def test_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and exceptions come back; a call that waits hangs, one that computes is only slow."""
    monkeypatch.setattr(limits_of_time, "STILL", 0.5)
    assert bounded(lambda: 3, 5) == 3
    with pytest.raises(KeyError):
        bounded(lambda: {}["no"], 5)
    with pytest.raises(TooLong) as waits:
        bounded(lambda: time.sleep(60), 0.5, 60)
    assert not waits.value.works
    over = time.monotonic() + 2

    def compute() -> str:
        while time.monotonic() < over:
            pass
        return "done"

    assert bounded(compute, 0.1, 60) == "done", "it may take longer as long as it works"


def test_alarm() -> None:
    """The program ends, whatever it waits for, and says what that was."""
    code = (
        "import time\nfrom w2r2_ds.doctor.timeouts import Alarm\n"
        "alarm = Alarm(0.5, 'n7')\nalarm.now('reading a dead disk')\ntime.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("doctor: n7 was not done after 0 s, while reading a dead disk; ")


def test_a_call_that_holds_python_itself_is_ended() -> None:
    """No thread of Python, and so no alarm, gets its turn in a driver that keeps the lock."""
    code = (
        "import ctypes\nfrom w2r2_ds.doctor import timeouts\n"
        "timeouts.GRACE = 0.5\nalarm = timeouts.Alarm(0.5, 'n7')\n"
        "timeouts.bounded(lambda: ctypes.PyDLL(None).sleep(60), 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Timeout (0:00:0"), done.stderr


def test_alarm_renewed() -> None:
    """What is left counts from the renewal, or from the moment that it names; switched off, nothing rings."""
    alarm = Alarm(60, "n1")
    try:
        alarm.renew(100, time.monotonic() - 40)
        assert 59 < alarm.left() <= 60 and alarm.left(30) == 0
    finally:
        alarm.off()


def test_slow_imports_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as torch may take elsewhere, counted from the start; after this rank's own a little at least."""
    monkeypatch.setattr(limits_of_time, "STARTED", time.monotonic() - 10)
    assert run.TORCH_AT_WORK < run.patience() <= run.COMING - 10
    monkeypatch.setattr(limits_of_time, "STARTED", time.monotonic() - 1000)
    assert run.patience() == run.CAME


def test_taken_port_under_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch shell chooses the port there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = place.Place(world=2, address="127.0.0.1", port=taken.getsockname()[1])
        for job, what in (("", "start with another MASTER_PORT."), ("7", "submit the job again.")):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            with pytest.raises(Unreachable, match=what):
                Meeting(at, 5)


def test_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert place.find_place() == place.Place(host="n1") and place.allocated_hosts() == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK is not set"):
        place.find_place()
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("PATH", "")
    assert place.allocated_hosts() == ["n[1-2]"], "as it is, where scontrol is not"


def test_clock_is_judged_by_what_was_measured() -> None:
    """Two seconds are allowed; a slow round trip proves nothing beyond its half."""
    assert judge(Skew(1.9, 0.01), "n1").wrong == []
    assert judge(Skew(-2.5, 0.6), "n1").wrong == []
    assert judge(Skew(-2.5, 0.1), "n1").wrong[0].startswith("the clock is 2.5 s behind that of n1")


def test_missing() -> None:
    assert missing_sentences([], {0: "n1"}, ["n1"], 40) == []
    (sentence,) = missing_sentences([4, 5], {0: "n1", 6: "n4"}, ["n1", "n3", "n4"], 40)
    assert sentence.startswith("n3: ranks 4, 5 did not come within 40 s (there are n1, n4); ")
    assert missing_sentences([1], {0: "n1"}, [], 40)[0].startswith("rank 1 did not come")


def test_who_is_late_is_named_before_it_is_given_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two:
        place = place.Place(rank=0, world=2, host="n1")

        def gather(self, name: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
            return {0: {"host": "n1"}} if seconds <= 50 else {0: {"host": "n1"}, 1: {"host": "n2"}}

    monkeypatch.setattr("w2r2_ds.doctor.rendezvous.allocated_hosts", lambda: ["n1", "n2"])
    here, _ = Coming(cast(Meeting, Two()), 280.0).result()
    assert sorted(here) == [0, 1]
    said = capsys.readouterr().out
    assert said.startswith("doctor: still waiting: n2: rank 1 did not come within 50 s (there are n1); look whether")


def report(host: str, **outcomes: CheckResult) -> Report:
    return Report(0, 0, host, outcomes)


def test_differences() -> None:
    """Only what differs from the first node, with both values; a list that is too long is cut."""
    first = report("n1", versions=CheckResult(equal={"torch": "2", "peft": "1"}), data=CheckResult(equal={"set": "a"}))
    same = report("n2", versions=CheckResult(equal={"torch": "2", "peft": "1"}), data=CheckResult(equal={"set": "a"}))
    assert differences([]) == differences([first, same]) == []
    other = report("n3", versions=CheckResult(equal={"torch": "3", "wandb": "1"}), data=CheckResult(equal={}))
    assert differences([first, same, other]) == [
        ("n3", "torch is 3 here, but 2 on n1; make the nodes the same."),
        ("n3", "peft is missing here; n1 has it: install it."),
        ("n3", "wandb is installed here, not on n1."),
    ]
    many = [report(host, versions=CheckResult(equal={str(i): host for i in range(9)})) for host in ("n1", "n2")]
    assert len(differences(many)) == 5 and differences(many)[-1][1] == "5 more of versions differ from n1."


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of which the same is true share a line; paths are no markup; without rich the same is plain."""
    nodes = [
        report(host, disk=CheckResult(shown={"out": "/data/[red]x"}, wrong=["no room; make some."]))
        for host in ("n1", "n2")
    ]
    found = sentences(nodes)
    assert merged(found) == ["WRONG: n1, n2: no room; make some."]
    assert results(nodes) == [("disk", "WRONG on n1, n2")]
    show(nodes, found, "verdict")
    with_rich = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show(nodes, found, "verdict")
    plain = capsys.readouterr().out
    for text in ("/data/[red]x", "WRONG on n1, n2", "WRONG: n1, n2: no room; make some.", "verdict"):
        assert text in with_rich and text in plain


def test_a_driver_that_differs_is_a_warning() -> None:
    nodes = [report(host, smi=CheckResult(alike={"the GPU driver": host})) for host in ("n1", "n2")]
    assert differences(nodes) == []
    assert differences(nodes, doubtful=True) == [
        ("n2", "the GPU driver is n2 here, but n1 on n1; make the nodes the same.")
    ]


def test_nothing_of_a_file_moves_the_cursor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of nodes, rows and sentences come from files and the environment."""
    monkeypatch.setenv("SOME_TOKEN", "very-secret")
    shown = {"NCCL_\x1b[2J": "eth0\nvery-secret"}
    node = report("n\x1b1", use=CheckResult(shown=shown, wrong=["key \x1b]0;x\x07 is unknown"]))
    for _ in range(2):
        run.conclude([node], sentences([node]))
        output = capsys.readouterr().out
        assert "\x1b" not in output and "\x07" not in output and "very-secret" not in output
        assert r"WRONG: n\x1b1: key \x1b]0;x\x07 is unknown" in output
        monkeypatch.setitem(sys.modules, "rich.console", None)


def test_report_survives_json() -> None:
    first = report("n1", clock=CheckResult({"a": "b"}, {"c": "d"}, ["e"], ["f"]))
    assert Report.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_command_line(little_run: dict[str, str], tmp_path: Path) -> None:
    """The options are train.py's, to the last one; a refused one is a finding, no options mean no run."""
    from w2r2_ds.commands.doctor import read_arguments
    from w2r2_ds.commands.train import read_arguments as of_train

    arguments = [*command(little_run), "--train.steps", "7", "--local_rank=3"]
    asked = read_arguments(arguments)
    assert (asked.config, asked.ds_path) == of_train(arguments)
    assert asked.files == [little_run["deepspeed"]]
    assert read_arguments([]).config is None and read_arguments(["--local_rank=0"]).config is None
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {steps: 3}\n")
    assert read_arguments(["--config", str(recipe)]).files == [str(recipe)]
    assert "did you mean --train.steps" in read_arguments(["--train.step", "3"]).refused
    assert "train.steps is -1" in read_arguments(["--train.steps", "-1"]).refused


def test_torch_that_cannot_be_imported_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The rest is looked at all the same."""

    def broken(name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(run.importlib, "import_module", broken)
    assert run.examine(run.DoctorRequest(None, "", [])) == 1
    output = capsys.readouterr().out
    assert "torch cannot be imported (OSError: libcudart.so.12: cannot open shared object file)" in output
    assert "versions" in output and "TMPDIR" in output
