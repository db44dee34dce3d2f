"""Train a segmentor or a classifier."""
import argparse
import os
import signal
import sys


def end_at_once(number: int, frame: object) -> None:
    """End with the exit code of a run that can be resumed; there is nothing to save."""
    os.write(2, f'{signal.Signals(number).name}: stopped while it was not training, so nothing is '
             'lost; resume with --resume\n'.encode())
    os._exit(75)  # EXIT_PREEMPTED, which is not imported yet


if __name__ == '__main__':  # before the seconds that the imports take; PreemptionHook takes over
    for name in {'SIGTERM', 'SIGUSR1'} & {*vars(signal)}:
        signal.signal(getattr(signal, name), end_at_once)

from mmseg_edaformer.command_line import (  # noqa: E402
    add_run_arguments,
    check_checkpoint,
    find_config,
    run_settings,
)
from mmseg_edaformer.errors import clear_errors  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='such as configs/edaformer_t_ade.py')
    parser.add_argument('--resume', action='store_true',
                        help='resume from the newest checkpoint in the work dir that loads')
    parser.add_argument('--load-from', metavar='CHECKPOINT',
                        help='start from these weights; those of other shapes stay as initialised')
    parser.add_argument('--backbone-weights', metavar='FILE',
                        help='start the encoder from these: the authors\' EFT_T.pth, a checkpoint '
                        'of configs/eft_t_in1k.py, or .safetensors')
    parser.add_argument('--amp', action='store_true', help='mixed precision, on GPUs: '
                        'bfloat16 where the card has it')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate with the images per step')
    parser.add_argument('--skip-nonfinite', type=int, metavar='N',
                        help='skip up to N steps whose loss or gradient is nan or infinite '
                        '(default: the first one ends the run)')
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    find_config(args.config)
    check_checkpoint(args.load_from)
    check_checkpoint(args.backbone_weights)
    from mmseg_edaformer import compat
    from mmseg_edaformer.engine import launch
    from mmseg_edaformer.engine.run_config import load_config
    cfg = load_config(args.config, **run_settings(args))
    launch.prepare_train(cfg, resume=args.resume, load_from=args.load_from, amp=args.amp,
                         auto_scale_lr=args.auto_scale_lr, skip_nonfinite=args.skip_nonfinite,
                         skip_bad_files=args.skip_bad_files,
                         backbone_weights=args.backbone_weights)
    code = launch.train(cfg)
    compat.leave_distributed(code)
    sys.exit(code)


if __name__ == '__main__':
    with clear_errors():
        main()
