"""Arguments that several tools share. It imports nothing heavy, so that ``--help`` is instant."""
import argparse
import difflib
import glob
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError, DataError

_HERE = Path(__file__).resolve().parent


def image_size(text: str) -> tuple[int, int]:
    """Parse ``H,W`` in pixels, or one number for a square; a ``type`` for argparse."""
    sides = text.split(',')
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"'{text}' is no image size: give height and width, such "
                                         'as 512,1024')
    return int(sides[0]), int(sides[-1])


def add_isr_ratio(parser: argparse.ArgumentParser, *, several: bool = False,
                  default: str | None = 'none', note: str = '') -> None:
    """Add ``--isr-ratio`` and ``--query-ratio``; with ``several`` the first takes a list."""
    parser.add_argument('--isr-ratio', metavar='RATIO', nargs='+' if several else None,
                        default=[default] if several and default else default,
                        help='reduce keys further: none, optimal, auto, one integer for all stages '
                        '(2), or multipliers per stage, encoder-decoder, both shallow to deep '
                        f'(2211-222){"; several at once" if several else ""}{note}')
    parser.add_argument('--query-ratio', metavar='RATIO', help='average queries over cells of '
                        'this side, written like --isr-ratio: none, auto, 2, 2211-222'
                        f'{", for all that name none, as 2+q2 does" if several else ""}')


def read_isr_ratio(args: argparse.Namespace, default: Any = None) -> Any:
    """Return ``--isr-ratio``, or the default, joined with ``--query-ratio``: 2 and 4 are 2+q4.

    One that names a query ratio itself keeps it.
    """
    ratio = args.isr_ratio or default
    if args.query_ratio is None:
        return ratio
    several = [ratio or 'none'] if ratio is None or isinstance(ratio, str) else ratio
    joined = [name if '+q' in name else f'{name}+q{args.query_ratio}' for name in several]
    return joined if several is ratio else joined[0]


class Renamed(argparse.Action):
    """End with the new spelling of a flag: ``add_argument('--old', action=Renamed, new='--new')``.

    The flag does not show up in ``--help``.
    """

    def __init__(self, *args: Any, new: str, **kwargs: Any) -> None:
        self.new = new
        super().__init__(*args, **(dict(nargs='*', help=argparse.SUPPRESS) | kwargs))

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        """Raise the error."""
        parser.error(f'{self.option_strings[0]} is now {self.new}')


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``, whose strings `load_config` parses as mmengine does."""
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE',
                        help='override settings of the config, such as '
                        'train_dataloader.batch_size=8 or crop_size="(256,256)"')


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that training and test share, as mmseg has them."""
    parser.add_argument('--work-dir', metavar='DIR', help='folder for logs and results '
                        '(default: work_dirs/ and the name of the config)')
    add_cfg_options(parser)
    parser.add_argument('--compile', action='store_true',
                        help='compile the network, which pays off in long runs; needs a C++ '
                        'compiler on CPUs and Triton on GPUs')
    parser.add_argument('--skip-bad-files', action='store_true',
                        help='skip images and masks that cannot be read and list them in the work '
                        'dir; stop when more than a tenth are bad')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none',
                        help='what started the processes of a distributed run')
    parser.add_argument('--local_rank', '--local-rank', default='0', help=argparse.SUPPRESS)
    parser.add_argument('--verbose', action='store_true',
                        help="print mmengine's whole log, which otherwise goes to a file in the "
                        'work dir')


def run_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `load_config` takes of the flags of `add_run_arguments`."""
    os.environ.setdefault('LOCAL_RANK', args.local_rank)  # older launchers pass it as an argument
    return dict(cfg_options=args.cfg_options, work_dir=args.work_dir, launcher=args.launcher,
                compile=args.compile, verbose=args.verbose)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--checkpoint``, as `Segmenter` takes them."""
    parser.add_argument('--model', required=True, help='work dir of a training, a config, a '
                        '.safetensors written by tools/convert_checkpoint.py, a folder or hub name '
                        '(org/name) of transformers or segmentation-models-pytorch, or a name of '
                        "mmseg's model zoo")
    parser.add_argument('--checkpoint', metavar='FILE', help='.pth or .safetensors, for a config; '
                        'for a work dir the default is its best, or else its last checkpoint')


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--isr-ratio`` and ``--max-side``, as `Segmenter` takes them."""
    add_isr_ratio(parser, default=None,
                  note=' (default: none, and auto for images of more than 4.2 megapixels)')
    parser.add_argument('--max-side', type=int, metavar='N', help='scale larger images down for '
                        'the network, to N pixels on the longer side; masks keep their size')
    add_keep_ratio(parser)


def add_keep_ratio(parser: argparse.ArgumentParser) -> None:
    """Add ``--keep-ratio``, for models of transformers."""
    parser.add_argument('--keep-ratio', action='store_true', help='keep the ratio of images where '
                        'the processor of a model of transformers makes all of them squares')


def add_dataset(parser: argparse.ArgumentParser, instead: str) -> None:
    """Add ``--dataset``, which `unpack_dataset` reads."""
    parser.add_argument('--dataset', metavar='NAME', help=f'in place of {instead}, a folder or hub '
                        "name that Hugging Face's datasets loads: its validation or test split")


def add_reduce_zero_label(parser: argparse.ArgumentParser) -> None:
    """Add ``--reduce-zero-label``, for masks."""
    parser.add_argument('--reduce-zero-label', action='store_true',
                        help='0 in the masks means no label and 1 the first class, as in ADE20K')


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, as `Segmenter` takes it."""
    parser.add_argument('--device', help='cpu, cuda, cuda:1 (default: a GPU if there is one)')


def find_config(name: str | Path) -> Path:
    """Return the path of a config: a file, or the name of one that comes with this package.

    Raises:
        ConfigError: There is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    folders = _HERE / '.mim' / 'configs', _HERE.parent / 'configs'
    for folder in folders:
        for known in (folder / path.name, folder / f'{path.name}.py'):
            if known.is_file() and path.name == str(name).removeprefix('configs/'):
                return known
    near = difflib.get_close_matches(
        path.stem, [known.stem for folder in folders for known in folder.glob('*.py')], 1)
    raise ConfigError(f'config not found: {name}' + (f': did you mean {near[0]}?' if near else ''))


def is_hub_name(name: str | Path) -> bool:
    """Return whether a name can be that of a model on the hub, ``org/name``, and no path here."""
    return (re.fullmatch(r'[\w.-]+/[\w.-]+', str(name)) is not None and
            not os.path.exists(Path(name).parts[0]) and
            Path(name).suffix not in ('.py', '.pth', '.safetensors'))


def is_foreign(name: str | Path) -> bool:
    """Return whether a name is that of another library's model: a folder or on the hub."""
    return Path(name, 'config.json').is_file() or is_hub_name(name)


def find_in_zoo(name: str) -> Path | None:
    """Return the config of a model of mmseg's zoo by its name, without importing mmseg."""
    package = importlib.util.find_spec('mmseg')
    if package is None or package.origin is None or not re.fullmatch(r'[\w.-]+', name) or (
            os.path.exists(name)):
        return None
    configs = Path(package.origin).parent / '.mim' / 'configs'
    return next(configs.glob(f'[!_]*/{name.removesuffix(".py")}.py'), None)


def check_checkpoint(name: str | Path | None) -> None:
    """Fail early if a checkpoint is not there; an address such as ``https://...`` passes.

    Raises:
        CheckpointError: The file does not exist.
    """
    if name is not None and '://' not in str(name) and not Path(name).is_file():
        raise CheckpointError(f'checkpoint not found: {name}: give the path of a .pth or '
                              '.safetensors')


def check_inputs(sources: Iterable[str]) -> None:
    """Fail early if an input is not there; patterns such as ``photos/*.jpg`` pass.

    Raises:
        DataError: A file or folder does not exist.
    """
    for source in sources:
        if not os.path.lexists(source) and not glob.has_magic(source):
            raise DataError(f'no such file or folder: {source}')


def check_model(model: str | Path, checkpoint: str | Path | None = None) -> None:
    """Fail early if what `add_model_arguments` names is not there.

    Raises:
        ConfigError: There is no such work dir, config or file.
        CheckpointError: The checkpoint does not exist.
    """
    if not os.path.exists(model) and not is_hub_name(model) and not find_in_zoo(str(model)):
        try:
            find_config(model)
        except ConfigError as error:
            raise ConfigError(f'no such model: {model}: give the work dir of a training, a config '
                              'and its checkpoint, a .safetensors, a folder or hub name of '
                              "transformers, or a name of mmseg's model zoo") from error
    check_checkpoint(checkpoint)
