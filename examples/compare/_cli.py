"""What the examples ask for on the command line."""

import argparse
import warnings
from pathlib import Path

import torch
import transformers
from rich.console import Console

from fastpeft.cli.console import console


def parser(description: str, *, batch_size: int, max_length: int, learning_rate: float) -> argparse.ArgumentParser:
    """The options that the examples share."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument(
        "--model", metavar="ID_OR_PATH", help="model for transformers' from_pretrained; None: the package's"
    )
    options.add_argument("--data", type=Path, metavar="FILE", help="your own data; None: the package's")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--bf16", action="store_true", help="compute under autocast to bf16 instead of in fp32")
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--alpha", type=float, default=16.0)
    options.add_argument(
        "--dropout", type=float, default=0.1, help="of LoRA's input; 0: both runs must agree to rounding"
    )
    options.add_argument("--learning-rate", type=float, default=learning_rate)
    options.add_argument("--batch-size", type=int, default=batch_size)
    options.add_argument("--max-length", type=int, default=max_length, help="tokens of a row")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, help="of the CPU; None: as many as torch takes")
    options.add_argument(
        "--cache", type=Path, help="folder of fetched files; None: $FASTPEFT_CACHE or the user's cache"
    )
    options.add_argument("--output", type=Path, default=Path("demo_output"))
    return options


def prepare(args: argparse.Namespace) -> Console:
    """Sets the thread count, quietens transformers' loading messages and returns where to print."""
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()  # it warns of a new classification head, which is what is trained here
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return console()
