"""The command that serves."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from ee_tuning.commands.command import Command, add_job, job_of
from ee_tuning.errors import InputError

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "aiohttp")


def serve(args: argparse.Namespace) -> int:
    """Serves a model."""
    config = job_of(args, "serve")
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise InputError(
            f"serve needs the package {missing[0]}, which is not installed; pip install 'ee_tuning[serve]'"
        )
    from ee_tuning.serving.settings import ServeSettings, read_api_keys

    given = {
        name: getattr(args, name)
        for name in (
            "host",
            "port",
            "uds",
            "root_path",
            "ssl_certfile",
            "ssl_keyfile",
            "tool_call_parser",
            "max_model_len",
            "max_queue",
            "request_timeout",
            "max_body_bytes",
            "drain_timeout",
            "data_parallel_size",
            "otlp_traces_endpoint",
        )
        if getattr(args, name) is not None
    }
    settings = ServeSettings(
        served_model_names=tuple(args.served_model_name),
        api_keys=read_api_keys(args.api_key, args.api_key_file),
        allowed_origins=tuple(args.allowed_origins),
        **given,
    )
    if settings.data_parallel_size > 1:
        from ee_tuning.serving.replicated import serve_replicas

        return serve_replicas(config, settings)
    from ee_tuning.serving.command import serve

    serve(config, settings)
    return 0


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "serve")
    parser.add_argument(
        "--host", metavar="ADDRESS", help="address to listen at (default 127.0.0.1: this machine alone)"
    )
    parser.add_argument("--port", type=int, metavar="N", help="port to listen at (default 8000; 0 for any free one)")
    parser.add_argument("--uds", metavar="PATH", help="Unix domain socket to listen at, instead of host and port")
    parser.add_argument("--root-path", metavar="/PATH", help="path under which a proxy shows the server")
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the model for clients (default: the name of its folder)",
    )
    parser.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="how the model writes calls of tools: hermes (Hermes, Qwen), llama3_json (Llama 3); needed for tool_choice auto",
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="most tokens of prompt and completion together (default: the model's context, or what fits the KV cache)",
    )
    parser.add_argument(
        "--data-parallel-size",
        type=int,
        metavar="N",
        help="replicas of the model behind the port, each in processes of its own, on GPUs or a share of the cores (default 1)",
    )
    parser.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="collector that OpenTelemetry traces are sent to (needs the extra otel; default: none are made)",
    )
    _add_access(parser)
    _add_limits(parser)


def _add_access(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="key that clients have to send; repeatable. Other users of the machine can read it in the list of processes: "
        "prefer --api-key-file",
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with such keys, one a line")
    parser.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="origins of web pages that may use the server from a browser (CORS; default none)",
    )
    parser.add_argument("--ssl-certfile", metavar="FILE", help="certificate, for HTTPS")
    parser.add_argument("--ssl-keyfile", metavar="FILE", help="its private key")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-queue",
        type=int,
        metavar="N",
        help="completions that may wait beside those that run; more get 429 (default 256)",
    )
    parser.add_argument(
        "--request-timeout",
        type=float,
        metavar="S",
        help="seconds after which a request is ended (default 600; 0: never)",
    )
    parser.add_argument("--max-body-bytes", type=int, metavar="N", help="largest body of a request (default 4 MiB)")
    parser.add_argument(
        "--drain-timeout", type=float, metavar="S", help="seconds that running requests have after SIGTERM (default 30)"
    )


COMMANDS = (
    Command(
        name="serve",
        summary="serve the model to OpenAI's clients, with early exits per request",
        examples="""\
  ee-tuning serve --model Llama-2-7b-chat-hf --exits runs/llama-2-7b/exit_heads --threshold 0.8
  ee-tuning serve --model Qwen3-8B --exits runs/qwen3-8b/exit_heads --policy speculative --host 0.0.0.0 --api-key-file keys.txt
  torchrun --nproc-per-node 4 -m ee_tuning serve --model Llama-2-7b-chat-hf --exits runs/llama-2-7b/exit_heads --tensor-model-parallel-size 4
  ee-tuning serve --model Qwen3-8B --exits runs/qwen3-8b/exit_heads --data-parallel-size 4

Flags of decoding are the defaults of requests, which may set policy, exit_threshold, exit_layer and exit_measure of their own. A page
at / shows where tokens leave; /docs lists the endpoints. SIGTERM lets running requests end. See docs/serving.md.""",
        add_arguments=_add_serve,
        run=serve,
    ),
)
