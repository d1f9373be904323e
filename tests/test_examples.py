"""The examples' model, those of one machine, and the slow-link benchmark's network.

tests/distributed/test_examples.py has the examples that need several ranks.
"""

from __future__ import annotations

import importlib.util
import io
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import nn


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


# ---- one machine ---------------------------------------------------------------------------------


def printed_by(script: Path, *options: str) -> str:
    """What the script prints, here and now."""
    with (
        patch.object(sys, "argv", [str(script), *options]),
        patch.object(sys, "path", [str(script.parent), *sys.path]),
        redirect_stdout(io.StringIO()) as printed,
    ):
        runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()


def test_the_adapters_example_learns_and_stores_a_few_kilobytes(root: Path) -> None:
    script = root / "examples" / "adapters.py"
    printed = printed_by(script, "--steps", "20")
    assert len(script.read_text().splitlines()) <= 60
    assert "8 adapters in 4 bits, kmeans: 32,768 ->" in printed
    size = re.search(r"(\d+) bytes on disk", printed)
    assert size is not None
    assert int(size[1]) < 32_768 / 3


@pytest.mark.slow
def test_the_companions_example_asks_for_all_of_them_at_once(root: Path) -> None:
    printed = printed_by(root / "examples" / "companions.py", "--steps", "3")
    assert "4 of 4 residual adds rewritten: free" in printed
    assert "2 attentions: s^3, scale learned" in printed
    assert "tokens grayed at 1 of 1 places: dct, 0.9" in printed
    assert "after 3 steps" in printed


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


@pytest.mark.slow
def test_slow_link_without_its_tools_says_so_and_succeeds(root: Path, tmp_path: Path) -> None:
    script = root / "benchmarks" / "slow_link.py"
    out = tmp_path / "slow_link.jsonl"
    run = subprocess.run(
        [sys.executable, str(script), "--quick", "--out", str(out)],
        env={"PATH": str(tmp_path), "PYTHONPATH": str(root)},  # no ip, no tc
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("slow_link: skipped: it needs root") or (
        run.stdout == "slow_link: skipped: ip and tc not found; install iproute2.\n"
    )
    assert not out.exists()


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
