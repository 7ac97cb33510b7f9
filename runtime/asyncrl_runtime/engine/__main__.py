"""`python -m asyncrl_runtime.engine <model folder>` runs the engine alone, to try it out."""

import argparse
import logging
import sys
from pathlib import Path

from asyncrl_api.exits import ExitError
from asyncrl_runtime.engine.model import DTYPES
from asyncrl_runtime.engine.server import serve


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="asyncrl-engine", description="Serve a model on CPUs over SGLang's HTTP API."
    )
    parser.add_argument("model_folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000, help="port of the HTTP API; 0: any free port")
    parser.add_argument("--max-running-requests", type=int, default=16)
    parser.add_argument("--max-total-tokens", type=int, default=65536)
    parser.add_argument(
        "--context-length",
        type=int,
        default=0,
        help="most tokens of prompt and output; 0: the model's own limit",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-cached-tokens", type=int, default=16384)
    parser.add_argument("--stream-interval", type=int, default=1)
    parser.add_argument("--seed", type=int, default=None)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        serve(**vars(parser.parse_args()))
    except ExitError as error:
        print(error, file=sys.stderr)
        return int(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
