"""Pretraining a classifier, by the command too, and the detector that starts from it."""

from __future__ import annotations

import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from runs import StoppingMixin, assert_same_run, succeed
from tiny import CLASSIFIER, tiny_args, tiny_config
from torch.nn import functional as F
from torchvision.transforms import v2

from detmix.detectors import build_classifier
from detmix.training import (
    ClassifierTrainer,
    DetectorTrainer,
    Interrupted,
    NonFiniteLossError,
    load_checkpoint,
    load_detector,
    parse_args,
)
from detmix.training.classifier import build_image_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NORMALIZED = (f"data.mean={list(MEAN)}", f"data.std={list(STD)}")
SETTINGS = ("optim.ema_decay=0.5", "mix=mixup+cutmix", "mixing.p=0.7", *NORMALIZED)


class Stopping(StoppingMixin, ClassifierTrainer):
    pass


@pytest.fixture(scope="module")
def pretrained(stripes_root, tmp_path_factory):
    """Return the folder of an uninterrupted run, and what its command printed."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    args = tiny_args(stripes_root, folder, *SETTINGS, settings=CLASSIFIER)
    return folder, succeed("pretrain", *args)[0]


@pytest.fixture
def trainer_for(stripes_root, tmp_path):
    return lambda *options, folder=tmp_path / "run", kind=ClassifierTrainer: kind(
        tiny_config(stripes_root, folder, *options, settings=CLASSIFIER)
    )


@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_the_loss_is_cross_entropy_with_smoothed_targets(trainer_for, mix):
    trainer = trainer_for(f"mix={mix}", "label_smoothing=0.1", *NORMALIZED)
    trainer.plain_model.eval()
    trainer.begin_epoch(0)
    trainer.sampler.set_epoch(0)
    batch = next(iter(trainer.loader))
    torch.manual_seed(1)
    loss = float(trainer.compute_losses(batch)["loss_classifier"].detach())
    images = v2.functional.normalize(batch[0] / 255.0, MEAN, STD)
    targets = F.one_hot(batch[1], 4).double()
    if mix == "cutmix":
        torch.manual_seed(1)
        images, targets = v2.RandomApply([v2.CutMix(num_classes=4)], p=1)(images, batch[1])
    targets = 0.9 * targets + 0.1 / 4
    with torch.no_grad():
        log_softmax = trainer.plain_model(images).double().log_softmax(1)
    assert loss == pytest.approx(float(-(targets * log_softmax).sum(1).mean()), rel=1e-5)


class TestRuns:
    def test_it_scores_the_average_on_each_image_once(self, stripes_root, trainer_for, pretrained):
        folder, out = pretrained
        last = load_checkpoint(folder / "last.pt")
        assert not torch.equal(last["ema"]["fc.weight"], last["model"]["fc.weight"])
        trainer = trainer_for(*SETTINGS, "resume=auto", folder=folder)
        result = trainer.evaluate().result
        model = build_classifier(trainer.config.model, 4).eval()
        model.load_state_dict(last["ema"])
        hits, losses = [], []
        for label, name in enumerate(sorted(path.name for path in stripes_root.glob("val/*"))):
            for path in (stripes_root / "val" / name).iterdir():
                pixels = np.array(Image.open(path), dtype=np.float64) / 255
                inputs = torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).float()
                with torch.inference_mode():
                    scores = model(inputs[None])[0].double()
                hits.append(int(scores.argmax()) == label)
                losses.append(float(-scores.log_softmax(0)[label]))
        assert result.top1 == pytest.approx(np.mean(hits))
        assert result.loss == pytest.approx(np.mean(losses), rel=1e-4)
        assert (result.top5, result.num_images) == (1.0, len(hits))  # four classes only
        assert f"epoch 2: {result}" in out

    def test_stopped_and_resumed_it_is_the_same(self, trainer_for, tmp_path, pretrained):
        trainer = trainer_for(*SETTINGS, kind=Stopping)
        trainer.in_step, trainer.signum = 9, signal.SIGINT
        with pytest.raises(Interrupted):
            trainer.fit()
        trainer_for(*SETTINGS, "resume=auto").fit()
        assert_same_run(tmp_path / "run", pretrained[0])

    def test_a_loss_that_is_not_finite_names_the_images(self, trainer_for):
        with pytest.raises(NonFiniteLossError, match=r"train/\w+/\d+\.png, train/"):
            trainer_for("optim.lr=1e30", "epochs=1").fit()

    def test_the_commands_one_after_the_other(self, shapes_root, tmp_path, pretrained):
        """Mean and deviation of the weights stay without the weights' file."""
        best = pretrained[0] / "best.pt"
        with pytest.raises(ValueError, match=r"best\.pt.*detector.*classifier"):
            load_detector(best)
        assert f"--backbone.weights {best}" in pretrained[1]
        weights = shutil.copy(best, tmp_path / "weights.pt")
        run_dir = tmp_path / "run"
        # So low a threshold that the mAP of the tiny detector is not 0.
        args = tiny_args(
            shapes_root, run_dir, f"backbone.weights={weights}", "epochs=3", "mixing.name=none",
            "optim.lr=0.003", "detector.options.box_score_thresh=1e-4", "resume=auto",
            "detector.options.box_detections_per_img=60",
        )  # fmt: skip
        out, err = succeed("train", *args)
        assert re.search(rf"{weights}.* (\d+) of \1 tensors.*fc.weight, fc.bias", err)
        *_, scores = re.finditer(r"mAP (\d\.\d{4}) .*, (\d\.\d{4}) \(11-point\)", out)
        assert float(scores[1]) > 0

        weights.unlink()
        out, _ = succeed("evaluate", run_dir / "last.pt")
        for kind, score in zip(("all-point", "11-point"), scores.groups(), strict=True):
            assert re.search(rf"mAP, {kind} .*{score}\n", out)
        model, config = load_detector(run_dir / "last.pt")
        resumed = DetectorTrainer(parse_args(type(config), args))
        for detector in (model, resumed.plain_model):
            assert detector.transform.image_mean == pytest.approx(MEAN)
            assert detector.transform.image_std == pytest.approx(STD)

        out, _ = succeed(
            "visualize", "predictions", run_dir / "last.pt", "--out", tmp_path / "a.png"
        )
        assert str(tmp_path / "a.png") in out
        assert min(Image.open(tmp_path / "a.png").size) > 200


@pytest.mark.parametrize(
    "option",
    [
        "mix=cutmixup", "mixing.mixup_alpha=0", "mixing.cutout_area=0.9", "data.batch_size=1",
        "data.mean=[124, 117, 104]", "data.std=[0, 1, 1]", "augment.eval_resize=8",
        "augment.scale=[0.9, 0.1]",
    ],
)  # fmt: skip
def test_wrong_settings_are_named(option):
    with pytest.raises(ValueError, match=re.escape(option.partition("=")[0])):
        build_image_transform(tiny_config("data", "run", option, settings=CLASSIFIER), train=False)
