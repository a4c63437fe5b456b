"""The run folder that all tests of the report read."""

import pytest
from reporting.synthetic_run import write_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "a <run> & more", ("texture", "camera"), layers=2, scenes=3)
