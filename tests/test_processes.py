"""A training on two processes is the training on one: these are real ones, over gloo."""

from __future__ import annotations

import os
import re
import shutil
import signal
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState
from runs import StoppingMixin
from tiny import read_metrics, tiny_config

from detmix.data import write_shapes
from detmix.data.loaders import train_loader
from detmix.mixing import DetectionMixUp
from detmix.training import DetectorTrainer, Interrupted, load_checkpoint
from detmix.training.stopping import NonFiniteLossError, OtherProcessError

PLAIN_SGD = ("optim.name=sgd", "optim.momentum=0.9", "schedule.warmup_steps=0")
# Its loss is the mean over images of what each has by itself, and it samples nothing.
RETINANET = (
    "detector.name=retinanet", "detector.roi_sampling_ratio=null", "detector.head_dim=null",
    "detector.options={score_thresh: 0.01, detections_per_img: 30}", "mixing.p=0.7", "epochs=2",
    "optim.lr=0.005",
)  # fmt: skip
RESUMED_AFTER = 3  # between two lines of the log


@pytest.fixture(scope="module")
def roots(shapes_root, tmp_path_factory):
    """Return the images to train on, and others."""
    other = write_shapes(tmp_path_factory.mktemp("other"), num_train=24, num_test=6, image_size=64)
    return shapes_root, other


class Recorder(StoppingMixin, DetectorTrainer):
    """Keeps what it trains on, and the first step's gradients; meets a NaN where it is told to."""

    nan_in = ()  # steps

    def __init__(self, config):
        self.seen, self.grads = [], {}
        super().__init__(config)

    def compute_losses(self, batch):
        samples = list(zip(*batch, strict=True))
        self.seen.append({int(sample[1]["image_id"]): sample for sample in samples})
        losses = super().compute_losses(batch)
        if self.position.step in self.nan_in:
            losses["loss_objectness"] = losses["loss_objectness"] * float("nan")
        return losses

    def _step(self, batch, **kwargs):
        result = super()._step(batch, **kwargs)
        if not self.grads:
            named = self.plain_model.named_parameters()
            self.grads = {n: p.grad.clone() for n, p in named if p.grad is not None}
        return result


def trainer_of(root, run_dir, num_processes, *overrides):
    trainer = Recorder(
        tiny_config(
            root, run_dir, *PLAIN_SGD, "mixing.place=dataset", "backbone.norm=group",
            f"data.batch_size={4 // num_processes}", *overrides,
        )
    )  # fmt: skip
    assert trainer.accelerator.num_processes == num_processes
    return trainer


def train(*args):
    """Train; return what is to be the same with any number of processes."""
    trainer = trainer_of(*args)
    result = trainer.fit()
    weights = {n: v.clone() for n, v in trainer.plain_model.state_dict().items()}
    return {
        "seen": trainer.seen,
        "grads": trainer.grads,
        "weights": weights,
        "mean_ap": result.mean_ap,
    }


def end_early(root, run_dir, num_processes, rank, kind):
    """Train until process 1 alone meets a loss that is not finite, or an image it cannot read."""
    trainer = trainer_of(root, run_dir, num_processes, "eval_every=9")
    if rank == 1 and kind == "failed":
        trainer.nan_in = (3,)
    read = trainer._data._read_image

    def broken(index):
        if rank == 1 and kind == "broken" and trainer.position.step == 2:  # a batch ahead
            raise ValueError(f"sample {index}: broken")
        return read(index)

    trainer._data._read_image = broken
    with pytest.raises((ValueError, OtherProcessError, NonFiniteLossError)) as caught:
        trainer.fit()
    return {
        "error": (type(caught.value).__name__, str(caught.value)),
        "names": [trainer._data.names[index] for index in trainer.seen[-1]],
        "step": trainer.position.step,
        "model": {n: v.clone() for n, v in trainer.plain_model.state_dict().items()},
    }


def stop_in_evaluation(root, run_dir, num_processes, rank):
    """Train until process 1 alone gets a signal while it evaluates."""
    trainer = trainer_of(root, run_dir, num_processes)
    trainer.in_evaluation = 1 if rank == 1 else None
    with pytest.raises(Interrupted) as caught:
        trainer.fit()
    return caught.value.signum, trainer.position.step


def disagree(roots, folder, num_processes, rank):
    """Begin in each process with another checkpoint, other images, another configuration."""
    root, found = roots[0], []
    cases = {
        "checkpoint": (root, ["resume=auto"]),
        "model": (root, [], ["backbone.fpn_channels=32"]),
        "images": (roots[rank], []),
        "configuration": (root, [], ["seed=3"]),
    }
    for name, (data, *overrides) in cases.items():
        # the folder of process 0 alone has a checkpoint
        run_dir = folder / str(rank) / ("resumed" if name == "checkpoint" and not rank else name)
        options = overrides[min(rank, len(overrides) - 1)]
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            trainer_of(data, run_dir, num_processes, *RETINANET, *options)
        found.append(str(caught.value))
    return found


def work(rank, roots, folder):
    """Be one of two processes; each is given a folder of its own to show who writes."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # wanted, though not used
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    runs, found = folder / str(rank), {}
    try:
        root = roots[0]
        found["whole"] = train(root, runs / "whole", 2, *RETINANET)
        found["resumed"] = train(root, runs / "resumed", 2, *RETINANET, "resume=auto")
        for kind in ("failed", "broken"):
            found[kind] = end_early(root, runs / kind, 2, rank, kind)
        found["stopped"] = stop_in_evaluation(root, runs / "stopped", 2, rank)
        found["disagreed"] = disagree(roots, folder, 2, rank)
    except Exception:
        found["traceback"] = traceback.format_exc()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one(roots, tmp_path_factory):
    """What the run on one process came to, and its folder."""
    folder = tmp_path_factory.mktemp("one") / "whole"
    AcceleratorState._reset_state(True)
    return train(roots[0], folder, 1, *RETINANET), folder


@pytest.fixture(scope="module")
def two(roots, tmp_path_factory):
    """What the runs on two processes came to in each, and the folder with their folders."""
    folder = tmp_path_factory.mktemp("two")
    AcceleratorState._reset_state(True)
    stopped = trainer_of(roots[0], folder / "0" / "resumed", 1, *RETINANET)
    stopped.in_step = RESUMED_AFTER
    with pytest.raises(Interrupted):
        stopped.fit()
    shutil.copytree(folder / "0" / "resumed", folder / "1" / "resumed")
    # Not forked: the threads that other tests have left in this process would hang that.
    mp.start_processes(work, (roots, folder), 2, start_method="spawn")
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for of_process in found:
        assert "traceback" not in of_process, of_process["traceback"]
    return found, folder


def assert_rounded(ours, theirs, rtol):
    """Compare tensors by name, with a tolerance relative to the norm of all."""
    assert ours.keys() == theirs.keys()
    total = torch.stack([value.double().norm() for value in theirs.values()]).norm()
    for name, value in theirs.items():
        distance = (ours[name].double() - value.double()).norm()
        assert distance <= rtol * total, name
    assert total > 0


def test_a_global_batch_is_the_same(one, two):
    """Images, augmentation, partners and ratios, bit for bit; each image in one process only."""
    (alone, _), (parts, _) = one, two
    shares = [part["whole"]["seen"] for part in parts]
    assert len(alone["seen"]) == len(shares[0]) == len(shares[1])
    mixed = 0
    for whole, mine, others in zip(alone["seen"], *shares, strict=True):
        assert len(mine) == len(others) == 2
        joined = mine | others
        assert joined.keys() == whole.keys()
        for image_id, (image, target) in whole.items():
            torch.testing.assert_close(joined[image_id], (image, target), rtol=0, atol=0)
            mixed += bool((target["box_weights"] < 1).any())
    assert mixed > len(shares[0])


def test_gradients_and_weights_are_the_same(one, two):
    (alone, _), (parts, _) = one, two
    for part in parts:
        assert_rounded(part["whole"]["grads"], alone["grads"], 1e-5)
        assert_rounded(part["whole"]["weights"], alone["weights"], 1e-6)
    for key, value in parts[0]["whole"]["weights"].items():
        assert torch.equal(value, parts[1]["whole"]["weights"][key]), "the processes agree"


def test_scores_and_logged_losses_are_the_same(one, two):
    (alone, folder), (parts, folders) = one, two
    expected = [m for m in read_metrics(folder) if m["event"] == "eval"]
    found = [m for m in read_metrics(folders / "0" / "whole") if m["event"] == "eval"]
    assert [m["step"] for m in found] == [m["step"] for m in expected]
    for metrics, others in zip(found, expected, strict=True):
        for key in metrics.keys() - {"seconds"}:
            assert metrics[key] == pytest.approx(others[key], abs=1e-6)
    assert {part["whole"]["mean_ap"] for part in parts} == {found[-1]["mean_ap"]}
    assert alone["mean_ap"] > 0
    assert_same_log(folders / "0" / "whole", folder)


def assert_same_log(run_dir, other):
    found, expected = (
        [m for m in read_metrics(folder) if m.pop("event") == "train"]
        for folder in (run_dir, other)
    )
    assert len(found) == len(expected) > 2
    for metrics, others in zip(found, expected, strict=True):
        for key in metrics.keys() - {"images_per_s"}:
            assert metrics[key] == pytest.approx(others[key], rel=1e-4), key


def test_a_run_on_one_process_goes_on_on_two(one, two):
    (alone, folder), (parts, folders) = one, two
    for part in parts:
        assert len(part["resumed"]["seen"]) == len(alone["seen"]) - RESUMED_AFTER
        assert_rounded(part["resumed"]["weights"], alone["weights"], 1e-6)
        assert part["resumed"]["mean_ap"] == pytest.approx(alone["mean_ap"], abs=1e-6)
    assert_same_log(folders / "0" / "resumed", folder)


def test_only_the_first_process_writes(two):
    folders = two[1]
    written = {"whole", "resumed", "failed", "broken", "stopped"}
    assert {path.name for path in (folders / "0").iterdir()} == written
    assert {path.name for path in (folders / "1").iterdir()} == {"resumed"}  # a copy, to be read
    step = load_checkpoint(folders / "1" / "resumed" / "last.pt")["position"]["step"]
    assert step == RESUMED_AFTER
    assert len(read_metrics(folders / "1" / "resumed")) == RESUMED_AFTER // 2


@pytest.mark.parametrize("kind", ["failed", "broken"])
def test_all_stop_where_one_does(two, kind):
    parts, folders = two
    first, second = (part[kind] for part in parts)
    assert first["step"] == second["step"] == 3
    state = load_checkpoint(folders / "0" / kind / "last.pt")
    assert state["position"]["step"] == 3
    for key, value in state["model"].items():
        assert torch.equal(value, first["model"][key])
        assert torch.equal(value, second["model"][key])


def test_the_error_of_one_is_told_by_all(two):
    (first, second), _ = two
    for part in (first, second):
        name, message = part["failed"]["error"]
        assert name == "NonFiniteLossError"
        assert re.search(r"at step 3 .*loss_\w+ nan", message)
        assert all(image in message for image in second["failed"]["names"])
        assert not any(image in message for image in first["failed"]["names"]), "these are fine"
    name, message = second["broken"]["error"]
    assert name == "ValueError"
    assert re.fullmatch(r"sample \d+: broken", message)
    assert first["broken"]["error"] == ("OtherProcessError", f"another process stops: {message}")


def test_a_signal_to_one_that_evaluates_stops_all(two):
    parts, folders = two
    assert {part["stopped"] for part in parts} == {(signal.SIGTERM, 6)}, "before the next epoch"
    state = load_checkpoint(folders / "0" / "stopped" / "last.pt")
    assert state["position"]["step"] == 6


def test_all_begin_alike_or_not_at_all(two):
    first, second = (part["disagreed"] for part in two[0])
    assert first == second
    names = ("the checkpoint to go on from", "backbone.fpn_channels", "the test images", "seed")
    for message, name in zip(first, names, strict=True):
        assert re.match(rf"the processes must agree on {name}: process 0 has \S+", message)
    assert re.search(r"'step': \d+.* process 1 has None", first[0])


def test_ratios_of_batches_do_not_depend_on_the_processes():
    """Only the partners are of the process's own share."""
    dataset = [sample(index) for index in range(24)]
    ratios = []
    for num_processes in (1, 2, 3):
        found = {}
        for rank in range(num_processes):
            loader = train_loader(
                dataset, 12 // num_processes, seed=3, workers=0, rank=rank,
                num_processes=num_processes, mix=DetectionMixUp(p=0.7),
            )  # fmt: skip
            for _, targets in loader:
                ids = {int(target["image_id"]) for target in targets}
                for target in targets:
                    found[int(target["image_id"])] = target["box_weights"][0].item()
                    assert set(target["labels"].tolist()) <= ids
        ratios.append(found)
    assert len(ratios[0]) == 24
    assert len(set(ratios[0].values())) > 12
    assert ratios[1:] == ratios[:1] * 2


def sample(index):
    """An image of one object, whose label says which it is."""
    target = {
        "boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]),
        "labels": torch.tensor([index]),
        "image_id": torch.tensor(index),
    }
    return torch.full((3, 8, 8), index, dtype=torch.uint8), target
