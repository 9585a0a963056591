"""Runs as processes: side by side, pinned, failing, interrupted, not repeated. Tiny programs stand for `agcl fit`."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from agcl.compare import Comparison, Method
from agcl.compare.plan import Plan
from agcl.compare.processes import run_in_processes
from agcl.compare.runs import Run, digest

SCORES = {"tasks": ["a"], "scores": [[0.0], [0.5]], "metrics": {"average_performance": 0.5}}


class ProgramRun(Run):
    """A run whose command is a program in Python; it works in the run's folder."""

    def command(self):
        prelude = f"import os, sys, json, time; os.chdir({str(self.folder)!r}); "
        return [sys.executable, "-c", prelude + self.values["program"]]


WRITE = f"open('scores.json', 'w').write(json.dumps({json.dumps(SCORES).replace('null', 'None')}))"


@pytest.fixture
def make(tmp_path):
    def make_run(name, program):
        (tmp_path / "base.yaml").write_text("{a: 1}")
        return ProgramRun(
            method=name,
            values={"program": program},
            seed=0,
            order=None,
            configs=(str(tmp_path / "base.yaml"),),
            config={},
            folder=tmp_path / "out" / name,
            contents=digest([{"a": 1}]),
        )

    return make_run


def comparison(tmp_path, **options):
    return Comparison(base=[], methods={"x": Method()}, seeds=[0], output=str(tmp_path / "out"), **options)


def outcomes(runs, settings):
    events = []
    run_in_processes(runs, settings, lambda run, command, error: events.append((run.method, bool(command), error)))
    return events


def test_failures_are_reported_by_their_last_error_and_the_others_go_on(make, tmp_path):
    runs = [
        make("raises", "print('first'); raise RuntimeError('out of luck')"),
        make("user", "sys.exit('agcl: error: The file x does not exist.')"),
        make("parser", "sys.exit('usage: agcl\\nerror: Parser key \"a\":\\n  Expected an int.')"),
        make("killed", "os.kill(os.getpid(), 9)"),
        make("silent", "pass"),
        make("half", "open('scores.json', 'w').write(json.dumps({'scores': [[0.0], [None]]}))"),
        make("good", WRITE),
    ]
    errors = {name: error for name, started, error in outcomes(runs, comparison(tmp_path)) if not started}
    assert errors == {
        "raises": "RuntimeError: out of luck",
        "user": "agcl: error: The file x does not exist.",
        "parser": 'error: Parser key "a": Expected an int.',
        "killed": "ended by signal 9",
        "silent": "no scores after the last task",
        "half": "no scores after the last task",
        "good": None,
    }
    assert [run.state()["state"] for run in runs] == ["failed"] * 6 + ["finished"]
    assert [run.results() for run in runs] == [None] * 6 + [SCORES]
    assert "first" in runs[0].log.read_text()


def test_several_at_once_each_on_devices_of_its_own(make, tmp_path):
    # Each waits until it sees the other, which runs one after the other would never do.
    wait = (
        "open('../here' + os.environ['CUDA_VISIBLE_DEVICES'], 'w').write(os.environ['OMP_NUM_THREADS']);\n"
        "end = time.time() + 20\n"
        "while not all(os.path.exists(f'../here{d}') for d in ('0', '2,3')):\n"
        "    time.sleep(0.02); assert time.time() < end\n" + WRITE
    )
    runs = [make(f"run{i}", wait) for i in range(2)]
    settings = comparison(tmp_path, devices=[0, "2,3"], threads=3)
    assert [error for _, started, error in outcomes(runs, settings) if not started] == [None, None]
    assert [(tmp_path / "out" / f"here{d}").read_text() for d in ("0", "2,3")] == ["3", "3"]


def test_no_more_at_a_time_than_asked_for(make, tmp_path):
    alone = (
        "assert not os.path.exists('../busy'); open('../busy', 'w'); time.sleep(0.1); os.remove('../busy')\n" + WRITE
    )
    events = outcomes([make(f"run{i}", alone) for i in range(3)], comparison(tmp_path))
    assert [(name, started) for name, started, _ in events] == [
        (f"run{i}", started) for i in range(3) for started in (True, False)
    ]
    assert [error for _, _, error in events] == [None] * 6


def test_ray_gives_the_same_outcomes(make, tmp_path):
    pytest.importorskip("ray")
    from agcl.compare.ray_tasks import run_on_ray

    pinned = "assert os.environ['OMP_NUM_THREADS'] == '1';" + WRITE
    runs, errors = [make("good", pinned), make("bad", "raise RuntimeError('no luck')"), make("lost", "pass")], {}
    run_on_ray(runs, comparison(tmp_path, threads=1), lambda run, _, error: errors.update({run.method: error}))
    assert errors == {"good": None, "bad": "RuntimeError: no luck", "lost": "no scores after the last task"}
    assert runs[0].results() == SCORES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_no_process_and_no_finished_run(make, tmp_path, number):
    child = "import subprocess; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);\n"
    run = make("long", child + "open('pids', 'w').write(f'{os.getpid()} {p.pid}'); time.sleep(60)")
    pids = run.folder / "pids"

    def interrupt():
        end = time.monotonic() + 20
        while not (pids.exists() and len(pids.read_text().split()) == 2) and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    former = signal.getsignal(signal.SIGTERM)
    former_sigint = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            outcomes([run], comparison(tmp_path))
    finally:
        signal.signal(signal.SIGINT, former_sigint)
    assert signal.getsignal(signal.SIGTERM) is former
    assert run.state()["state"] == "started"
    for pid in pids.read_text().split():
        status = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()
        assert status == "" or status.startswith("Z")


@pytest.mark.parametrize("is_split", [False, True])
def test_interrupted_run_goes_on_and_a_failed_one_starts_afresh(make, is_split):
    run = make("run", "pass")
    assert "--resume" not in run.prepare()
    assert "--resume" not in run.prepare()  # it had left nothing
    checkpoint = run.folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.mkdir() if is_split else checkpoint.write_text("weights")
    assert run.prepare()[-2:] == ["--resume", "auto"]
    run.log.write_text("ValueError: no")
    run.conclude(1, keep_models=False)
    assert checkpoint.exists()  # for a look at what went wrong
    assert "--resume" not in run.prepare()
    assert not checkpoint.exists()


@pytest.mark.parametrize("keep", [False, True])
def test_large_files_of_a_finished_run_are_kept_on_request(make, keep):
    run = make("run", "pass")
    run.prepare()
    (run.folder / "model").mkdir()
    (run.folder / "scores.json").write_text(json.dumps(SCORES))
    assert run.conclude(0, keep_models=keep) is None
    assert (run.folder / "model").exists() == keep
    assert run.results() == SCORES


def test_configuration_that_changed_after_planning_is_not_run(make, tmp_path):
    runs = [make("first", WRITE), make("second", WRITE)]
    (tmp_path / "base.yaml").write_text("{a: 2}")
    events = outcomes(runs, comparison(tmp_path))
    assert [name for name, _, _ in events] == ["first", "second"]
    assert all("changed since the comparison began" in error for _, _, error in events)
    assert not (tmp_path / "out").exists()


def planned(tmp_path, base, **options):
    (tmp_path / "base.yaml").write_text(base)
    defaults = {"methods": {"m": Method(grid={"model.lr": [1.0, 2.0]})}, "seeds": [0], "output": str(tmp_path / "out")}
    return Plan(Comparison(**{"base": [str(tmp_path / "base.yaml")], **defaults, **options}))


def folders(plan):
    return [run.folder for run in plan.trial_runs("m")]


def test_folder_depends_on_what_determines_the_run_and_on_nothing_else(tmp_path):
    first = folders(planned(tmp_path, "{trainer: {max_steps: 1}}"))
    assert folders(planned(tmp_path, "# a comment\ntrainer:\n  max_steps: 1\n", threads=4, parallel=2)) == first
    others = [
        planned(tmp_path, "{trainer: {max_steps: 2}}"),
        planned(tmp_path, "{trainer: {max_steps: 1}}", settings={"data.batch_size": 2}),
        planned(tmp_path, "{trainer: {max_steps: 1}}", trial_settings={"data.evaluate_on": "validation"}),
        planned(tmp_path, "{trainer: {max_steps: 1}}", tuning_seed=1),
    ]
    assert len({folder for plan in others for folder in folders(plan)} | set(first)) == 10


def test_trials_are_among_the_final_runs_only_if_nothing_sets_them_apart(tmp_path):
    for settings, shared in (({}, True), ({"data.evaluate_on": "validation"}, False)):
        plan = planned(tmp_path, "{}", seeds=[1, 0], trial_settings=settings)
        final = [run.folder for run in plan.final_runs("m", {"model.lr": 2.0})]
        assert (folders(plan)[1] in final) == shared
        assert folders(plan)[0] not in final


def test_each_order_gets_each_seed(tmp_path):
    plan = planned(tmp_path, "{}", seeds=[1, 0], orders={"up": ["a", "b"], "down": ["b", "a"]})
    runs = plan.final_runs("m", {"model.lr": 2.0})
    assert [(run.order, run.seed, run.config["data"]) for run in runs] == [
        (order, seed, {"seed": seed, "order": names})
        for order, names in (("up", ["a", "b"]), ("down", ["b", "a"]))
        for seed in (1, 0)
    ]
    assert len({run.folder for run in runs}) == 4
    assert {run.order for run in plan.trial_runs("m")} == {"up"}
