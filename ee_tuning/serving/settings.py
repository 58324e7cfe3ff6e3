"""The flags of `ee-tuning serve` beside the job: its address, and access to it."""

from dataclasses import dataclass
from pathlib import Path

from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.openai_protocol.tool_formats import FORMATS


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The flags of `serve` that are no keys of the job."""

    host: str = "127.0.0.1"
    port: int = 8000
    """Port; 0 for any free port."""
    uds: str | None = None
    """Unix domain socket, instead of host and port."""
    root_path: str = ""
    """Path under which a proxy shows the server."""
    served_model_names: tuple[str, ...] = ()
    """Names of the model for clients; by default the name of its folder."""
    api_keys: tuple[str, ...] = ()
    """Keys of which a client must send one; empty for access without a key."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the server from browsers (CORS)."""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    tool_call_parser: str | None = None
    """Format in which the model writes calls of tools, a name of `tool_formats.FORMATS`; None where it writes none."""
    max_model_len: int | None = None
    """Most tokens of prompt and completion together."""
    max_queue: int = 256
    """Most completions that wait."""
    request_timeout: float = 600.0
    """Seconds after which a request is ended; 0 for never."""
    max_body_bytes: int = 4 << 20
    drain_timeout: float = 30.0
    """Seconds that running requests have after SIGTERM."""
    data_parallel_size: int = 1
    """Replicas of the model, which share this machine's memory."""
    otlp_traces_endpoint: str | None = None
    """URL of a collector of OpenTelemetry traces."""

    def check(self) -> None:
        """Raises InputError on values that can not be used."""
        rules = {
            "port": (0 <= self.port <= 65535, "a port in 0..65535"),
            "max_queue": (self.max_queue >= 0, "at least 0"),
            "request_timeout": (0 <= self.request_timeout < float("inf"), "seconds of at least 0 (0: no limit)"),
            "drain_timeout": (0 <= self.drain_timeout < float("inf"), "seconds of at least 0"),
            "data_parallel_size": (1 <= self.data_parallel_size <= 1024, "a number of replicas in 1..1024"),
            "max_body_bytes": (self.max_body_bytes >= 1, "at least 1"),
            "max_model_len": (self.max_model_len is None or self.max_model_len >= 2, "at least 2 tokens"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} must be {rule}, got {getattr(self, name)}")
        if self.tool_call_parser not in (None, *FORMATS):
            raise InputError(
                f"--tool-call-parser must be one of {', '.join(FORMATS)}, got {self.tool_call_parser}; name one of them"
            )
        if self.root_path and (not self.root_path.startswith("/") or not self.root_path.isascii()):
            raise InputError(f"--root-path must begin with a slash and be ASCII, got {self.root_path!r}")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise InputError("TLS needs both --ssl-certfile and --ssl-keyfile, got one of them; give the other, too")
        for name in ("ssl_certfile", "ssl_keyfile"):
            file = getattr(self, name)
            if file is not None and not Path(file).is_file():
                raise InputError(f"--{name.replace('_', '-')} must be a file, got {file}; give an existing one")


def read_api_keys(keys: list[str], file: Path | None) -> tuple[str, ...]:
    """Returns the keys given one by one, and those of a file with one per line. Raises InputError on a file without
    any, and on an empty key.
    """
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--api-key-file must be a text file, and {file} can not be read: {error}; name another"
            ) from error
        from_file = [line.strip() for line in lines if line.strip()]
        if not from_file:
            raise InputError(f"--api-key-file must hold a key on a line of its own, got {file}, which is empty")
        keys = [*keys, *from_file]
    if any(not key or not key.isascii() or not key.isprintable() for key in keys):
        raise InputError("an API key must be printable ASCII characters, got another one; choose a new key")
    return tuple(keys)


def model_names(config: Config, settings: ServeSettings) -> tuple[str, ...]:
    """Returns the names of the model for clients."""
    return settings.served_model_names or (Path(config.model.path).resolve().name or "model",)
