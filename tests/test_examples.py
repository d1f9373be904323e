"""The demo's model and its quick run, the short example, and the slow-link benchmark's network."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

RANKS = 2


def load(path: Path) -> ModuleType:
    """The script at ``path`` as a module, without a change of ``sys.path``."""
    spec = importlib.util.spec_from_file_location(f"test_examples_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpt(root: Path) -> ModuleType:
    return load(root / "examples" / "gpt.py")


@pytest.fixture(scope="module")
def network(root: Path) -> ModuleType:
    return load(root / "benchmarks" / "network.py")


@pytest.fixture
def model(gpt: ModuleType) -> nn.Module:
    """A tiny GPT whose branches are not zero, as they are at the start of a training."""
    model: nn.Module = gpt.GPT(gpt.GPTConfig(width=32, layers=2, heads=2, context=16))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


# ---- the model -----------------------------------------------------------------------------------


def test_a_byte_changes_its_own_and_later_logits_only(model: nn.Module) -> None:
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 256

    before, after = model(tokens), model(changed)

    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all()


def test_rotary_scores_depend_on_the_distance_only(gpt: ModuleType) -> None:
    query, key = torch.randn(2, 1, 1, 1, 8)
    rotation = gpt.rotary_angles(16, 8)
    rotated_query = gpt.rotate(query.expand(1, 1, 16, 8), rotation)[0, 0]
    rotated_key = gpt.rotate(key.expand(1, 1, 16, 8), rotation)[0, 0]

    score = rotated_query @ rotated_key.T

    for distance in range(-15, 16):
        diagonal = score.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(score[0, 0], score[0, 5])


def test_training_starts_with_branches_that_add_nothing(gpt: ModuleType) -> None:
    model = gpt.GPT(gpt.GPTConfig(width=32, layers=2, heads=2, context=16))
    tokens = torch.randint(256, (1, 16))

    assert torch.equal(model(tokens), model.head(model.norm(model.embedding(tokens))))


def test_heads_that_do_not_divide_over_the_ranks_are_refused(
    gpt: ModuleType, model: nn.Module
) -> None:
    with pytest.raises(ValueError, match="2 heads do not divide over 3 ranks; choose a divisor"):
        gpt.parallelize(model, SimpleNamespace(size=lambda: 3))


PARALLEL = """
import sys
import torch, torch.distributed as dist
from gpt import GPT, GPTConfig, parallelize
from torch.distributed.device_mesh import init_device_mesh

folder, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
model = GPT(GPTConfig(width=32, layers=2, heads=2, context=16))
model.load_state_dict(torch.load(f"{folder}/model.pt"))
parallelize(model, init_device_mesh("cpu", (ranks,)))
logits = model(torch.load(f"{folder}/tokens.pt"))
logits.square().mean().backward()
gradients = {}
for name, parameter in model.named_parameters():
    gradient = parameter.grad
    gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
torch.save((logits, gradients), f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_parallel_model_computes_what_the_model_computes(
    model: nn.Module, root: Path, tmp_path: Path
) -> None:
    tokens = torch.randint(256, (3, 16))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(tokens, tmp_path / "tokens.pt")
    environment = {**os.environ, "PYTHONPATH": str(root / "examples")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PARALLEL, str(tmp_path), str(rank), str(RANKS)], env=environment
        )
        for rank in range(RANKS)
    ]
    assert [process.wait(120) for process in processes] == [0] * RANKS

    logits: Tensor = model(tokens)
    logits.square().mean().backward()

    for rank in range(RANKS):
        their_logits, gradients = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(their_logits, logits)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


# ---- the demo ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_quick_demo_trains_with_every_all_reduce_at_4_bits(root: Path, tmp_path: Path) -> None:
    script = root / "examples" / "train_tensor_parallel.py"
    command = [sys.executable, str(script), "--quick", "--out", str(tmp_path)]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )

    assert run.returncode == 0, run.stderr
    assert "bit-identical on all ranks" in run.stdout
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    exact, four = map(json.loads, lines)
    assert (exact["bits"], four["bits"]) == (None, 4)
    assert exact["wire_bytes"] == exact["exact_bytes"] == four["exact_bytes"]
    assert exact["num_quantized"] == 0
    assert four["num_quantized"] == four["num_sites"] == exact["num_sites"] == 8  # 2 blocks x 4
    assert 7.0 < four["exact_bytes"] / four["wire_bytes"] < 8.0  # 32 bits to 4 and a scale
    for row in (exact, four):
        assert row["losses"][-1] < row["losses"][0] - 1
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# ---- data parallel -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_data_parallel_example_trains_with_4_bit_gradients(root: Path) -> None:
    script = root / "examples" / "train_ddp.py"
    assert len(script.read_text().splitlines()) < 60
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--bits", "4", "--error-feedback", "--steps", "20"]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    run = subprocess.run(
        [*torchrun, f"--nproc-per-node={RANKS}", str(script), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert run.returncode == 0, run.stderr  # it compares the ranks' parameters, too
    first, second = (float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stdout))
    assert second < first < 5
    assert "3 of 3 sites quantized, 525.57 kB -> 67.98 kB sent by each rank" in run.stdout
    assert "note: 15 of 15 parameters quantized" in run.stdout


# ---- pipeline parallel ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_adapters_example_learns_and_stores_a_few_kilobytes(root: Path) -> None:
    script = root / "examples" / "adapters.py"
    result = subprocess.run(
        [sys.executable, str(script), "--steps", "20"],
        cwd=root, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(script.read_text().splitlines()) <= 60
    assert "8 adapters in 4 bits, kmeans: 32,768 ->" in result.stdout
    size = re.search(r"(\d+) bytes on disk", result.stdout)
    assert size is not None
    assert int(size[1]) < 32_768 / 3


def test_the_pipeline_example_trains_with_4_bits_in_both_directions(root: Path) -> None:
    script = root / "examples" / "train_pipeline.py"
    assert len(script.read_text().splitlines()) < 60
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    run = subprocess.run(
        [*torchrun, f"--nproc-per-node={RANKS}", str(script), "--bits", "4", "--steps", "20"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=180,
    )

    assert run.returncode == 0, run.stderr
    first, second = (float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stdout))
    assert second < first < 5
    line = "1 of 1 sites quantized, 262.14 kB -> 33.79 kB sent by each rank (7.76x less)"
    assert run.stdout.count(line) == RANKS  # activations from one, gradients from the other
    assert "forward send  stages.0" in run.stdout
    assert "backward send  stages.1" in run.stdout


# ---- sharded -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_fsdp2_example_trains_with_weight_differences(root: Path) -> None:
    script = root / "examples" / "train_fsdp2.py"
    assert len(script.read_text().splitlines()) < 60
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--bits", "4", "--weight-delta", "--steps", "20"]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    run = subprocess.run(
        [*torchrun, f"--nproc-per-node={RANKS}", str(script), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=180,
    )

    assert run.returncode == 0, run.stderr
    first, second = (float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stdout))
    assert second < first < 5
    assert "8 of 8 sites quantized, 722.69 kB -> 68.00 kB sent by each rank" in run.stdout


# ---- the network of the benchmark ----------------------------------------------------------------

PROC_NET_DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop
    lo: 1111 11 0 0 0 0 0 0 2222 22 0 0 0 0 0 0
  eth0: 3333 33 0 0 0 0 0 0 4444 44 0 0 0 0 0 0
"""


def test_sent_bytes_reads_the_transmit_column_of_eth0(network: ModuleType) -> None:
    assert network.sent_bytes(PROC_NET_DEV) == 4444


def test_sent_bytes_without_eth0_is_an_error(network: ModuleType) -> None:
    with pytest.raises(network.NetworkError, match="no line for eth0"):
        network.sent_bytes(PROC_NET_DEV.replace("eth0", "eth1"))


def test_slow_link_without_its_tools_says_so_and_succeeds(root: Path, tmp_path: Path) -> None:
    script = root / "benchmarks" / "slow_link.py"
    out = tmp_path / "slow_link.jsonl"
    run = subprocess.run(
        [sys.executable, str(script), "--quick", "--out", str(out)],
        env={"PATH": str(tmp_path)},  # no ip, no tc
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("slow_link: skipped: it needs root") or (
        run.stdout == "slow_link: skipped: ip and tc not found; install iproute2.\n"
    )
    assert not out.exists()


def test_the_companions_example_asks_for_all_of_them_at_once(root: Path) -> None:
    run = subprocess.run(
        [sys.executable, "examples/companions.py", "--steps", "3"],
        cwd=root, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "4 of 4 residual adds rewritten: free" in run.stdout
    assert "2 attentions: s^3, scale learned" in run.stdout
    assert "tokens grayed at 1 of 1 places: dct, 0.9" in run.stdout
    assert "after 3 steps" in run.stdout


def test_a_network_carries_bytes_at_its_rate_and_leaves_nothing(network: ModuleType) -> None:
    if reason := network.available():
        pytest.skip(f"NOT TESTED HERE: {reason}")
    receive = (
        "import socket; s = socket.create_server(('', 5000)); print('ready', flush=True); "
        "c = s.accept()[0]\nwhile c.recv(1 << 20): pass"
    )
    send = (
        "import socket, time; t = time.perf_counter(); "
        "s = socket.create_connection(('10.77.0.2', 5000)); s.sendall(bytes(2_000_000)); "
        "s.shutdown(socket.SHUT_WR); s.recv(1); print(time.perf_counter() - t)"
    )
    pipe = {"stdout": subprocess.PIPE}
    with network.Network(hosts=2, rate="40mbit") as hosts:
        receiver = hosts.run(1, [sys.executable, "-c", receive], **pipe)
        assert receiver.stdout.readline() == "ready\n"
        seconds = float(hosts.run(0, [sys.executable, "-c", send], **pipe).communicate()[0])
        receiver.communicate()
        sent = hosts.sent_bytes(0)
        idle = hosts.run(0, ["sleep", "600"])
        names = {hosts.switch, *hosts.names}

    assert seconds > 0.3  # 2 MB at 40 Mbit take 0.4 s; the first 128 kB pass at once
    assert 2_000_000 < sent < 2_200_000
    assert idle.poll() is not None
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not names & set(namespaces.split())
