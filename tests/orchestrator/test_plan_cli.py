"""``concertina plan`` on the documented examples, and on bad files: every error names file, field and expectation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from concertina.errors import OperatorError
from concertina.orchestrator.cli import plan_view
from concertina.orchestrator.cli.plan import command
from concertina.orchestrator.fleetfile import read_fleet
from concertina.orchestrator.plandoc import read_plan
from concertina.orchestrator.planfiles import read_cluster, read_loads, read_model, read_placement
from concertina.planners.check import check_placement
from concertina.planners.cost import evaluate
from concertina.planners.migration import MigrationProblem
from concertina.planners.placement import Placement

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
INPUTS = ["--model", "model.yaml", "--cluster", "cluster.yaml", "--loads", "loads.json"]
LIMITS = ["--time-limit", "1", "--spare-slots", "24"]


def run(*args: str) -> Result:
    result = CliRunner().invoke(command, list(args))
    if result.exception is not None and not isinstance(result.exception, (SystemExit, OperatorError)):
        raise result.exception
    return result


@pytest.fixture(autouse=True)
def _in_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    inputs = [str(EXAMPLES / a) if "." in a else a for a in INPUTS]
    result = run(*inputs, *LIMITS, "-o", str(path))
    assert result.exit_code == 0, result.output
    assert "8 layers x 64 experts on 12 devices" in result.output
    assert "balance" in result.output
    return path


def without_c3(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text((EXAMPLES / "cluster.yaml").read_text().replace("node: c, count: 4", "node: c, count: 3"))
    return path


def test_a_robust_plan_is_for_workers_that_split_every_batch(tmp_path: Path) -> None:
    model, loads, path = tmp_path / "model.yaml", tmp_path / "loads.json", tmp_path / "plan.json"
    model.write_text("{layers: 1, experts: 12, expert_bytes: 1MB, flops_per_token: 1e6}")
    scenarios = [{"name": n, "counts_LE": [[(i * k) % 13 + 1 for i in range(12)]]} for n, k in (("a", 5), ("b", 7))]
    loads.write_text(json.dumps({"scenarios": scenarios}))
    files = ["--model", str(model), "--cluster", "cluster.yaml", "--loads", str(loads)]
    result = run(*files, "--time-limit", "1", "--spare-slots", "12", "--method", "robust", "-o", str(path))
    assert result.exit_code == 0, result.output
    plan = read_plan(path)
    assert check_placement(plan.problem, plan.placement) == []
    assert (plan.method, plan.problem.objective.split) == ("robust", "per_batch")
    assert "by samples that none had seen" in plan.reason
    assert 0 < plan.bound_s <= evaluate(plan.problem, plan.placement).total
    assert run("compare", str(path), str(path)).exit_code == 0


@pytest.mark.parametrize(
    ("count", "shown"), [(999.4, "999 B"), (999.6, "1 kB"), (999_499, "999 kB"), (999_999, "1 MB"), (1.5e12, "1.5 TB")]
)
def test_sizes_have_three_digits(count: float, shown: str) -> None:
    assert plan_view.size(count) == shown


def test_the_plan_is_a_sound_placement_file(first: Path) -> None:
    plan = read_plan(first)
    assert check_placement(plan.problem, plan.placement) == []
    assert read_placement(first) == plan.placement
    assert Placement.from_dict(json.loads(first.read_text())) == plan.placement
    assert plan.bound_s <= plan.cost.total * (1 + 1e-9)


def test_replanning_after_a_loss_orders_the_migration(first: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "next.json", tmp_path / "picture.png"
    args = ["--model", "model.yaml", "--cluster", str(without_c3(tmp_path)), "--loads", "loads.json", *LIMITS]
    result = run(*args, "--current", str(first), "-o", str(out), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "migrate: experts have no replica left" in result.output
    assert "from the checkpoint" in result.output
    data = json.loads(out.read_text())
    assert data["method"] == "replan"
    moved = sum(m["bytes"] for p in data["migration"]["phases"] for m in p["moves"])
    assert moved == data["migration"]["moved_bytes"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in picture.with_suffix(".svg").read_bytes()
    assert picture.stat().st_size > 10_000


def test_a_leaving_device_is_copied_from(first: Path, tmp_path: Path) -> None:
    path = without_c3(tmp_path)
    path.write_text(path.read_text() + "  - {name: c3, kind: slow, node: c, leaving: true}\n")
    out = tmp_path / "next.json"
    args = ["--model", "model.yaml", "--cluster", str(path), "--loads", "loads.json", *LIMITS, "--current", str(first)]
    assert run(*args, "-o", str(out)).exit_code == 0
    data = json.loads(out.read_text())
    assert data["migration"]["checkpoint_bytes"] == 0
    assert "c3" not in data["devices"]


def test_nothing_changed_says_stay(first: Path) -> None:
    result = run(*INPUTS, *LIMITS, "--current", str(first))
    assert result.exit_code == 0
    assert "stay" in result.output
    assert "net" in result.output


def test_same_seed_same_plan(first: Path, tmp_path: Path) -> None:
    plans = []
    for name in ("a.json", "b.json"):
        run(*INPUTS, "--method", "greedy", "--spare-slots", "24", "-o", str(tmp_path / name))
        plans.append((tmp_path / name).read_bytes())
    assert plans[0] == plans[1]


def test_compare_and_explain(first: Path, tmp_path: Path) -> None:
    other = tmp_path / "robin.json"
    assert run(*INPUTS, "--method", "round_robin", "--spare-slots", "24", "-o", str(other)).exit_code == 0
    compared = run("compare", str(other), str(first))
    assert compared.exit_code == 0, compared.output
    assert "slowest devices" in compared.output
    assert "From the first to the second:" in compared.output
    explained = run("explain", str(other), "--most", "3")
    assert explained.exit_code == 0, explained.output
    assert "Limiting most layers" in explained.output
    assert "with every relief" in explained.output


def test_fleet_on_the_example(tmp_path: Path) -> None:
    out = tmp_path / "fleet.json"
    result = run("fleet", "fleet.yaml", "-o", str(out))
    assert result.exit_code == 0, result.output
    assert "decode: needs" in result.output
    assert json.loads(out.read_text())["status"] == "optimal"


def test_a_fleet_that_cannot_be_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text((EXAMPLES / "fleet.yaml").read_text().replace("20e3, 26e3", "200e3, 260e3"))
    out = tmp_path / "fleet.json"
    result = run("fleet", str(path), "-o", str(out))
    assert result.exit_code == 2
    assert "period 0: decode: needs" in result.output
    assert json.loads(out.read_text())["shortages"][0]["resource"] == "decode"


def test_csv_loads_equal_json_loads(tmp_path: Path) -> None:
    model = read_model("model.yaml")
    loads = read_loads("loads.json", model)
    path = tmp_path / "loads.csv"
    data = json.loads(Path("loads.json").read_text())
    rows = ["layer,expert,tokens,scenario"]
    for s in data["scenarios"]:
        rows += [f"{i},{e},{t},{s['name']}" for i, row in enumerate(s["counts_LE"]) for e, t in enumerate(row)]
    path.write_text("\n".join(rows) + "\n")
    again = read_loads(path, model, data["tokens_per_step"])
    assert again.tokens_SLE == pytest.approx(loads.tokens_SLE)


def test_a_checkpoint_config_gives_the_sizes(tmp_path: Path) -> None:
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "config.json"):
        model = read_model(path)
        assert (model.layers, model.experts, model.top_k) == (3, 8, 2)
        assert model.bytes_LE[0, 0] == 3 * 64 * 32 * 2
        assert model.flops_per_token == 2 * 3 * 64 * 32


KIND = "kinds: {k: {memory: 1, flops: 1, bandwidth: 1}}\ndevices: "
BAD_CLUSTERS = [
    ("kinds: {}\ndevices: []", "kinds: {}; expected a mapping from names to device kinds"),
    ("devices: []", "expected a mapping with the field 'kinds'"),
    ("- a", "expected a mapping with kinds, devices, links"),
    ("kinds: [", "not YAML"),
    (KIND.replace("memory: 1", "memory: lots") + "[]", "kinds.k.memory: 'lots'; expected a number >= 0"),
    (
        KIND.replace(", bandwidth: 1", "") + "[]",
        "kinds.k: {'memory': 1, 'flops': 1}; expected a mapping with the field",
    ),
    (KIND + "[{name: a, kind: z}]", "devices[0].kind: 'z'; expected one of k"),
    (KIND + "[{name: a, kind: k, count: 2}]", "devices[0].name: 'a'; expected a name with {}"),
    (KIND + "[{name: a, kind: k}, {name: a, kind: k}]", "names that do not repeat"),
    (KIND + "[{name: a, kind: k, speed: 3}]", "devices[0].speed: 3; expected no such field; known: name, kind"),
    (KIND + "[{name: a, kind: k, leaving: 1}]", "devices[0].leaving: 1; expected true or false"),
    (KIND + "[{name: a, kind: k}]\nlinks: {node: 1, cluster: 2}", "links: cluster_bytes_s"),
]


@pytest.mark.parametrize(("text", "message"), BAD_CLUSTERS)
def test_bad_cluster_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(OperatorError) as caught:
        read_cluster(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


BAD_LOADS = [
    ("bad.json", "{", "line 1, column 2: not JSON"),
    ("bad.json", "[]", "[]; expected a mapping with counts_LE"),
    ("bad.json", '{"counts_LE": [[1, 2]]}', "counts_LE: '1 lists'; expected 2, one per layer of the model"),
    ("bad.json", '{"counts_LE": [[1, 2], [1]]}', "counts_LE[1]: '1 numbers'; expected 2, one per expert"),
    ("bad.json", '{"counts_LE": [[1, 2], [1, -3]]}', "counts_LE[1][1]: -3; expected a number >= 0"),
    ("bad.json", '{"counts_LE": [[1, 2], [1, NaN]]}', "counts_LE[1][1]: nan; expected a number >= 0"),
    ("bad.json", '{"scenarios": []}', "scenarios: []; expected a list of scenarios"),
    ("bad.json", '{"scenarios": [{"weight": 1}]}', "scenarios[0]: {'weight': 1}; expected a mapping with the field"),
    ("bad.csv", "layer,expert\n0,0\n", "header: 'layer,expert'; expected the columns layer, expert, tokens"),
    ("bad.csv", "layer,expert,tokens\n0,7,1\n", "line 2: expert: 7; expected 0..1"),
    ("bad.csv", "layer,expert,tokens\n0,x,1\n", "line 2: expert: 'x'; expected a whole number >= 0"),
    ("bad.csv", "layer,expert,tokens\n", "no rows; expected one per layer and expert"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD_LOADS)
def test_bad_load_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    model_file = tmp_path / "model.yaml"
    model_file.write_text("{layers: 2, experts: 2, expert_bytes: 1, flops_per_token: 1}")
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(OperatorError) as caught:
        read_loads(path, read_model(model_file))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{layers: 0, experts: 2, expert_bytes: 1, flops_per_token: 1}", "layers: 0; expected a whole number >= 1"),
        ("{layers: 1, experts: 2, expert_bytes: 1}", "expected a mapping with the field 'flops_per_token'"),
        ("{layers: 1, experts: 2, expert_bytes: 1, flops_per_token: 1, top_k: 3}", "model: top_k: 3"),
        ("{architectures: [Gpt]}", "architectures: expected a list that begins with one of Mixtral"),
    ],
)
def test_bad_model_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(OperatorError) as caught:
        read_model(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("find", "put", "message"),
    [
        ("decode: 12e3, memory: 120e9", "decode: 12e3", "kinds.large.capacity"),
        ("running: 4", "running: -4", "kinds.large.running: -4; expected a whole number >= 0"),
        ("quantile: 0.95", "quantile: 0.99", "targets[0].quantile: 0.99; expected within the forecast's 0.5..0.95"),
        ("{resource: memory}", "{resource: disk}", "targets[1].resource: 'disk'; expected one of decode, memory"),
        ("[0.5, 0.95]", "[0.95, 0.5]", "forecasts[decode].quantiles"),
        ("period_s: 600", "period_s: soon", "period_s: 'soon'; expected a number >= 0"),
    ],
)
def test_bad_fleet_files(tmp_path: Path, find: str, put: str, message: str) -> None:
    text = (EXAMPLES / "fleet.yaml").read_text()
    assert find in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(find, put))
    with pytest.raises(OperatorError) as caught:
        read_fleet(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_missing_and_wrong_files(tmp_path: Path, first: Path) -> None:
    with pytest.raises(OperatorError, match=r"nowhere\.yaml: cannot be read: No such file"):
        read_cluster(tmp_path / "nowhere.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OperatorError, match="not UTF-8"):
        read_cluster(binary)
    no_plan = tmp_path / "no.json"
    no_plan.write_text("{}")
    with pytest.raises(OperatorError, match=r"no\.json: format: None; expected 'concertina-plan/1'"):
        read_plan(no_plan)
    broken: dict[str, Any] = json.loads(first.read_text())
    del broken["problem"]["model"]
    no_plan.write_text(json.dumps(broken))
    with pytest.raises(OperatorError, match=r"no\.json: KeyError\('model'\)"):
        read_plan(no_plan)
    result = run(*INPUTS, "--method", "greedy", "-o", str(tmp_path / "no" / "no.json"))
    assert "no.json: cannot be written: No such file" in str(result.exception)


def test_missing_options_and_infeasible_problems(tmp_path: Path) -> None:
    result = run("--model", "model.yaml")
    assert result.exit_code == 2
    assert "Missing option --cluster, --loads" in result.output
    tight = run(*INPUTS, "--reserve", "23GiB")
    assert isinstance(tight.exception, OperatorError)
    assert "infeasible" in str(tight.exception)
    assert "short)" in str(tight.exception)


def test_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(*INPUTS, "--method", "greedy", "--plot", str(tmp_path / "x"))
    assert "install concertina with the extra 'plot'" in str(result.exception)


def test_the_written_migration_passes_the_check(first: Path, tmp_path: Path) -> None:
    """The document's phases, read back and walked, end at the document's placement."""
    out = tmp_path / "next.json"
    cluster = without_c3(tmp_path)
    run(
        "--model",
        "model.yaml",
        "--cluster",
        str(cluster),
        "--loads",
        "loads.json",
        *LIMITS,
        "--current",
        str(first),
        "-o",
        str(out),
    )
    plan, data = read_plan(out), json.loads(out.read_text())
    assert plan.before is not None
    walk = MigrationProblem(read_cluster(cluster).alive, plan.problem.model, plan.before, plan.placement)
    held = {name: set(keys) for name, keys in walk.start.items()}
    for phase in data["migration"]["phases"]:
        for move in phase["moves"]:
            held[move["target"]].add((move["layer"], move["expert"]))
        for free in phase["frees"]:
            held[free["device"]].remove((free["layer"], free["expert"]))
    assert held == {name: set(keys) for name, keys in walk.goal.items()}
