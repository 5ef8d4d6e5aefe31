"""Progress: a bar on a terminal, plain lines elsewhere, nothing where it is not wanted."""

import io

import pytest

from nestlearn.training.progress import TrainingProgress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, **kwargs):
    with TrainingProgress(total=100, stream=stream, **kwargs) as progress:
        for step in (1, 2, 100):
            progress.update(step, loss=5.4321, tokens_per_second=12345.6)
        progress.note("held-out [loss] 3")
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    said = run(io.StringIO(), lines_every=0.0).splitlines()
    assert said[0].startswith("step 1/100  loss 5.4321  12,346 tokens/s  ")
    assert said[2] == "step 100/100  loss 5.4321  12,346 tokens/s  0:00 left"
    assert said[3] == "held-out [loss] 3"
    assert "\x1b" not in "".join(said)


def test_lines_are_rare_but_the_last_step_is_always_told():
    said = run(io.StringIO(), lines_every=1000.0).splitlines()
    assert [line.split()[1] for line in said[:2]] == ["1/100", "100/100"]


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    said = run(Terminal())
    assert "100/100" in said
    assert "tokens/s" in said
    assert "held-out [loss] 3" in said


def test_silence():
    assert run(io.StringIO(), silent=True) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03"), (float("inf"), "?")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_time_left_counts_from_where_this_process_began():
    progress = TrainingProgress(total=100, done=50, stream=io.StringIO())
    assert progress.seconds_left() == float("inf")
    progress._begin -= 10
    progress.update(60, loss=1.0, tokens_per_second=1.0)
    assert progress.seconds_left() == pytest.approx(40, rel=0.05)
