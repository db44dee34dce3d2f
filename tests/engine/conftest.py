"""A run that nothing interrupted, which others are compared with."""
import pytest

from tests.engine.training import run_to_end, write_random_config


@pytest.fixture(scope='session')
def config(scenes, tmp_path_factory):
    """The small config with all that draws random numbers."""
    return write_random_config(tmp_path_factory.mktemp('random'), scenes)


@pytest.fixture(scope='session')
def whole(config, tmp_path_factory):
    """The work dir of a run of 12 iterations; read-only."""
    work = tmp_path_factory.mktemp('whole') / 'work'
    run_to_end(config, work)
    return work
