"""How a rank ends: what it says, when, and with which code."""

import pytest

from tests.forks import run_python

SCRIPT = """
import launch.rank as rank
rank.OTHERS_FIRST_SECONDS = 0.1
def main():
    raise {error}
rank.run_rank(main)
"""


@pytest.mark.parametrize(
    ("local_rank", "error", "code", "said"),
    [
        ("1", "ValueError('first\\nsecond')", 2, "error: first\nerror: second\n"),
        (
            "0",
            "RuntimeError('[gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:38558. This is typically')",
            1,
            "error: another rank ended or cannot be reached (Connection closed by peer [10.0.0.2]:38558): see its messages\n",
        ),
        (
            "1",
            "RuntimeError('[gloo/pair.cc:537] Read error [10.0.0.1]:5033: Connection reset by peer. This is')",
            1,
            "error: another rank ended or cannot be reached (Read error [10.0.0.1]:5033: Connection reset by peer): "
            "see its messages\n",
        ),
    ],
)
def test_errors_are_sentences_on_every_rank(local_rank, error, code, said):
    done = run_python(["-c", SCRIPT.format(error=error)], env={"LOCAL_RANK": local_rank})
    assert (done.returncode, done.stderr) == (code, said)
