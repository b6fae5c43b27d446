"""What a lent GPU is asked for: in parts that end within the ten minutes of one loan, each test file in one of them."""

import pytest

from benchmarks import gpu_session


@pytest.mark.parametrize("part", gpu_session.PARTS)
def test_every_part_ends_in_time(part):
    assert 0 < sum(step.seconds for step in gpu_session.steps(part, "build/gpu")) <= 540


def test_commands_name_files_and_modules_that_exist():
    for part in gpu_session.PARTS:
        for step in gpu_session.steps(part, "build/gpu"):
            for word in step.command:
                path = word.removeprefix("--ignore=")
                if path.startswith("tests/"):
                    assert (gpu_session.ROOT / path).exists(), path
                if path.startswith("benchmarks."):
                    assert (gpu_session.ROOT / (path.replace(".", "/") + ".py")).exists(), path
