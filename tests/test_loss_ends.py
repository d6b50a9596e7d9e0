"""Weighted losses beyond one batch in float32: precisions, weights at their ends, processes."""

from __future__ import annotations

import json
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from builders import (
    CLASSES,
    FASTEST,
    KEYPOINTS,
    NAMES,
    WEIGHTS,
    assert_identical,
    batch,
    build,
    losses_of,
    step,
    twin,
    with_known_features,
)
from torch.nn.parallel import DistributedDataParallel

from detmix import mixup, weight_losses

FAMILIES = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos", FASTEST[1])
TINY = (1e-6, 1e-30)
# Their samples all belong to objects; divided by the sum of the weights they are means, which do
# not fall with the weights.
OF_OBJECTS = {"loss_mask", "loss_keypoint"}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """A small detector of each family."""
    if request.param in FASTEST:
        return with_known_features(build(request.param))
    from detmix.detectors import BackboneConfig, DetectorConfig, build_detector

    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 96, "anchor_sizes": (16, 32, 64)}
    rcnn = {"head_dim": 32, "options": {"rpn_post_nms_top_n_train": 30}}
    detector = build_detector(
        DetectorConfig(name=request.param, **sizes, **(rcnn if "rcnn" in request.param else {})),
        BackboneConfig("resnet18", fpn_channels=32, levels=(1, 2), norm="group"),
        CLASSES,
        **({"num_keypoints": KEYPOINTS} if "keypoint" in request.param else {}),
    )
    return detector.train()


def assert_finite(losses, grads):
    assert all(bool(torch.isfinite(value).all()) for value in (*losses.values(), *grads.values()))


def assert_close(ours, theirs, rtol, scale=None):
    """Compare tensors with a tolerance relative to the largest entry of all: many sums cancel."""
    largest = max(float(value.abs().max()) for value in (scale or theirs).values())
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=rtol * largest)


@pytest.mark.parametrize("normalizer", ["samples", "weights"])
def test_small_weights_leave_the_background(model, normalizer):
    """All objects of the batch weigh nearly nothing: losses and gradients are those at 0."""
    weight_losses(model, normalizer=normalizer)
    limit, limit_grads, _ = step(model, batch("objects", 0.0))
    _, heavier_grads, _ = step(model, batch("objects", 1e-3))
    assert sum(limit.values()) > 0
    means = OF_OBJECTS & limit.keys() if normalizer == "weights" else set()
    for weight in TINY:
        losses, grads, _ = step(model, batch("objects", weight))
        assert_finite(losses, grads)
        for name in losses.keys() - means:
            assert float(losses[name]) == pytest.approx(float(limit[name]), rel=1e-4, abs=1e-3)
        if not means:  # linear in weights as small as these
            assert_close(grads, limit_grads, 2e-3, scale=heavier_grads)


def test_a_mean_of_small_weights(model):
    """No background: an R-CNN's losses are weighted means, the others' fade out with the weights.

    A mean whose weights add up to less than float32's epsilon fades out too: 0 / 0 has no limit.
    """
    weight_losses(model, background_weight=0.0, normalizer="weights")
    factor = 1 if hasattr(model, "roi_heads") else 10
    small, grads, _ = step(model, batch("objects", 1e-6))
    other, other_grads, _ = step(model, batch("objects", 1e-5))
    for name, loss in small.items():
        assert loss > 0
        assert float(other[name]) == pytest.approx(factor * float(loss), rel=1e-4)
    assert_close({name: factor * grad for name, grad in grads.items()}, other_grads, 1e-4)
    for weight in (1e-20, 0.0):
        losses, grads, _ = step(model, batch("objects", weight))
        assert_finite(losses, grads)
        assert all(0 <= value.abs().max() < 1e-9 for value in (*losses.values(), *grads.values()))


@pytest.mark.parametrize("half_precision", [False, True])
def test_a_larger_batch_equals_torchvision_bit_for_bit(model, half_precision):
    """The order of a sum may change with its length, and its dtype with autocast."""
    plain = twin(model)
    for module in plain.modules():
        if type(module).__module__.startswith("detmix.losses"):
            module.__class__ = type(module).__base__
    (images, targets), (_, others) = batch(), batch("half")
    data = images * 3, [*targets, *others, *targets]
    with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
        expected = step(plain, data)
        assert_identical(step(weight_losses(twin(plain)), data), expected)


@pytest.mark.parametrize(("background_weight", "normalizer"), [(0.0, "weights"), (1.0, "samples")])
def test_bf16(model, background_weight, normalizer):
    """Next to nothing is next to nothing there too, and what is left is the background."""
    weight_losses(model, background_weight, normalizer)
    exact = losses_of(model, batch("objects", 0.0))
    for weight in TINY:
        with torch.autocast("cpu", torch.bfloat16):
            losses, grads, _ = step(model, batch("objects", weight))
        assert_finite(losses, grads)
        assert grads.keys() == dict(model.named_parameters()).keys()
        for name, loss in losses.items():
            assert loss >= 0
            if background_weight == 0:
                assert weight > 1e-30 or loss < 1e-12
            elif name not in OF_OBJECTS:
                assert float(loss) == pytest.approx(exact[name].item(), rel=0.05, abs=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 is trained with on a GPU")
@pytest.mark.parametrize("normalizer", ["samples", "weights"])
@pytest.mark.parametrize("background_weight", [0.0, 1.0])
def test_fp16(model, background_weight, normalizer):
    """With the loss scaled up, as it is in training, so that gradients do not vanish."""
    if hasattr(model.backbone, "features"):
        pytest.skip("its features are known on the CPU")
    network = weight_losses(twin(model), background_weight, normalizer).cuda()
    for weight in (0.0, *TINY, 0.3):
        images, targets = batch("objects", weight)
        targets = [{key: value.cuda() for key, value in target.items()} for target in targets]
        network.zero_grad()
        with torch.autocast("cuda", torch.float16):
            losses = network([image.cuda() for image in images], targets)
        scaler = torch.amp.GradScaler("cuda", init_scale=128.0)
        scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        assert_finite(losses, grads)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_pair_mixed_at_a_ratio_of_0_or_1_has_torchvision_s_losses_of_one_image(lam):
    """What is left is the one image's objects, at full weight."""
    (image_a, image_b), (target_a, target_b) = batch()
    image, target = mixup(image_a, target_a, image_b, target_b, lam)
    network, alone = build(FASTEST[0]), (target_b, target_a)[int(lam)]
    expected = losses_of(network, ([image] * 2, [alone] * 2))
    assert_identical(losses_of(weight_losses(network), ([image] * 2, [target] * 2)), expected)


@pytest.mark.slow
def test_compiled_backbone():
    """Compiled after or before weighting; the backend runs the traced operations as they are."""
    plain, data, graphs = build(FASTEST[0]), batch("objects", WEIGHTS), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = step(weight_losses(twin(plain)), data)
    torch._dynamo.reset()
    after, before = weight_losses(twin(plain)), twin(plain)
    for model in (after, before):
        model.backbone = torch.compile(model.backbone, backend=backend)
    losses, grads, random_state = step(after, data)
    assert graphs
    grads = {name.replace("._orig_mod", ""): grad for name, grad in grads.items()}
    assert_identical((losses, grads, random_state), expected)
    assert_identical(losses_of(weight_losses(before), data), expected[0])
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
    store = (folder / "store").as_uri()
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
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
