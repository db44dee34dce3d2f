"""The command that writes docs/rivals.md."""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from PIL import Image

from benchmarks import rivals
from benchmarks.ways import read, todo
from mmseg_edaformer.analysis.bench import open_bench
from mmseg_edaformer.analysis.sweep import Row, change_interval
from mmseg_edaformer.cost import count_macs
from mmseg_edaformer.engine.run_config import load_config
from mmseg_edaformer.errors import RatioError
from tests.conftest import ROOT


def test_document(edaformer, segformer, tmp_path):
    path = tmp_path / 'rivals.md'
    rivals.main([*edaformer, *segformer, '--samples', '2', '--input-scale', '2', '--ways', '2+q2',
                 'scale 0.5', 'todo 2', '--out', str(path)])
    text = path.read_text()
    assert re.findall(r'^### (.*)', text, re.M) == [
        'mini, images enlarged 2 times', 'segformer, images enlarged 2 times']
    tables = re.findall(r'\| isr_ratio .*?\n\n', text, re.S)
    for (config, _), table in zip((edaformer, segformer), tables):
        rows = {line.split('|')[1].strip(): line for line in table.strip().split('\n')[2:]}
        assert sorted(rows) == ['2+q2', 'none', 'scale 0.5', 'todo 2']
        macs = count_macs(MODELS.build(Config.fromfile(config).model), (128, 192))
        assert f'| {macs / 1e9:.3f} |' in rows['none']
    assert len(re.findall(r'\| `todo 2` \| [+-]', text)) == 2
    assert re.search(r'; 2 images of \d+; GMACs for 64x96 pixels, enlarged 2 times\.\n', text)
    assert "--samples 2 --input-scale 2 --ways 2+q2 'scale 0.5' 'todo 2'" in text
    with Image.open(tmp_path / 'rivals.png') as plot:
        assert plot.height > 2 * 600


def row(name, miou, ms):
    return Row(name, 12, miou, miou - 50, -1., 1., 5., ms, 1.)


def test_duel_is_with_the_best_ratio_that_costs_no_more():
    rng = np.random.default_rng(0)
    union = np.full((12, 3), 1000)
    areas = {name: np.stack([union * share + rng.integers(0, 9, (12, 3)), union], 1)
             for name, share in (('none', 0.5), ('2', 0.4), ('todo 2', 0.45), ('scale 0.9', 0.3))}
    bench = SimpleNamespace(areas=areas.get, metric=dict(nan_to_num=None))
    rows = [row('none', 50, 9.), row('2', 40, 5.), row('todo 2', 45, 6.), row('scale 0.9', 30, 5.)]
    low, high = change_interval(areas['todo 2'], areas['2'])
    assert rivals.duel(bench, areas, rows, rows[2], 'ms') == (
        f'+5.00 against `2` ({low:+.2f} to {high:+.2f}): **wins**')
    assert rivals.duel(bench, areas, rows, rows[3], 'ms').endswith('): loses')
    assert '`none`' in rivals.duel(bench, areas, rows, rows[2], 'gmacs')
    assert 'which costs more, as all ratios do' in rivals.duel(
        bench, areas, rows, row('todo 2', 45, 1.), 'ms')


def test_bad_ways_are_one_error(edaformer):
    bench = open_bench(load_config(edaformer[0]), edaformer[1], samples=1)
    for name, message in {
            'fewer 2': r'fewer 2: neither a ratio \(.*\) nor one of tome \.\.\., todo',
            '22-22': '22-22: neither a ratio .*stages',
            'tome 0.7': r'tome 0\.7: it merges at most half of the tokens: give .* 0 to 0\.5',
            'tome': 'tome: give tome and a number of type float',
            'todo 0': 'todo 0: give 1 or more', 'todo 1.5': 'todo 1.5: give .* of type int',
            '2x2 k': '2x2 k: give q for queries, or q', 'scale 0': 'scale 0: give a scale above 0',
            'max 0': 'max 0: isr_ratio 0 is not an integer from 1'}.items():
        with pytest.raises(RatioError, match=message):
            read(bench, name)


def test_attention_with_a_bias_is_one_error():
    model = MODELS.build(dict(type='SwinTransformer', embed_dims=24, depths=[1], num_heads=[1],
                              strides=[4], out_indices=[0]))
    with pytest.raises(RatioError, match='without a mask or a bias'), todo(2).applied(model):
        model(torch.randn(1, 3, 56, 56))


def test_configs_and_checkpoints_come_in_pairs(capsys):
    with pytest.raises(SystemExit):
        rivals.parse_args(['a.py', 'a.pth', 'b.py'])
    assert 'give a checkpoint for each config' in capsys.readouterr().err


def test_the_page_names_what_its_command_measures():
    """docs/rivals.md was written by this command, with all ways."""
    text = (ROOT / 'docs' / 'rivals.md').read_text(encoding='utf-8')
    assert set(re.findall(r'^\| (\S.*?) +\| +\d', text, re.M)) >= {'none', *rivals.WAYS}
