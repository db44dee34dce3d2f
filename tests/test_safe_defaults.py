"""Importing the package replaces nothing; a line in a config puts the checked classes in place."""
from tests.conftest import run

SCRIPT = '''
import mmseg_edaformer
from mmengine.config import Config
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.registry import HOOKS, LOOPS, VISBACKENDS
from mmengine.runner import CheckpointLoader, Runner, runner
from mmseg.registry import MODELS, TRANSFORMS
from mmseg_edaformer import data, engine, models
from mmseg_edaformer.predict import segmenter

def modules():
    """Where what stands under each replaced name comes from."""
    classes = [
        HOOKS.get('CheckpointHook'), LOOPS.get('IterBasedTrainLoop'),
        VISBACKENDS.get('LocalVisBackend'), MODELS.get('SegTTAModel'),
        *map(TRANSFORMS.get, ('LoadImageFromFile', 'LoadAnnotations', 'Resize', 'RandomCrop')),
        type(get_file_backend('/x')), *CheckpointLoader._schemes.values(),
        runner.find_latest_checkpoint, Runner.build_logger]
    return {cls.__module__.split('.')[0] for cls in classes}

print('imported:', *sorted(modules()))
Config.fromfile('PATH')
print('with the line:', *sorted(modules()))
for registry, names in (
        (HOOKS, ['SafeCheckpointHook']), (LOOPS, ['ExactTrainLoop']),
        (VISBACKENDS, ['SafeLocalVisBackend']), (MODELS, ['StreamedTTAModel']),
        (TRANSFORMS, ['LoadSegImage', 'LoadSegLabels', 'SegResize', 'RandomSegCrop'])):
    for name in names:
        assert registry.get(name).__name__ == name
'''


def test_nothing_is_replaced_until_a_config_says_so(tmp_path):
    config = tmp_path / 'foreign.py'
    config.write_text("custom_imports = dict(imports=['mmseg_edaformer.safe_defaults'])\n")
    done = run('-c', SCRIPT.replace('PATH', str(config)))
    assert 'imported: mmcv mmengine mmseg\n' in done.stdout
    assert 'with the line: mmseg_edaformer\n' in done.stdout
