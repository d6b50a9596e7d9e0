"""A training from its configuration to the files of its run, and what its options do."""

from __future__ import annotations

import json
import re
import resource
import threading
from multiprocessing import get_context

import psutil
import pytest
import torch
from runs import Stopping, as_process, assert_same, copied, scalars
from tiny import STATEFUL, read_metrics, tiny_config

from detmix.files import temporary_path
from detmix.training import (
    DetectorTrainer,
    Interrupted,
    MixingConfig,
    NonFiniteLossError,
    TrainConfig,
    load_checkpoint,
    load_detector,
    parse_args,
)
from detmix.training.build import build_mixer, open_dataset, with_data_noted
from detmix.training.run_folder import RunFolder


@pytest.fixture
def trainer_for(shapes_root, tmp_path):
    return lambda *options, name="run", kind=DetectorTrainer: kind(
        tiny_config(shapes_root, tmp_path / name, *options)
    )


class TestFiles:
    def test_metrics_and_tensorboard(self, whole_run):
        metrics, points = read_metrics(whole_run), scalars(whole_run)
        assert [(m["event"], m["step"], m["epoch"]) for m in metrics] == [
            ("train", 2, 0.6667), ("eval", 3, 1), ("train", 4, 1.3333), ("train", 6, 2),
            ("eval", 6, 2),
        ]  # fmt: skip
        for event in ("train", "eval"):
            of_event = [line for line in metrics if line["event"] == event]
            for name in of_event[0].keys() - {"event", "step", "epoch"}:
                steps, values = zip(*points[f"{event}/{name}"], strict=True)
                assert list(steps) == [line["step"] for line in of_event]
                assert values == pytest.approx([line[name] for line in of_event], rel=1e-5)
        trained = [m for m in metrics if m["event"] == "train"]
        for line in trained:
            parts = [value for name, value in line.items() if name.startswith("loss_")]
            assert len(parts) == 4
            assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)
            assert line["images_per_s"] > 0
        # Step 1 is half-way through the warm-up; the second epoch has a tenth of the rate.
        rates = [line["lr"] for line in trained]
        assert rates == pytest.approx([0.002 * (1 + 0.001) / 2, 0.0002, 0.0002])

    def test_what_it_is_and_ran_with(self, shapes_root, whole_run):
        assert {path.name for path in whole_run.iterdir()} == {
            "config.yaml", "versions.json", "metrics.jsonl", "tensorboard", "last.pt",
            "previous.pt", "best.pt", ".lock",
        }  # fmt: skip
        config = with_data_noted(tiny_config(shapes_root, whole_run, *STATEFUL))
        assert parse_args(TrainConfig, ["--config", str(whole_run / "config.yaml")]) == config
        versions = json.loads((whole_run / "versions.json").read_text())
        assert versions["torch"] == torch.__version__
        assert "detmix" in versions

    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            (["data.batch_size=1", "mixing.name=mixup+cutmix"], "=1 .*mixing.place=dataset"),
            (["detector.name=maskrcnn"], "maskrcnn needs masks"),
            (["precision=fp16"], "fp16"),  # needs a GPU
            (["augment.size=64", "augment.scale_jitter=[2, 0.1]"], r"jitter.*2\.0, 0\.1"),
            (["augment.scale_jitter=[0.1, 2]"], r"jitter.*size=None"),
        ],
    )
    def test_wrong_settings_leave_nothing_behind(self, trainer_for, tmp_path, overrides, named):
        with pytest.raises(ValueError, match=named):
            trainer_for(*overrides)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("epochs", "off", "taken"), [(1, 2, 0), (2, 2, 1), (2, 1, 1)])
def test_one_epoch_at_least_mixes(recwarn, epochs, off, taken):
    """As where a configuration is tried for an epoch; it is told, and may be trained for more."""
    config = TrainConfig(epochs=epochs, mixing=MixingConfig(off_epochs=off))
    assert build_mixer(config).off_epochs == taken
    told = [f"={off} .* {taken}:" for _ in range(taken != off)]
    assert all(
        re.search(*each) for each in zip(told, [str(w.message) for w in recwarn], strict=True)
    )


def hold(folder, taken, done):
    with RunFolder(folder, {}):
        taken.set()
        done.wait(60)


def test_one_process_at_a_time(tmp_path):
    folder, context = tmp_path / "run", get_context("forkserver")
    taken, done = context.Event(), context.Event()
    other = as_process(hold, folder, taken, done)
    assert taken.wait(60)
    temporary = temporary_path(folder / "last.pt")
    temporary.write_text("the other's")
    with pytest.raises(FileExistsError, match="run: another process is training there"):
        RunFolder(folder, {}, resume=True)
    assert temporary.exists()
    other.kill()
    other.join()
    RunFolder(folder, {}, resume=True).close()
    assert not temporary.exists()


@pytest.mark.parametrize(
    ("device", "named"), [("/dev/full", "metrics.jsonl"), ("/dev/null", "tensorboard")]
)
def test_a_full_disk(tmp_path, monkeypatch, device, named):
    """TensorBoard's own thread meets it, which must neither be lost nor have the run hang."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    folder = RunFolder(tmp_path / "run", {})
    folder.metrics.symlink_to(device)  # /dev/full takes nothing, as a full disk

    def log():
        with folder:
            for step in range(1, 1000):
                folder.log("train", step, 0.1, {"loss": 1.0})

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=named):
            log()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_mixing_on_the_device_is_that_of_batches(trainer_for):
    """And the last epochs are plain, in workers that go on running too."""
    steps = {"batch": [], "device": []}
    for (place, seen), workers in zip(steps.items(), (1, 0), strict=True):
        trainer = trainer_for(
            f"mixing.place={place}", f"data.workers={workers}", "data.train_limit=12",
            "eval_every=2", "mixing.p=0.8", "mixing.fill=114", "mixing.off_epochs=1", name=place,
        )  # fmt: skip
        trainer.plain_model.register_forward_pre_hook(
            lambda model, inputs, seen=seen: seen.append(inputs) if model.training else None
        )
        trainer.fit()
    assert len(steps["batch"]) == 6
    for (images, targets), (others, theirs) in zip(*steps.values(), strict=True):
        torch.testing.assert_close(targets, theirs, rtol=0, atol=0)
        for image, other in zip(images, others, strict=True):
            assert image.dtype == other.dtype == torch.float32
            torch.testing.assert_close(image, other, rtol=0, atol=0.5 / 255 + 1e-6)
    weights = [torch.cat([t["box_weights"] for t in targets]) for _, targets in steps["batch"]]
    assert 0 < torch.cat(weights[:3]).min() < 0.5
    assert (torch.cat(weights[3:]) == 1).all()


class TestOptions:
    def test_difficult_objects_are_dropped_in_training_alone(self, shapes_root, tmp_path):
        config = tiny_config(shapes_root, tmp_path / "run", "data.difficult=drop")
        reports = [open_dataset(config, train=train).report for train in (True, False)]
        assert reports[0].num_difficult_dropped > 0 == reports[0].num_difficult
        assert reports[1].num_difficult > 0 == reports[1].num_difficult_dropped

    def test_losses_are_the_configured_ones(self, trainer_for):
        found = []
        for number, option in enumerate(
            ("loss=null", "seed=0", "loss.background_weight=0.5", "loss.normalizer=weights")
        ):
            trainer = trainer_for(option, "mixing.p=1", name=str(number))
            trainer.begin_epoch(0)
            trainer.sampler.set_epoch(0)
            torch.manual_seed(0)
            losses = trainer.compute_losses(next(iter(trainer.loader)))
            found.append(float(sum(losses.values()).detach()))
            is_plain = type(trainer.plain_model.roi_heads).__module__.startswith("torchvision")
            assert is_plain == (option == "loss=null")
        assert len(set(found)) == 4

    def test_the_average_is_saved_and_the_gradient_clipped(self, trainer_for):
        decay, averages, norms = 0.75, [], []
        trainer = trainer_for(f"optim.ema_decay={decay}", "optim.lr=0.01", "optim.clip_norm=0.125")

        def watch(optimizer, *_):
            grads = [p.grad.norm() for p in optimizer.param_groups[0]["params"]]
            norms.append(float(torch.stack(grads).norm()))

        def follow(*_):
            now = copied(trainer.plain_model)
            last = averages[-1] if averages else now  # the first step is taken over
            averages.append({k: decay * last[k] + (1 - decay) * now[k] for k in now})

        trainer.optimizer.optimizer.register_step_pre_hook(watch)
        trainer.optimizer.optimizer.register_step_post_hook(follow)
        trainer.fit()
        assert norms == pytest.approx([0.125] * 12, rel=1e-3)
        run_dir = trainer.config.run_dir
        last, best = (load_checkpoint(run_dir / name) for name in ("last.pt", "best.pt"))
        for name, average in (("last.pt", last["ema"]), ("best.pt", best["model"])):
            model, _ = load_detector(run_dir / name)
            torch.testing.assert_close(dict(model.state_dict()), dict(average), rtol=0, atol=0)
        assert last["ema_updates"] == 12
        for key, value in last["ema"].items():
            if value.is_floating_point():
                torch.testing.assert_close(value, averages[-1][key], rtol=1e-3, atol=1e-4)
        conv = "rpn.head.conv.0.0.weight"
        assert not torch.equal(last["ema"][conv], last["model"][conv])
        assert trainer.eval_model is trainer.ema.module

    def test_bf16_channels_last_and_threads(self, trainer_for):
        options = (
            "precision=bf16",
            "channels_last=true",
            "data.train_limit=8",
            "threads=2",
            "epochs=1",
        )
        trainer = trainer_for(*options)
        assert trainer.fit().num_images == 8
        assert torch.get_num_threads() == 2
        for value in trainer.plain_model.parameters():
            assert value.dtype == torch.float32
            assert torch.isfinite(value).all()
        conv = trainer.plain_model.backbone.body.conv1.weight
        assert conv.is_contiguous(memory_format=torch.channels_last)


class Watched(DetectorTrainer):
    """Notes what the model's randomness starts from in each step."""

    seeds = ()

    def compute_losses(self, batch):
        self.seeds = (*self.seeds, torch.initial_seed())
        return super().compute_losses(batch)


def test_each_step_draws_anew(trainer_for):
    few = ("data.train_limit=12", "data.test_limit=4")
    runs = [trainer_for(f"seed={seed}", *few, name=f"{seed}", kind=Watched) for seed in (0, 1)]
    for trainer in runs:
        trainer.fit()
    seeds = [seed for trainer in runs for seed in trainer.seeds]
    assert len(set(seeds)) == len(seeds) >= 12


class Overflowing(DetectorTrainer):
    """The gradient of the eighth step is not finite, its loss is."""

    def compute_losses(self, batch):
        losses = super().compute_losses(batch)
        if self.position.step == 7:
            weight = self.plain_model.roi_heads.box_predictor.cls_score.weight
            root = (weight.flatten()[:1] * 0).sqrt()  # 0, with an infinite slope
            losses["loss_classifier"] = losses["loss_classifier"] + root[0]
        return losses


class TestNonFiniteLoss:
    @pytest.mark.parametrize("place", ["batch", "dataset"])
    def test_stops_with_what_was_before(self, trainer_for, place):
        options = (f"mixing.place={place}", "mixing.p=1", "optim.ema_decay=0.5")
        trainer, stopped = (trainer_for(*options, name=n, kind=Stopping) for n in ("nan", "stop"))
        trainer.nan_in, stopped.in_step = 4, 3
        with pytest.raises(NonFiniteLossError) as error:
            trainer.fit()
        message, last = str(error.value), trainer.config.run_dir / "last.pt"
        trainer.sampler.set_epoch(0, start=3)
        _, targets = next(iter(trainer.loader))
        images = [f"VOC2007/{target['image_id'] + 1:06d}" for target in targets]
        parts = ("step 3 (epoch 0)", "loss_classifier nan", "loss_box_reg ", str(last), *images)
        assert all(part in message for part in parts)
        assert (" mixed with " in message) == (place == "dataset")
        with pytest.raises(Interrupted):
            stopped.fit()
        states = [load_checkpoint(t.config.run_dir / "last.pt") for t in (trainer, stopped)]
        for key in ("model", "ema", "ema_updates", "meter", "position"):
            assert_same(*(state[key] for state in states))

    def test_weights_that_are_lost_do_not_replace_a_checkpoint(self, trainer_for):
        trainer = trainer_for("schedule.warmup_steps=0", kind=Overflowing)
        with pytest.raises(NonFiniteLossError, match=r"at step 8 .*checkpoint before is left"):
            trainer.fit()
        state = load_checkpoint(trainer.config.run_dir / "last.pt")
        assert state["position"]["step"] == 6
        assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.slow
def test_memory_does_not_grow(trainer_for):
    """Thousands of steps with a loader's workers, mixing, an average, logs and checkpoints."""
    trainer = trainer_for(
        "epochs=300", "eval_every=300", "save_every=20", "mixing.place=dataset", "data.workers=1",
        "optim.ema_decay=0.9", "log_every=10", "detector.min_size=32", "detector.max_size=32",
    )  # fmt: skip
    process, seen, begin_epoch = psutil.Process(), [], trainer.begin_epoch

    def watched(epoch):
        seen.append({p.pid: p.memory_info().rss for p in (process, *process.children())})
        begin_epoch(epoch)

    trainer.begin_epoch = watched
    trainer.fit()
    before, after = seen[50], seen[299]
    assert before.keys() == after.keys(), "the workers are the same ones"
    assert len(before) > 1
    assert max(after[pid] - before[pid] for pid in before) < 16 * 2**20
