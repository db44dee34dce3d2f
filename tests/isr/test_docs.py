"""docs/isr.md as a newcomer would run it."""
import re

import pytest

from tests.conftest import ROOT, run

pytest.importorskip('timm', reason='timm is not installed')

BLOCKS = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'isr.md').read_text(), re.S)


def test_first_example():
    assert '49 -> 16' in run('-c', BLOCKS[0]).stdout


def test_an_attention_of_your_own(tmp_path):
    """From nothing to tested: the page's own blocks, and the table that it shows."""
    own = [block for block in BLOCKS if 'TinyAttention' in block or 'check_adapter' in block]
    assert len(own) == 3
    script = tmp_path / 'own.py'
    script.write_text('import sys\nsys.path.insert(0, sys.argv[1])\n' + ''.join(own))
    shown = re.search(r'```\n(ISR 2 on .*?)```', (ROOT / 'docs' / 'isr.md').read_text(), re.S)
    assert shown.group(1).strip() in run(script, ROOT).stdout


def test_an_attention_that_is_not_known_is_named(tmp_path):
    own = next(block for block in BLOCKS if 'class TinyAttention' in block)
    done = run('-c', own + '\napply_isr(Net(), 2)', check=False)
    assert done.returncode
    assert 'attn: TinyAttention is not known to ISR' in done.stderr
