"""Put this package's checked classes under the names of mmengine, mmcv and mmseg.

Importing this module changes what the whole process gets under these names, so configs of any
origin train and test with these classes. Nothing else in this package replaces anything. The
package's configs and tools list this module in ``custom_imports``, and any other config can.
docs/runs.md says what each replacement changes.
"""
from mmengine.fileio import register_backend
from mmengine.registry import HOOKS, LOOPS, VISBACKENDS
from mmengine.runner import CheckpointLoader, runner
from mmseg.registry import MODELS, TRANSFORMS

from . import compat
from .data.transforms import REPLACES
from .engine.checkpoint_hook import (
    SafeCheckpointHook,
    SafeLocalBackend,
    SafeLocalVisBackend,
    find_checkpoint,
)
from .engine.checkpoint_loading import LOADERS
from .engine.loop import ExactTrainLoop
from .models.segmentor import StreamedTTAModel

for _registry, _name, _class in (
        (HOOKS, 'CheckpointHook', SafeCheckpointHook),
        (LOOPS, 'IterBasedTrainLoop', ExactTrainLoop),
        (VISBACKENDS, 'LocalVisBackend', SafeLocalVisBackend),
        (MODELS, 'SegTTAModel', StreamedTTAModel),
        *((TRANSFORMS, name, cls) for name, cls in REPLACES.items())):
    _registry.register_module(name=_name, module=_class, force=True)
register_backend('local', SafeLocalBackend, prefixes='', force=True)
for _schemes, _loader in LOADERS.items():
    CheckpointLoader.register_scheme(_schemes, _loader, force=True)
# mmengine follows last_checkpoint as a path from the current folder, and stops where that file
# does not load. Can go when mmengine looks for checkpoints itself.
runner.find_latest_checkpoint = find_checkpoint
compat.log_in_utf8()
