"""A page in the browser: type a prompt, watch the video while it is made, and change the prompt on the way."""

from __future__ import annotations

import argparse
import importlib.util
import socket

from sparse_forcing.cli.flags import Parser, add_config_flags, number, read_config, whole_number
from sparse_forcing.errors import ConfigError
from sparse_forcing.sampling.generation.jobs import GenerateConfig

FLAGS = {
    "model": "`tiny` (embedded, the default), or a local diffusers folder",
    "device": "cpu, cuda, ... (default: the GPU if there is one)",
    "text_encoder_device": "where prompts are read, if elsewhere",
    "dtype": "number format of the weights (default: the model's)",
    "weights": "store the linear layers in 8 bits",
    "offload": "what waits in the CPU's memory until it computes",
    "tiny_vae": "decode with a TAEHV file (taew2_1)",
    "tiled_decoding": "decode tiles of the picture one after the other",
}
CACHE_GIGABYTES = 4.0


def add_arguments(parser: Parser) -> None:
    add_config_flags(parser, GenerateConfig, FLAGS)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=whole_number, default=7860, metavar="N", help="default: 7860")
    parser.add_argument(
        "--cache-gigabytes",
        type=number,
        default=CACHE_GIGABYTES,
        metavar="X",
        help="memory for the caches of all videos together; who finds no room waits in line (default: 4)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted."""
    config = read_config(GenerateConfig, arguments)
    if not 0 < arguments.port < 65536:
        raise ConfigError(f"--port must be between 1 and 65535, got {arguments.port}")
    if not arguments.cache_gigabytes > 0:
        raise ConfigError(f"--cache-gigabytes must be above 0, got {arguments.cache_gigabytes:g}")
    try:
        family = socket.getaddrinfo(arguments.host, arguments.port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((arguments.host, arguments.port), family=family).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--port {arguments.port}: cannot listen on {arguments.host} ({reason})") from error
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError('the page needs gradio; pip install "sparse-forcing[ui]"')

    from sparse_forcing.cli.playground.page import serve
    from sparse_forcing.cli.playground.visitors import Room, Visitors
    from sparse_forcing.sampling.generation.generate import load_pipeline

    with Visitors(load_pipeline(config), Room(round(arguments.cache_gigabytes * 1e9))) as visitors:
        serve(visitors, arguments.host, arguments.port)
    return 0
