"""What `weight_losses` guarantees, one test each over every detector that torchvision builds.

The oracle is the same detector without weights. What needs narrow models or loops over anchors
is in the tests of the families.
"""

from __future__ import annotations

import copy
import io
import json
import statistics
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from builders import (
    CLASSES,
    FASTEST,
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
from torchvision.models.detection import fcos, retinanet, roi_heads, rpn, ssd

from detmix import weight_losses

HAVE_BACKGROUND = ("loss_objectness", "loss_classifier", "classification")


def always(names):
    """Run a test with these detectors always, and with all the others by ``-m slow``."""
    params = [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
    return pytest.mark.parametrize("plain", params, indirect=True)


@pytest.fixture(scope="module", params=NAMES)
def plain(request):
    """A detector as torchvision builds it, in training. Tests change copies only."""
    return build(request.param)


@pytest.fixture(scope="module")
def headed(plain):
    """The same with known features, for tests of heads and losses."""
    return with_known_features(plain)


@pytest.fixture(scope="module")
def plain_losses(headed):
    """What torchvision makes of the batch with all objects."""
    return losses_of(twin(headed), batch())


def weighted(model, **settings):
    return weight_losses(twin(model), **settings)


def parts_of(model):
    """The modules whose class `weight_losses` has replaced, by name."""
    return {n: m for n, m in model.named_modules() if type(m).__module__.startswith("detmix")}


def clear(model):
    for value in model.state_dict().values():
        value.zero_()


def test_there_are_twelve():
    assert len(NAMES) >= 12
    assert set(FASTEST) < set(NAMES)


def check_all_weights_one(plain, kind, weights):
    expected = step(twin(plain), batch(kind))
    assert all(torch.isfinite(loss) for loss in expected[0].values())
    assert kind == "none" or all(loss > 0 for loss in expected[0].values())
    assert expected[1].keys() == dict(plain.named_parameters()).keys()
    assert_identical(step(weighted(plain), batch(kind, weights)), expected)


def test_all_weights_one_equal_torchvision_bit_for_bit(plain):
    """Losses, every gradient and the random state; one image of two has no objects."""
    check_all_weights_one(plain, "half", 1.0)


@always(FASTEST)
@pytest.mark.parametrize(("kind", "weights"), [("objects", None), ("none", 1.0)])
def test_all_weights_one_for_other_batches(plain, kind, weights):
    """All images have objects, without ``box_weights``, or none has."""
    check_all_weights_one(plain, kind, weights)


@always(FASTEST)
def test_bf16_autocast_equals_torchvision_bit_for_bit(plain):
    """With images so large that no map convolved with stride 2 is 1 x 1.

    Of those torch leaves a part of the gradient of the convolution's weights uninitialised.
    """
    large = twin(plain)
    large.transform.min_size, large.transform.max_size = (72,), 96
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(twin(large), batch())
        assert_identical(step(weighted(large), batch("objects", 1.0)), expected)


def test_losses_are_linear_in_the_weights(headed, plain_losses):
    """Weights that add up to ones give losses that add up to torchvision's.

    For an SSD that is so only if the weights have no part in the choice of negatives.
    """
    model = weighted(headed)

    def losses(weights, background_weight):
        weight_losses(model, background_weight=background_weight)
        return losses_of(model, batch("objects", weights))

    rest = [[1 - weight for weight in row] for row in WEIGHTS]
    first, second = losses(WEIGHTS, 0.35), losses(rest, 0.65)
    scaled = losses([[0.3 * weight for weight in row] for row in WEIGHTS], 0.3 * 0.35)
    for key, loss in plain_losses.items():
        assert 0 < first[key] < loss
        torch.testing.assert_close(first[key] + second[key], loss, rtol=2e-6, atol=0)
        torch.testing.assert_close(scaled[key], 0.3 * first[key], rtol=2e-6, atol=0)


def test_objects_and_background_add_up_to_torchvision(headed, plain_losses):
    """One object of each image at a time, then the background alone."""
    model = weighted(headed, background_weight=0.0)
    totals = dict.fromkeys(plain_losses, 0.0)
    for chosen in range(max(map(len, WEIGHTS))):
        weights = [[float(index == chosen) for index in range(len(row))] for row in WEIGHTS]
        losses = losses_of(model, batch("objects", weights))
        assert sum(losses.values()) > 0
        totals = {key: totals[key] + losses[key].item() for key in totals}
    weight_losses(model)
    for key, loss in losses_of(model, batch("objects", 0.0)).items():
        background = loss.item()
        assert (background > 0) == (key in HAVE_BACKGROUND)
        assert totals[key] + background == pytest.approx(plain_losses[key].item(), rel=1e-5)


def test_the_choice_of_samples_does_not_depend_on_the_weights(headed):
    """Sampled anchors, an SSD's mined ones too, are those whose scores have a gradient."""
    chosen = []
    for weights, background_weight in ((1.0, 1.0), (WEIGHTS, 0.1), (0.001, 7.0)):
        model = weighted(headed, background_weight=background_weight)
        head, outputs = (model.rpn.head if hasattr(model, "rpn") else model.head), []
        head.register_forward_hook(lambda *args, kept=outputs: kept.append(args[2]))
        losses = losses_of(model, batch("objects", weights))
        loss = (
            losses["loss_objectness"] if "loss_objectness" in losses else losses["classification"]
        )
        scores = outputs[0]["cls_logits"] if isinstance(outputs[0], dict) else outputs[0][0]
        grads = torch.autograd.grad(loss, scores)
        chosen.append([grad != 0 for grad in grads])
    assert any(part.any() for part in chosen[0])
    assert_identical(chosen[1:], chosen[:1] * 2)


@pytest.mark.parametrize(("kind", "background_weight"), [("half", 0.7), ("none", 0.0)])
def test_images_without_objects(headed, kind, background_weight):
    """And with no weight at all, where the sum of the weights must not divide."""
    model = weighted(headed, background_weight=background_weight, normalizer="weights")
    losses, grads, _ = step(model, batch(kind, WEIGHTS))
    assert all(torch.isfinite(loss) and loss >= 0 for loss in losses.values())
    assert any(losses.values()) == (background_weight > 0)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_state_and_evaluation_are_unchanged(plain):
    model = weight_losses(copy.deepcopy(plain), background_weight=0.5)
    assert_identical(model.state_dict(), plain.state_dict())
    for listing in ("named_parameters", "named_buffers", "named_modules"):
        names = [name for name, _ in getattr(plain, listing)()]
        assert [name for name, _ in getattr(model, listing)()] == names
    images = batch()[0][:1]
    with torch.no_grad():
        expected = twin(plain).eval()(images)
        assert len(expected[0]["boxes"]) > 0
        assert_identical(model.eval()(images), expected)


def test_only_parts_with_losses_are_replaced_and_only_once(plain, headed):
    model = copy.deepcopy(plain)
    assert weight_losses(model, background_weight=0.5) is model
    parts = parts_of(model)
    assert 1 <= len(parts) <= 2
    for name, module in model.named_modules():
        its = type(plain.get_submodule(name))
        assert type(module).__bases__ == (its,) if name in parts else type(module) is its
    before = {name: (type(part), dict(vars(part))) for name, part in parts.items()}
    weight_losses(model, background_weight=0.5)
    assert {name: (type(part), vars(part)) for name, part in parts_of(model).items()} == before

    model = weighted(headed, background_weight=0.5)
    losses = losses_of(model, batch("objects", WEIGHTS))
    weight_losses(model, background_weight=0.5)
    assert_identical(losses_of(model, batch("objects", WEIGHTS)), losses)
    weight_losses(model)
    again = losses_of(model, batch("objects", WEIGHTS))
    assert any(again[key] != losses[key] for key in losses)


def test_a_copy_is_independent(headed):
    model = weighted(headed, background_weight=0.4)
    expected = losses_of(model, batch("objects", WEIGHTS))
    other = copy.deepcopy(model)
    assert_identical(losses_of(other, batch("objects", WEIGHTS)), expected)
    clear(weight_losses(other, background_weight=0.0))
    assert_identical(losses_of(model, batch("objects", WEIGHTS)), expected)


def test_a_saved_model_is_the_same(headed):
    model = weighted(headed, background_weight=0.4)
    file = io.BytesIO()
    torch.save(model, file)
    expected = losses_of(model, batch("objects", WEIGHTS))
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert {n: type(m) for n, m in loaded.named_modules()} == {
        n: type(m) for n, m in model.named_modules()
    }
    assert_identical(losses_of(loaded, batch("objects", WEIGHTS)), expected)


def test_state_dicts_go_to_a_plain_detector_and_back(plain):
    other = copy.deepcopy(plain)
    clear(other)
    other.load_state_dict(weighted(plain).state_dict(), strict=True)
    assert_identical(other.state_dict(), plain.state_dict())
    clear(weight_losses(other))
    other.load_state_dict(plain.state_dict(), strict=True)
    assert_identical(other.state_dict(), plain.state_dict())


def test_other_models_and_settings_are_left_alone(headed):
    before = [vars(module).copy() for module in (fcos, retinanet, roi_heads, rpn, ssd)]
    other, model = twin(headed), copy.deepcopy(headed)
    types = {name: type(module) for name, module in other.named_modules()}
    frozen = [p.requires_grad_(False) for p in list(model.parameters())[::3]]
    calls = []
    for name in parts_of(weighted(headed)):
        model.get_submodule(name).register_forward_hook(lambda *_: calls.append("part"))
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    expected = losses_of(model, batch())
    calls_before = calls.copy()
    weight_losses(model, background_weight=0.0)
    assert losses_of(model, batch()) != expected
    assert calls == calls_before * 2
    assert not any(p.requires_grad for p in frozen)
    assert sum(not p.requires_grad for p in model.parameters()) == len(frozen)
    # Of the other model, and of torchvision, nothing has changed.
    assert {name: type(module) for name, module in other.named_modules()} == types
    assert_identical(losses_of(other, batch()), expected)
    assert [vars(module) for module in (fcos, retinanet, roi_heads, rpn, ssd)] == before


def test_the_device_stays(plain):
    model = weight_losses(copy.deepcopy(plain).to("meta"))
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("box_weights", torch.ones(2), r"'box_weights' of target 1 .*\(3,\).*got \(2,\)"),
        ("box_weights", torch.tensor([1, 1, -0.5]), "'box_weights' of target 1.*-0.5 for box 2"),
        ("box_weights", torch.tensor([1, torch.nan, 1]), "of target 1.* got nan for box 1"),
        ("labels", torch.tensor([1, 2, CLASSES]), rf"of target 1 .*1\.\.4 .*{CLASSES} for box 2"),
        ("labels", torch.tensor([0, 2, 3]), r"'labels' of target 1 .* got 0 for box 0"),
    ],
    ids=["length", "negative", "nan", "label above", "label 0"],
)
def test_errors_name_target_and_box(headed, key, value, message):
    images, targets = batch("objects", WEIGHTS)
    targets[1][key] = value
    with pytest.raises(ValueError, match=message):
        weighted(headed)(images, targets)


@always(FASTEST[:1])
def test_compiled_backbone(plain):
    """Compiled after or before weighting; the backend runs the traced operations as they are."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    data = batch("objects", WEIGHTS)
    expected = step(weighted(plain), data)
    torch._dynamo.reset()
    after, before = weighted(plain), twin(plain)
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


@pytest.mark.slow
def test_a_step_takes_no_longer(plain):
    """In processor time. The bound leaves room for noise; the ratio should be 1.02 at most."""
    models = {"plain": twin(plain), "weighted": weighted(plain)}
    seconds = {kind: [] for kind in models}
    data = batch("objects", WEIGHTS)
    for repetition in range(13):
        for kind in sorted(models, reverse=repetition % 2):  # each comes first half of the time
            start = time.process_time()
            step(models[kind], data)
            seconds[kind].append(time.process_time() - start)
    medians = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
    ratio = medians["weighted"] / medians["plain"]
    print(f"{medians['plain']:.3f} s plain, {medians['weighted']:.3f} s weighted: {ratio:.3f}")
    assert ratio < 1.15
