"""What `weight_losses` guarantees beyond one process and full precision.

With the detectors that torchvision builds, as in the contract.
"""

from __future__ import annotations

import json
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from builders import (
    FASTEST,
    NAMES,
    WEIGHTS,
    assert_identical,
    batch,
    build,
    losses_of,
    step,
    twin,
)
from torch.nn.parallel import DistributedDataParallel

from detmix import weight_losses


def always(names):
    """Run a test with these detectors always, and with all the others by ``-m slow``."""
    params = [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
    return pytest.mark.parametrize("plain", params, indirect=True)


@pytest.fixture(scope="module", params=NAMES)
def plain(request):
    """A detector as torchvision builds it, in training. Tests change copies only."""
    return build(request.param)


@always(FASTEST)
def test_bf16_autocast_equals_torchvision_bit_for_bit(plain):
    """With images so large that no map convolved with stride 2 is 1 x 1.

    Of those torch leaves a part of the gradient of the convolution's weights uninitialised.
    """
    large = twin(plain)
    large.transform.min_size, large.transform.max_size = (72,), 96
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(twin(large), batch())
        assert_identical(step(weight_losses(twin(large)), batch("objects", 1.0)), expected)


@always(FASTEST[:1])
def test_compiled_backbone(plain):
    """Compiled after or before weighting; the backend runs the traced operations as they are."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    data = batch("objects", WEIGHTS)
    expected = step(weight_losses(twin(plain)), data)
    torch._dynamo.reset()
    after, before = weight_losses(twin(plain)), twin(plain)
    for model in (after, before):
        model.backbone = torch.compile(model.backbone, backend=backend)
    weight_losses(before)
    losses, grads, random_state = step(after, data)
    assert graphs
    grads = {name.replace("._orig_mod", ""): grad for name, grad in grads.items()}
    assert_identical((losses, grads, random_state), expected)
    assert_identical(losses_of(before, data), expected[0])
    torch._dynamo.reset()


def check_distributed(name, rank):
    """One step of this process's share and the next forward pass; the second has no objects."""
    data = batch(("objects", "none")[rank], WEIGHTS)
    model = weight_losses(build(name))
    _, grads, _ = step(twin(model), data)
    for grad in grads.values():
        dist.all_reduce(grad)
    wrapped = DistributedDataParallel(model)
    _, reduced, _ = step(wrapped, data)
    wrapped(*data)  # refused if a parameter had no part in the step before
    assert grads.keys() == dict(model.named_parameters()).keys()
    for key, total in grads.items():
        torch.testing.assert_close(reduced[f"module.{key}"], total / 2, rtol=1e-6, atol=1e-9)


def work(rank, names, folder):
    """Be one of two processes; write what failed, by detector."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    report = {}
    for name in names:
        try:
            check_distributed(name, rank)
            report[name] = "as one"
        except Exception:
            report[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "names", [FASTEST, pytest.param(NAMES, marks=pytest.mark.slow)], ids=["fastest", "all"]
)
def test_distributed_gradients_are_the_mean_of_the_processes(names, tmp_path):
    mp.spawn(work, (names, tmp_path), nprocs=2)
    for rank in range(2):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert report == dict.fromkeys(names, "as one"), "\n".join(report.values())
