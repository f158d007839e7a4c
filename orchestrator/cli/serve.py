"""``concertina serve``: one command from a checkpoint to a listening endpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import click

from ...errors import OperatorError
from ..config import DEFAULT_NAME, DeploymentConfig, EndpointOptions, EngineOptions, parse_bytes
from ..tokens import VARIABLE

_log = logging.getLogger(__name__)


class SizeType(click.ParamType[int]):
    """A size in bytes with an optional unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(str(value))
        except OperatorError as e:
            self.fail(str(e), param, ctx)


@dataclass(frozen=True)
class _Group:
    """Options of the command line that together fill one configuration object."""

    options: tuple[Any, ...]

    def __call__(self, command: Any) -> Any:
        for option in reversed(self.options):
            command = option(command)
        return command


_count = click.IntRange(min=1)

_deployment_options = _Group(
    (
        click.option("--workers", type=_count, default=1, show_default=True, help="Workers, one device each."),
        click.option("--name", default=DEFAULT_NAME, show_default=True, help="Name of the deployment in the cluster."),
        click.option(
            "--address", help="Ray cluster to join; 'local' starts an embedded one.  [default: join or start]"
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
            default="auto",
            show_default=True,
            help="Type of weights and KV cache; auto takes the checkpoint's.",
        ),
        click.option("--placement", metavar="FILE", help="Where experts live, as written by concertina plan."),
        click.option(
            "--spare-slots",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Replicas per MoE layer, at least.",
        ),
        click.option(
            "--rebalance-interval",
            type=float,
            default=60.0,
            show_default=True,
            help="Seconds between looks at whether experts should move; 0 never moves them.",
        ),
        click.option(
            "--loads",
            metavar="FILE",
            help="Measured loads: read at the start, written at each look of --rebalance-interval.",
        ),
        click.option(
            "--cluster",
            metavar="FILE",
            help="Devices of different memory and speed: the file of concertina plan --cluster.  [default: all alike]",
        ),
        click.option("--device-memory", type=SizeType(), help="Pages per device, e.g. 2GiB.  [default: what fits]"),
        click.option(
            "--memory",
            type=click.Choice(["shared", "separate"]),
            default="shared",
            show_default=True,
            help="Whether the devices of a node share its memory, or have one of their own each.",
        ),
        click.option(
            "--reserve-memory/--no-reserve-memory",
            default=False,
            show_default=True,
            help="Take each device's whole memory at the start and keep it, with --memory separate.",
        ),
        click.option(
            "--exchange",
            type=click.Choice(["auto", "shared", "gloo"]),
            default="auto",
            show_default=True,
            help="How tokens travel between workers; auto takes shared memory on one host.",
        ),
        click.option(
            "--exchange-timeout",
            type=float,
            default=60.0,
            show_default=True,
            help="Seconds after which a worker gives up a peer that does not answer, and after which one whose engine "
            "makes no progress is replaced.",
        ),
        click.option(
            "--hang-timeout",
            type=float,
            default=20.0,
            show_default=True,
            help="Seconds without an answer after which a worker, memory owner or controller is killed and replaced.",
        ),
        click.option(
            "--start-timeout",
            type=float,
            default=120.0,
            show_default=True,
            help="Seconds after which a worker or memory owner that hangs while it starts is killed.",
        ),
        click.option(
            "--standbys",
            type=click.IntRange(min=0),
            default=1,
            show_default=True,
            help="Idle workers per node, ready to replace a dead one.",
        ),
        click.option(
            "--token",
            envvar=VARIABLE,
            show_envvar=True,
            help="Secret that scale, drain and the like must show.  [default: a random one, kept for this user]",
        ),
    )
)

_engine_options = _Group(
    (
        click.option("--max-model-len", type=_count, help="Most tokens of a sequence.  [default: the model's]"),
        click.option("--max-batched-tokens", type=_count, default=512, show_default=True, help="Tokens a step."),
        click.option("--max-running", type=_count, default=64, show_default=True, help="Sequences at once per worker."),
        click.option("--max-waiting", type=_count, default=256, show_default=True, help="Queue length per worker."),
        click.option("--block-tokens", type=_count, default=16, show_default=True, help="Tokens per KV block."),
        click.option("--prefix-caching/--no-prefix-caching", default=True, show_default=True),
        click.option("--chunked-prefill/--no-chunked-prefill", default=True, show_default=True),
        click.option("--threads", type=_count, help="Compute threads per worker.  [default: cores / workers]"),
        click.option(
            "--emulated-step-ms",
            type=float,
            default=0.0,
            show_default=True,
            help="Least milliseconds of a step, slept as if an accelerator computed; 0 emulates nothing.",
        ),
    )
)

_endpoint_options = _Group(
    (
        click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
        click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True),
        click.option(
            "--ingress-replicas",
            type=_count,
            default=2,
            show_default=True,
            help="Ingress processes: one answers, the others stand by for its death.",
        ),
        click.option("--served-model-name", help="Name that requests give.  [default: the checkpoint's folder]"),
        click.option(
            "--api-key",
            "api_keys",
            multiple=True,
            envvar="CONCERTINA_API_KEY",
            show_envvar=True,
            help="Key that requests must carry; may be given several times.",
        ),
    )
)


def _config(checkpoint: str, o: dict[str, Any]) -> DeploymentConfig:
    from ..planfiles import read_cluster

    engine = EngineOptions(
        max_model_len=o["max_model_len"],
        max_batched_tokens=o["max_batched_tokens"],
        max_running=o["max_running"],
        max_waiting=o["max_waiting"],
        block_tokens=o["block_tokens"],
        prefix_caching=o["prefix_caching"],
        chunked_prefill=o["chunked_prefill"],
        threads=o["threads"],
        emulated_step_ms=o["emulated_step_ms"],
    )
    endpoint = EndpointOptions(
        o["host"], o["port"], o["ingress_replicas"], o["served_model_name"], tuple(o["api_keys"])
    )
    return DeploymentConfig(
        checkpoint=checkpoint,
        workers=o["workers"],
        name=o["name"],
        dtype=o["dtype"],
        exchange=o["exchange"],
        placement_file=o["placement"],
        device_memory_bytes=o["device_memory"],
        fleet=read_cluster(o["cluster"]).cluster.devices if o["cluster"] else (),
        spare_slots=o["spare_slots"],
        rebalance_s=o["rebalance_interval"],
        loads_file=o["loads"],
        exchange_timeout_s=o["exchange_timeout"],
        engine=engine,
        memory_mode=o["memory"],
        reserve_memory=o["reserve_memory"],
        standbys=o["standbys"],
        hang_timeout_s=o["hang_timeout"],
        start_timeout_s=o["start_timeout"],
        endpoint=endpoint,
        **({"token": o["token"]} if o["token"] else {}),
    )


@click.command("serve")
@click.argument("checkpoint")
@_deployment_options
@_engine_options
@_endpoint_options
@click.option("--verbose", is_flag=True, help="Show what every process logs.")
def command(checkpoint: str, address: str | None, verbose: bool, **options: Any) -> None:
    """Serve CHECKPOINT, a Hugging Face MoE folder, behind an OpenAI-compatible endpoint.

    Starts an embedded Ray, or joins the cluster that runs here. Ctrl-C ends everything. concertina scale changes the
    number of workers.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    from ..serving import serve_until_stopped

    config = _config(checkpoint, options)
    if config.engine.emulated_step_ms:
        _log.warning(
            "--emulated-step-ms %g: step times and throughput are emulated and say nothing of this machine",
            config.engine.emulated_step_ms,
        )
    serve_until_stopped(config, address, verbose, token_given=bool(options["token"]))
