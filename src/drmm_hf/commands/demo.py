"""`drmm demo`: a page in the browser that shows what detectors see."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from .counts import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folders or Hub ids of detectors; several are shown side by side"
    )
    parser.add_argument("--port", type=at_least(1), default=7860, metavar="N", help="port of the page (default: 7860)")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page; 0.0.0.0 shows it to the network")
    parser.add_argument("--space", metavar="DIR", help="write the folder of a Hugging Face Space instead")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """Open the page until it is interrupted, or write the folder.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    from ..conversion.model_source import find_source

    models = [find_source(name) for name in args.models]
    if find_spec("gradio") is None:
        raise ValueError("the demo needs gradio: pip install 'drmm-hf[demo]'")
    if args.space:
        from ..demo.space import write_space

        write_space(models, args.space)
        print(f"{args.space} is the folder of a Space: python app.py in it runs the same page")
        return 0
    from ..demo.app import OPTIONS, make_app

    make_app(models, args.device).launch(server_name=args.host, server_port=args.port, **OPTIONS)
    return 0
