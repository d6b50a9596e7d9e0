"""A training from its configuration to the files of its run."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from tiny import read_metrics, tiny_config

from detmix.files import temporary_path
from detmix.training import (
    DetectorTrainer,
    TrainConfig,
    parse_args,
)
from detmix.training.inference import to_device
from detmix.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Recorder(DetectorTrainer):
    """Keeps what it trains on."""

    def __init__(self, config):
        self.batches = []
        super().__init__(config)

    def compute_losses(self, batch):
        images, targets = to_device(*batch, self.accelerator.device)
        if self._mix_on_device is not None:
            images, targets = self._mix_on_device.mix_batch(images, targets)
        self.batches.append((self.position.epoch, images, targets))
        return super().compute_losses(batch)


class TestRun:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, shapes_root, tmp_path_factory):
        """Train without mixing or augmentation, for longer than the other tests do."""
        from accelerate.state import AcceleratorState

        run_dir = tmp_path_factory.mktemp("runs") / "plain"
        config = tiny_config(
            shapes_root, run_dir, "mixing.name=none", "augment.photometric=0", "augment.crop=0",
            "epochs=6", "optim.lr=0.003", "log_every=6", "eval_every=4",
            "detector.options.box_score_thresh=0.01",
        )  # fmt: skip
        AcceleratorState._reset_state(True)
        trainer = DetectorTrainer(config)
        result = trainer.fit()
        return config, trainer, result

    def test_metrics(self, run):
        config, trainer, result = run
        metrics = read_metrics(config.run_dir)
        assert [(m["event"], m["step"], m["epoch"]) for m in metrics] == [
            ("train", 6, 1), ("train", 12, 2), ("train", 18, 3), ("train", 24, 4), ("eval", 24, 4),
            ("train", 30, 5), ("train", 36, 6), ("eval", 36, 6),
        ]  # fmt: skip
        train, evaluation = metrics[-2], metrics[-1]
        parts = [value for name, value in train.items() if name.startswith("loss_")]
        assert len(parts) == 4
        assert train["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert train["images_per_s"] > 0
        assert train["lr"] == pytest.approx(0.003 * 0.5 * (1 + math.cos(math.pi * 35 / 36)))
        assert evaluation["mean_ap"] == result.mean_ap
        assert trainer.position.step == 36

    def test_run_folder(self, run):
        config = run[0]
        names = {path.name for path in config.run_dir.iterdir()}
        assert names == {
            "config.yaml", "versions.json", "metrics.jsonl", "tensorboard", "last.pt",
            "previous.pt", "best.pt", ".lock",
        }  # fmt: skip
        file = config.run_dir / "config.yaml"
        assert parse_args(TrainConfig, ["--config", str(file)]) == config
        versions = json.loads((config.run_dir / "versions.json").read_text())
        assert versions["torch"] == torch.__version__
        assert "detmix" in versions

    def test_tensorboard_has_the_same_numbers(self, run):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(run[0].run_dir / "tensorboard"))
        board.Reload()
        for event in ("train", "eval"):
            lines = [m for m in read_metrics(run[0].run_dir) if m["event"] == event]
            for name in lines[0].keys() - {"event", "step", "epoch"}:
                points = [(p.step, p.value) for p in board.Scalars(f"{event}/{name}")]
                assert [step for step, _ in points] == [line["step"] for line in lines]
                values = [line[name] for line in lines]
                assert [value for _, value in points] == pytest.approx(values, rel=1e-5)


class TestFolder:
    @pytest.mark.parametrize(
        ("override", "error"),
        [
            ("data.root=missing", FileNotFoundError),
            ("data.classes=[circle]", ValueError),
            ("data.batch_size=25", ValueError),
            ("backbone.trainable_layers=9", ValueError),
        ],
    )
    def test_wrong_settings_leave_nothing_behind(self, shapes_root, tmp_path, override, error):
        with pytest.raises(error):
            DetectorTrainer(tiny_config(shapes_root, tmp_path / "run", override))
        assert not (tmp_path / "run").exists()

    def test_one_process_at_a_time(self, tmp_path):
        code = (
            "import sys; from pathlib import Path\n"
            "from detmix.training.run_folder import RunFolder\n"
            "folder = RunFolder(Path(sys.argv[1]), {}); print('there', flush=True); input()"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert other.stdout.readline() == b"there\n"
        temporary = temporary_path(tmp_path / "run" / "last.pt")
        temporary.write_text("the other's")
        with pytest.raises(FileExistsError, match="run: another process is training there"):
            RunFolder(tmp_path / "run", {}, resume=True)
        assert temporary.exists()
        other.kill()
        other.wait()
        RunFolder(tmp_path / "run", {}, resume=True).close()
        assert not temporary.exists()


class TestMixingPlaces:
    def recorded(self, shapes_root, run_dir, *overrides):
        trainer = Recorder(tiny_config(shapes_root, run_dir, *overrides))
        trainer.fit()
        return trainer.batches

    def test_device_is_batch(self, shapes_root, tmp_path):
        settings = ("mixing.p=0.8", "mixing.fill=114", "epochs=1")
        batch, device = (
            self.recorded(shapes_root, tmp_path / place, f"mixing.place={place}", *settings)
            for place in ("batch", "device")
        )
        for (_, images, targets), (_, others, other_targets) in zip(batch, device, strict=True):
            torch.testing.assert_close(targets, other_targets, rtol=0, atol=0)
            for image, other in zip(images, others, strict=True):
                assert image.dtype == other.dtype == torch.float32
                torch.testing.assert_close(image, other, rtol=0, atol=0.5 / 255 + 1e-6)
        weights = torch.cat([t["box_weights"] for _, _, targets in batch for t in targets])
        assert 0 < weights.min() < 0.5

    def test_last_epochs_are_plain_on_the_device_too(self, shapes_root, tmp_path):
        batches = self.recorded(
            shapes_root, tmp_path / "run", "mixing.place=device", "mixing.p=1",
            "mixing.off_epochs=1", "data.workers=1",
        )  # fmt: skip
        for epoch in range(2):
            weights = [
                t["box_weights"] for at, _, targets in batches for t in targets if at == epoch
            ]
            assert len(weights) == 24
            assert all(bool((w == 1).all()) == (epoch == 1) for w in weights), f"epoch {epoch}"
