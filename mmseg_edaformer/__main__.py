"""The command line ``edaformer COMMAND``, a front of the scripts in tools/."""
import ast
import os
import runpy
import sys
from pathlib import Path

COMMANDS = {
    'train': 'train', 'test': 'test', 'predict': 'predict', 'predict-many': 'predict_many',
    'sweep': 'isr_sweep', 'compare': 'compare_isr', 'benchmark': 'benchmark', 'demo': 'demo',
    'serve': 'serve', 'visualize': 'visualize', 'export': 'export', 'convert': 'convert_checkpoint',
    'prepare-data': 'prepare_data', 'check-data': 'check_data', 'doctor': 'doctor'}
"""The commands, and the names of their scripts."""

_PACKAGE = Path(__file__).resolve().parent


def tools() -> Path:
    """Return the folder of the scripts: in an installed package, or beside it in the repository."""
    installed = _PACKAGE / '.mim' / 'tools'
    return installed if installed.is_dir() else _PACKAGE.parent / 'tools'


def usage() -> str:
    """Return the list of commands, each with the first sentence of its script."""
    lines = ['usage: edaformer COMMAND [ARGUMENTS]; edaformer COMMAND --help says more', '']
    for command, script in COMMANDS.items():
        text = ast.get_docstring(ast.parse((tools() / f'{script}.py').read_text(encoding='utf-8')))
        lines.append(f'  {command:<13} {(text or "").splitlines()[0]}')
    return '\n'.join(lines)


def main() -> None:
    """Run the script of the command that ``sys.argv`` names, as if it were called itself."""
    command, *arguments = sys.argv[1:] or ['--help']
    if command in ('-h', '--help'):
        print(usage())
        return
    if command not in COMMANDS:
        sys.exit(f"edaformer: there is no command '{command}'\n\n{usage()}")
    sys.argv = [f'edaformer {command}', *arguments]
    if (folder := os.getcwd()) not in sys.path:  # of the modules that a config imports
        sys.path.insert(0, folder)
    runpy.run_path(str(tools() / f'{COMMANDS[command]}.py'), run_name='__main__')


if __name__ == '__main__':
    main()
