"""What the tests of ISR share."""
import pytest

from mmseg_edaformer.isr.registry import _registered


@pytest.fixture(autouse=True)
def _registry():
    """What a test registers is forgotten after it."""
    before = dict(_registered)
    yield
    _registered.clear()
    _registered.update(before)
