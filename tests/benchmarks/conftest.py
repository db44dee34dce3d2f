"""The small models with checkpoints that the analysis is tested on."""
from tests.analysis.conftest import edaformer, segformer  # noqa: F401
