"""Files that planning reads: cluster, model, loads, placements. Formats are documented in docs/planning.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import OperatorError
from ..planners.cluster import Cluster, Device, Links
from ..planners.model import Loads, ModelSpec
from ..planners.placement import Placement
from ..workers.families.base import DTYPE_BYTES, ModelConfig
from ..workers.families.registry import read_config
from .document import Node, read_document, read_table

_T = TypeVar("_T")
_MODEL_NUMBERS = ("expert_bytes", "flops_per_token", "hidden_bytes", "shared_bytes", "shared_flops_per_token")


@dataclass(frozen=True)
class ClusterFile:
    """Devices that may hold experts, and those that still live but are to be emptied."""

    cluster: Cluster
    leaving: tuple[Device, ...] = ()

    @property
    def alive(self) -> Cluster:
        """All devices that weights can be read from."""
        return Cluster(self.cluster.devices + self.leaving, self.cluster.links)


def read_cluster(path: str | Path) -> ClusterFile:
    """A cluster file: kinds of devices, devices, links."""
    node = read_document(path)
    fields = node.fields(("kinds", "devices"), ("links",))
    kinds = {name: _kind(entry) for name, entry in fields["kinds"].named("device kinds")}
    devices = [d for entry in fields["devices"].items("a list of devices") for d in _devices(entry, kinds)]
    links = _links(fields["links"]) if "links" in fields else Links()
    staying = tuple(d for d, leaving in devices if not leaving)
    cluster = _made(node, lambda: Cluster(staying, links))
    return ClusterFile(cluster, tuple(d for d, leaving in devices if leaving))


def _kind(node: Node) -> dict[str, float]:
    fields = node.fields(("memory", "flops", "bandwidth"))
    return {
        "memory_bytes": int(fields["memory"].quantity("80GiB")),
        "flops": fields["flops"].quantity("400TFLOP/s", 1e-9),
        "bandwidth_bytes_s": fields["bandwidth"].quantity("3.3TB/s", 1e-9),
    }


def _devices(node: Node, kinds: dict[str, dict[str, float]]) -> list[tuple[Device, bool]]:
    """One device, or ``count`` of them with numbered names; and whether it is leaving."""
    fields = node.fields(("name", "kind"), ("node", "count", "leaving"))
    name, kind = fields["name"].text(), fields["kind"].text()
    if kind not in kinds:
        fields["kind"].fail(f"one of {', '.join(kinds)}")
    place = fields["node"].text() if "node" in fields else "node0"
    names = [name]
    if "count" in fields:
        if "{}" not in name:
            fields["name"].fail("a name with {} where the number goes, as there is a count")
        names = [name.replace("{}", str(i)) for i in range(fields["count"].whole(1))]
    leaving = fields["leaving"].flag() if "leaving" in fields else False
    numbers: dict[str, Any] = kinds[kind]
    return [(Device(name=n, kind=kind, node=place, **numbers), leaving) for n in names]


def _links(node: Node) -> Links:
    fields = node.fields((), ("node", "cluster"))
    default = Links()
    within = fields["node"].quantity("400GB/s", 1e-9) if "node" in fields else default.node_bytes_s
    between = fields["cluster"].quantity("50GB/s", 1e-9) if "cluster" in fields else default.cluster_bytes_s
    return _made(node, lambda: Links(within, between))


def read_model(path: str | Path) -> ModelSpec:
    """A model: Hugging Face's ``config.json`` (or its folder), or a plain model file."""
    path = Path(path)
    node = read_document(path / "config.json" if path.is_dir() else path)
    if isinstance(node.value, dict) and "architectures" in node.value:
        return model_spec(read_config(node.value, node.source))
    fields = node.fields(("layers", "experts", "expert_bytes", "flops_per_token"), ("top_k", *_MODEL_NUMBERS[2:]))
    numbers = {name: fields[name].quantity("44MB") for name in _MODEL_NUMBERS if name in fields}
    layers, experts = fields["layers"].whole(1), fields["experts"].whole(1)
    top_k = fields["top_k"].whole(1) if "top_k" in fields else 1
    return _made(node, lambda: ModelSpec(layers, experts, top_k=top_k, **numbers))


def model_spec(config: ModelConfig) -> ModelSpec:
    """Sizes and operations of a model's experts: three matrices of hidden x intermediate, two operations a weight."""
    element = DTYPE_BYTES[config.dtype]
    expert = 3 * config.hidden_size * config.expert_intermediate
    shared = 3 * config.hidden_size * config.shared_intermediate
    return ModelSpec(
        layers=len(config.moe_layers),
        experts=config.experts,
        expert_bytes=float(expert * element),
        flops_per_token=2.0 * expert,
        hidden_bytes=float(config.hidden_size * element),
        top_k=config.top_k,
        shared_bytes=float(shared * element),
        shared_flops_per_token=2.0 * shared,
    )


def read_loads(path: str | Path, model: ModelSpec, tokens_per_step: float | None = None) -> Loads:
    """Loads: JSON with ``counts_LE`` or scenarios, or CSV with layer, expert, tokens[, scenario].

    ``tokens_per_step``, here or in the file, rescales every layer to so many tokens times the model's top_k.
    """
    if str(path).endswith(".csv"):
        node, tokens_SLE, weights, pairs = _csv_loads(path, model)
    else:
        node = read_document(path)
        tokens_SLE, weights, pairs, in_file = _json_loads(node, model)
        tokens_per_step = tokens_per_step or in_file
    if tokens_per_step:
        sums_SL = tokens_SLE.sum(axis=2, keepdims=True)
        tokens_SLE = tokens_SLE * np.divide(tokens_per_step * model.top_k, sums_SL, where=sums_SL > 0, out=sums_SL)
    return _made(node, lambda: Loads(tokens_SLE, weights, pairs))


def _json_loads(node: Node, model: ModelSpec) -> tuple[np.ndarray, Any, Any, float | None]:
    has_scenarios = isinstance(node.value, dict) and "scenarios" in node.value
    fields = node.fields(("scenarios",) if has_scenarios else ("counts_LE",), ("tokens_per_step", "pairs_PEE"))
    if has_scenarios:
        entries = [
            s.fields(("counts_LE",), ("name", "weight")) for s in fields["scenarios"].items("a list of scenarios")
        ]
        counts = [_counts(s["counts_LE"], model) for s in entries]
        weights = [s["weight"].quantity("1.0") if "weight" in s else 1.0 for s in entries]
    else:
        counts, weights = [_counts(fields["counts_LE"], model)], [1.0]
    per_step = fields["tokens_per_step"].quantity("4096", 1e-9) if "tokens_per_step" in fields else None
    pairs = None
    if "pairs_PEE" in fields:
        layers = fields["pairs_PEE"].items("a list over neighbouring layers", 0)
        pairs = np.array([[_numbers(row, model.experts) for row in layer.items()] for layer in layers])
    return np.array(counts), np.array(weights), pairs, per_step


def _counts(node: Node, model: ModelSpec) -> list[list[float]]:
    rows = node.items(f"{model.layers} lists, one per layer, as the model has")
    if len(rows) != model.layers:
        Node(f"{len(rows)} lists", node.source, node.path).fail(f"{model.layers}, one per layer of the model")
    return [_numbers(row, model.experts) for row in rows]


def _numbers(row: Node, count: int) -> list[float]:
    values = row.items(f"{count} numbers, one per expert")
    if len(values) != count:
        Node(f"{len(values)} numbers", row.source, row.path).fail(f"{count}, one per expert of the model")
    return [v.quantity("128") for v in values]


def _csv_loads(path: str | Path, model: ModelSpec) -> tuple[Node, np.ndarray, Any, Any]:
    tables: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((model.layers, model.experts)))
    for row in read_table(path, ("layer", "expert", "tokens"), ("scenario",)):
        at = []
        for name, count in (("layer", model.layers), ("expert", model.experts)):
            at.append(row[name].whole())
            if at[-1] >= count:
                row[name].fail(f"0..{count - 1}, as the model has {count}")
        scenario = str(row["scenario"].value) if "scenario" in row else ""
        tables[scenario][at[0], at[1]] += row["tokens"].quantity("128")
    if not tables:
        raise OperatorError(f"{path}: no rows; expected one per layer and expert")
    return Node(None, str(path)), np.array([tables[s] for s in sorted(tables)]), None, None


def read_placement(path: str | Path) -> Placement:
    """A placement: what `Placement.to_dict` wrote, or a plan (which is one, with more fields)."""
    node = read_document(path)
    if not isinstance(node.value, dict):
        node.fail("a mapping with devices and layers")
    return Placement.from_dict(node.value, node.source)


def _made(node: Node, make: Callable[[], _T]) -> _T:
    """Build a noun; its own complaints get the file's name."""
    try:
        return make()
    except OperatorError as e:
        where = f"{node.source}: {node.path}" if node.path else node.source
        raise OperatorError(f"{where}: {e}") from e
