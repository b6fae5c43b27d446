"""What is shown while a run goes on, and the flag that signals set."""

import io
import os
import signal

import pytest
from rich.console import Console

from effkern.train.progress import BarReporter, LineReporter, SilentReporter, reporter_for
from effkern.train.signals import StopRequest


def test_lines_come_at_intervals_and_at_the_end(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("effkern.train.progress.time.monotonic", lambda: clock[0])
    report = LineReporter("salt", 100, 20, interval=10.0)
    for step in range(21, 101):
        clock[0] += 1.0
        report.update(step, f"loss {step / 10}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "salt 30/100 loss 3.0 ETA 70s"
    assert len(lines) == 8
    assert lines[-1] == "salt 100/100 loss 10.0 ETA 0s"


def test_bar_shows_step_and_text():
    stream = io.StringIO()
    report = BarReporter("salt", 100, 20, Console(file=stream, force_terminal=True, width=120))
    report.update(60, "loss 4.5 2,000 tok/s")
    report.note("step 60: [stage 2]")
    report.close()
    shown = stream.getvalue()
    assert "60/100" in shown
    assert "loss 4.5 2,000 tok/s" in shown
    # Not read as markup.
    assert "step 60: [stage 2]" in shown


def test_the_reporter_follows_the_output(capsys):
    assert isinstance(reporter_for("t", 1, 0), LineReporter)
    assert isinstance(reporter_for("t", 1, 0, quiet=True), SilentReporter)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_second_acts(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), number)
        assert stop.signum == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
