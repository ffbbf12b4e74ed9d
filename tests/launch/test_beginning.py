"""When a process began is known far better than to the second."""

import subprocess
import time

import psutil
import pytest

from launch.beginning import begin, begins_of_launch


def test_the_begin_of_a_process():
    before = time.time()
    with subprocess.Popen(["sleep", "100"]) as process:
        after = time.time()
        try:
            assert before - 0.03 <= begin(psutil.Process(process.pid)) <= after + 0.03
        finally:
            process.kill()
    assert begins_of_launch()[-1] == pytest.approx(begin(psutil.Process()), abs=0.03)
