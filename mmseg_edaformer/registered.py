"""Everything that OpenMMLab's registries know of this package: importing it registers all."""
from . import compat

compat.check_environment()

from . import data, engine, models  # noqa: E402, F401

compat.allow_mmengine_checkpoints()
