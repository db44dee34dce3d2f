"""docs/isr.md as a newcomer would run it."""
import re
import sys
import types

import pytest

from mmseg_edaformer.errors import RatioError
from tests.conftest import ROOT

pytest.importorskip('timm', reason='timm is not installed')

PAGE = (ROOT / 'docs' / 'isr.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```python\n(.*?)```', PAGE, re.S)


def test_first_example(capsys):
    exec(BLOCKS[0], {})
    assert '49 -> 16' in capsys.readouterr().out


def test_auto_example(capsys):
    block, = (block for block in BLOCKS if "'auto'" in block)
    exec(block.replace("'configs/", f"'{ROOT}/configs/"), {})
    printed = re.findall(r'GMACs (\S+) -> (\S+)', capsys.readouterr().out)
    for row in 'none', 'optimal', 'auto':
        shown = re.findall(r'(\S+) \(', re.search(rf'\| `{row}` \| (\d.*\()', PAGE).group(1))
        assert shown == [pair[1] for pair in printed[['none', 'optimal', 'auto'].index(row)::3]]


def test_an_attention_of_your_own(capsys, monkeypatch):
    """From nothing to tested: the page's own blocks, and the table that it shows."""
    known, declared, checked = (
        block for block in BLOCKS if 'TinyAttention' in block or 'check_adapter' in block)
    module = types.ModuleType('own_attention')
    monkeypatch.setitem(sys.modules, 'own_attention', module)  # pickles look the classes up
    exec(known, vars(module))
    with pytest.raises(RatioError, match='attn: TinyAttention is not known to ISR'):
        module.apply_isr(module.Net(), 2)
    exec(declared + checked, vars(module))
    shown = re.search(r'```\n(ISR 2 on .*?)```', PAGE, re.S)
    assert shown.group(1).strip() in capsys.readouterr().out
