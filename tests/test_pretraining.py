"""Pretraining a classifier: the loss that it minimises, its accuracy, its runs and checkpoints."""

from __future__ import annotations

import dataclasses
import shutil
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from runs import StoppingMixin, assert_same_run
from tiny import tiny_config, tiny_pretrain_config
from torch.nn import functional as F
from torchvision.transforms import v2

from detmix.training import (
    ClassifierTrainer,
    DetectorTrainer,
    Interrupted,
    NonFiniteLossError,
    PretrainConfig,
    load_checkpoint,
    load_detector,
    parse_args,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

SETTINGS = ("epochs=3", "optim.ema_decay=0.9", "mix=mixup+cutmix", "mixing.p=0.7")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Stopping(StoppingMixin, ClassifierTrainer):
    """A classifier's training that gets a real signal."""


class Recording(ClassifierTrainer):
    """Keeps what goes into the network and into the loss."""

    def __init__(self, config):
        super().__init__(config)
        self.images, self.losses = [], []
        self.plain_model.register_forward_pre_hook(lambda _, inputs: self.images.append(inputs[0]))

    def compute_losses(self, batch):
        losses = super().compute_losses(batch)
        self.losses.append(float(losses["loss_classifier"].detach()))
        return losses


@pytest.fixture(scope="module")
def whole(stripes_root, tmp_path_factory):
    """Return the folder of an uninterrupted run."""
    return run_in(tmp_path_factory.mktemp("whole"), stripes_root, *SETTINGS)


@pytest.fixture(scope="module")
def pretrained(stripes_root, tmp_path_factory):
    """Return the folder of a run with a mean and deviation of its own, and an average."""
    return run_in(
        tmp_path_factory.mktemp("pretrained"), stripes_root, "epochs=1", "optim.ema_decay=0.5",
        f"data.mean={list(MEAN)}", f"data.std={list(STD)}",
    )  # fmt: skip


def run_in(folder, root, *overrides):
    AcceleratorState._reset_state(True)
    ClassifierTrainer(tiny_pretrain_config(root, folder / "run", *overrides)).fit()
    return folder / "run"


def first_batch(trainer):
    trainer.begin_epoch(0)
    trainer.sampler.set_epoch(0)
    return next(iter(trainer.loader))


class TestLoss:
    def test_pixels_reach_the_network_normalised(self, stripes_root, tmp_path):
        config = tiny_pretrain_config(
            stripes_root, tmp_path / "run", "mix=none", "augment.padding=0",
            f"data.mean={list(MEAN)}", f"data.std={list(STD)}",
        )  # fmt: skip
        trainer = Recording(config)
        batch = first_batch(trainer)
        trainer.compute_losses(batch)
        files = sorted((stripes_root / "train").rglob("*.png"), key=lambda p: p.parts[-2:])
        by_name = {f"train/{path.parent.name}/{path.name}": path for path in files}
        names = trainer.describe(batch).split(", ")
        for image, name, label in zip(trainer.images[0], names, batch[1], strict=True):
            pixels = np.array(Image.open(by_name[name]), dtype=np.float64) / 255
            expected = torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).float()
            torch.testing.assert_close(image, expected)
            assert trainer.classes[label] == name.split("/")[1]

    @pytest.mark.parametrize(
        ("mix", "smoothing"), [("none", 0.1), ("cutmix", 0.0), ("cutmix", 0.1)]
    )
    def test_cross_entropy_with_smoothed_targets(self, stripes_root, tmp_path, mix, smoothing):
        config = tiny_pretrain_config(
            stripes_root, tmp_path / "run", f"mix={mix}", f"label_smoothing={smoothing}"
        )
        trainer = Recording(config)
        trainer.plain_model.eval()
        batch = first_batch(trainer)
        torch.manual_seed(1)
        loss = float(trainer.compute_losses(batch)["loss_classifier"].detach())
        images = v2.functional.normalize(batch[0] / 255.0, config.data.mean, config.data.std)
        targets = F.one_hot(batch[1], 4).double()
        if mix == "cutmix":
            torch.manual_seed(1)
            apply = v2.RandomApply([v2.CutMix(num_classes=4)], p=1)
            images, targets = apply(images, batch[1])
        targets = (1 - smoothing) * targets + smoothing / 4
        with torch.no_grad():
            log_softmax = trainer.plain_model(images).double().log_softmax(1)
        assert loss == pytest.approx(float(-(targets * log_softmax).sum(1).mean()), rel=1e-5)


class TestEvaluation:
    def test_against_a_loop_over_the_images(self, stripes_root, tmp_path):
        config = tiny_pretrain_config(stripes_root, tmp_path / "run", "mix=none", "epochs=1")
        trainer = ClassifierTrainer(config)
        result = trainer.fit()
        model = trainer.plain_model.eval()
        top1, losses = [], []
        classes = sorted(folder.name for folder in (stripes_root / "val").iterdir())
        for label, name in enumerate(classes):
            for path in (stripes_root / "val" / name).iterdir():
                pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
                image = v2.functional.normalize(pixels, config.data.mean, config.data.std)
                with torch.inference_mode():
                    scores = model(image[None])[0].double()
                top1.append(int(scores.argmax()) == label)
                losses.append(float(-scores.log_softmax(0)[label]))
        assert result.top1 == pytest.approx(np.mean(top1))
        assert result.loss == pytest.approx(np.mean(losses), rel=1e-4)
        assert result.top5 == 1.0  # four classes only

    def test_the_average_is_what_is_evaluated(self, stripes_root, tmp_path):
        config = tiny_pretrain_config(
            stripes_root, tmp_path / "run", "optim.ema_decay=0.5", "epochs=1"
        )
        trainer = ClassifierTrainer(config)
        result = trainer.fit()
        trainer.plain_model.load_state_dict(load_checkpoint(tmp_path / "run" / "last.pt")["ema"])
        trainer.ema = None
        assert trainer.evaluate().result == result
        state = load_checkpoint(tmp_path / "run" / "last.pt")
        assert not torch.equal(state["ema"]["fc.weight"], state["model"]["fc.weight"])
        best = load_checkpoint(tmp_path / "run" / "best.pt")
        assert torch.equal(best["model"]["fc.weight"], state["ema"]["fc.weight"])


class TestRuns:
    @pytest.mark.parametrize("when", [{"in_step": 9}, {"in_evaluation": 2}])
    def test_stopped_and_resumed_it_is_the_same(self, stripes_root, tmp_path, whole, when):
        config = tiny_pretrain_config(stripes_root, tmp_path / "run", *SETTINGS, "resume=auto")
        trainer = Stopping(config)
        vars(trainer).update(when, signum=signal.SIGINT)
        with pytest.raises(Interrupted, match="--resume auto"):
            trainer.fit()
        ClassifierTrainer(config).fit()
        assert_same_run(tmp_path / "run", whole)

    def test_a_loss_that_is_not_finite_names_the_images(self, stripes_root, tmp_path):
        config = tiny_pretrain_config(stripes_root, tmp_path / "run", "optim.lr=1e30")
        with pytest.raises(NonFiniteLossError, match=r"train/\w+/\d+\.png, train/"):
            ClassifierTrainer(config).fit()

    def test_other_classes_than_the_checkpoint(self, stripes_root, tmp_path, whole):
        shutil.copytree(stripes_root, tmp_path / "data")
        for split in ("train", "val"):
            (tmp_path / "data" / split / "rising").rename(tmp_path / "data" / split / "round")
        config = tiny_pretrain_config(tmp_path / "data", whole, *SETTINGS, "resume=auto")
        with pytest.raises(ValueError, match="class 3 = rising"):
            ClassifierTrainer(config)


class TestChain:
    def detector_config(self, root, run_dir, pretrained, *overrides):
        return tiny_config(
            root, run_dir, f"backbone.weights={pretrained / 'last.pt'}", "backbone.norm=batch",
            "epochs=1", "mixing.off_epochs=0", *overrides,
        )  # fmt: skip

    def test_a_detector_starts_from_the_average(self, shapes_root, tmp_path, pretrained):
        trainer = DetectorTrainer(self.detector_config(shapes_root, tmp_path / "run", pretrained))
        average = load_checkpoint(pretrained / "last.pt")["ema"]
        body = trainer.plain_model.backbone.body.state_dict()
        for name, value in body.items():
            assert torch.equal(value, average[name]), name

    def test_mean_and_deviation_stay_without_the_file(self, shapes_root, tmp_path, pretrained):
        """Those of the weights are in the checkpoint of the detector."""
        weights = tmp_path / "weights.pt"
        weights.write_bytes((pretrained / "last.pt").read_bytes())
        run_dir = tmp_path / "run"
        config = self.detector_config(shapes_root, run_dir, pretrained)
        backbone = dataclasses.replace(config.backbone, weights=str(weights))
        config = dataclasses.replace(config, backbone=backbone, resume="auto")
        DetectorTrainer(config).fit()
        weights.unlink()
        model, _ = load_detector(run_dir / "best.pt")
        resumed = DetectorTrainer(config)
        for detector in (model, resumed.plain_model):
            assert detector.transform.image_mean == pytest.approx(MEAN)
            assert detector.transform.image_std == pytest.approx(STD)
        saved = load_checkpoint(run_dir / "best.pt")["normalization"]
        assert saved["image_mean"] == pytest.approx(MEAN)

    def test_a_classifier_is_no_detector(self, pretrained):
        with pytest.raises(ValueError, match=r"last\.pt is not a checkpoint of a detector"):
            load_detector(pretrained / "last.pt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mix: cutmixup", "mix.*cutmixup"),
        ("mixing: {p: 2}", r"mixing\.p .* 2"),
        ("mixing: {mixup_alpha: 0}", r"mixing\.mixup_alpha .* 0"),
        ("mix: cutout\nmixing: {cutout_area: 0.999}", r"mixing\.cutout_area=0\.999"),
        ("label_smoothing: 1.5", "label_smoothing .* 1.5"),
        ("data: {class_limit: 5}", r"data\.class_limit"),
        ("data: {batch_size: 1}", r"data\.batch_size=1"),
        ("mix: none\ndata: {batch_size: 1}", r"data\.batch_size=1 .*batch norm"),
        ("data: {mean: [124, 117, 104]}", r"data\.mean"),
        ("data: {std: [0, 1, 1]}", r"data\.std"),
        ("augment: {scale: [0.5, 0.1]}", r"augment\.scale"),
        ("augment: {size: 64, eval_resize: 32}", r"augment\.eval_resize"),
        ("model: {name: vgg16}", r"model\.name.*vgg16"),
    ],
)
def test_wrong_settings_are_named_with_their_file(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}.*mine.yaml"):
        parse_args(PretrainConfig, ["--config", str(file)])
