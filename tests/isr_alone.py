"""ISR where torch and timm are installed and nothing of OpenMMLab; run by ``make test-isr``."""
import importlib.util

import torch

from mmseg_edaformer import ISRRatio, apply_isr, isr, register_isr, remove_isr, report_isr

assert importlib.util.find_spec('mmengine') is None, 'this is for an environment without OpenMMLab'
assert str(ISRRatio.parse('2211-222')) == '2211-222'
assert callable(register_isr)

import timm  # noqa: E402

torch.manual_seed(0)
model = timm.create_model('swin_tiny_patch4_window7_224', img_size=224).eval()
image = torch.randn(1, 3, 224, 224)
with torch.no_grad():
    full = model(image)
    apply_isr(model, 2)
    reduced = model(image)
    with isr(model, 1):
        assert torch.equal(model(image), full)
    remove_isr(model)
    assert torch.equal(model(image), full)
assert not torch.equal(reduced, full)
report = str(report_isr(model, 2, (224, 224)))
assert 'GMACs' in report, report
print(report)

message = ''
try:
    from mmseg_edaformer import EFT  # noqa: F401
except ImportError as error:
    message = str(error)
assert 'mmengine is missing' in message, message
assert 'pip install' in message, message
