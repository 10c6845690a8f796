"""Processes that answer: what they say, how they die, and that they never outlive us."""

from __future__ import annotations

import os

import pytest

from small_checkouts import serving, small_checkout
from tilewright.compiler.regress.timing.worker import Worker
from tilewright.errors import EngineError

ECHO = serving("return {'ready': True, 'pid': os.getpid()}, lambda q: {'echo': q['say']}")


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    made = []

    def start(text, *arguments):
        checkout = small_checkout(tmp_path / "a-1", measure=text)
        made.append(Worker(checkout, "measure", *arguments))
        return made[-1]

    yield start
    for one in made:
        one.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.quick
def test_questions_are_answered_in_order(worker):
    with worker(ECHO) as one:
        ready = one.start()
        assert ready["ready"] is True and one.ready == ready
        for text in ("a", "ünï\n\u2028 two lines", "x" * 100_000):
            assert one.ask({"say": text}) == {"echo": text}
        assert not gone(ready["pid"])
    assert gone(ready["pid"])
    one.close()  # twice is once


def test_what_others_print_is_no_answer(worker):
    text = "import os\nprint('hello'); os.write(1, b'{not json}\\n[1]\\n')\n" + serving(
        "print('setting up'); os.write(1, b'from C\\n')\n"
        "def answer(q):\n"
        "    print('{\"pairs\": 1}'); os.system('echo {}')\n"
        "    return {'echo': 2}\n"
        "return {'ready': 1}, answer"
    )
    one = worker(text)
    assert one.start() == {"ready": 1}
    assert one.ask({}) == one.ask({}) == {"echo": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module", r"No module named 'no_such_module' \(exit code 1\)"),
        ("import sys; sys.exit(3)", "found exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "found killed by signal 9"),
        (
            "import os, sys; print('out of memory', file=sys.stderr, flush=True)\n"
            "os.kill(os.getpid(), 9)",
            r"found out of memory \(killed by signal 9\)",
        ),
        ("import sys, os; sys.stdout.write('{\"a\": 1}'); sys.stdout.flush()", "exit code 0"),
        ("import os; os.write(2, b'\\xff\\xfe bad bytes\\n'); os._exit(4)", "bad bytes.*code 4"),
        (serving("raise ValueError('two\\nlines')"), "found ValueError: two lines"),
    ],
)
def test_a_process_that_dies_is_named_with_its_last_words(worker, text, said):
    with pytest.raises(EngineError, match=f"(?s)measure of .*a-1.*{said}") as caught:
        worker(text).start()
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("{'ok': 1 / 0}", "found ZeroDivisionError: division by zero"),
        ("{'error': 'too hot'}", "found too hot"),
        ("os._exit(5)", "found exit code 5"),
        ("os.write(3, b'x') and os._exit(6)", "found .*exit code 6"),
        ("{'not json': object()}", "found TypeError"),
    ],
)
def test_one_that_fails_at_a_question(worker, answer, said):
    one = worker(serving(f"return {{}}, lambda q: {answer}"))
    one.start()
    with pytest.raises(EngineError, match=said):
        one.ask({})


def test_a_line_that_death_cut_off_is_no_answer(worker):
    text = "import sys\nprint('{}', flush=True)\nsys.stdin.readline()\n"
    one = worker(text + "sys.stdout.write('{\"pairs\": [1, 2')")
    one.start()
    with pytest.raises(EngineError, match="found exit code 0"):
        one.ask({})


def test_questions_to_a_dead_process_and_closing_it_fail_in_our_words(worker):
    one = worker("print('{}', flush=True)\nraise SystemExit('done for today')")
    one.start()
    one.process.wait()
    with pytest.raises(EngineError, match=r"found done for today \(exit code 1\)"), one:
        one.ask({"say": "x" * 200_000})  # more than a pipe holds: it lies unwritten


def test_close_ends_whatever_it_does(worker):
    text = "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    one = worker(text + "print('{\"pid\": %d}' % os.getpid(), flush=True)\nwhile True: pass")
    pid = one.start()["pid"]
    one.close()
    assert gone(pid)
