"""A copy of the drawn scenes, to spoil."""
import shutil

import pytest
from mmengine.config import Config

from tests.conftest import write_config


@pytest.fixture
def data(scenes, tmp_path):
    return shutil.copytree(scenes, tmp_path / 'data')


@pytest.fixture
def cfg(data, tmp_path):
    return Config.fromfile(write_config(tmp_path, data))
