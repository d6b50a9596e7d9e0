"""What every pair mixer shares: who is mixed with whom, when, and where; and a choice of several.

A mixer draws all its randomness in one method and applies it in another, so that a test can
inject what would be drawn. B is the batch size.
"""

from __future__ import annotations

import abc
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from detmix.mixing.seeding import SharedEpoch, draw_seeds
from detmix.mixing.target import Target, check_sample, completed, image_size, typed_as

Sample = tuple[Tensor, Target]
Images = Tensor | Sequence[Tensor]


class MixParams(NamedTuple):
    """How one sample of a batch is mixed."""

    partner: int
    """Index of the other sample in the batch."""
    how: Any
    """What the mixer drew for the pair: `DetectionMixer.draw_pair` of its class says what."""


class DetectionMixer(nn.Module, abc.ABC):
    """A mixer of sample pairs that serves on a batch, in a ``collate_fn`` and on a data set.

    Args:
        p: The chance that a sample is mixed, in [0, 1].
        epochs: How many epochs the training has; needed for ``off_epochs``.
        off_epochs: For how many epochs at the end nothing is mixed, so that the detector sees
            plain images last. Takes effect through `set_epoch`, in persistent ``DataLoader``
            workers too.

    Raises:
        ValueError: For ``p`` outside [0, 1], or ``off_epochs`` that leave no epoch with mixing.
    """

    def __init__(self, p: float, *, epochs: int | None = None, off_epochs: int = 0) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must be in [0, 1], got {p}")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs must be positive, got {epochs}")
        if off_epochs < 0:
            raise ValueError(f"off_epochs must not be negative, got {off_epochs}")
        if off_epochs and epochs is None:
            raise ValueError(f"off_epochs={off_epochs} needs epochs, the length of the training")
        if off_epochs and epochs is not None and off_epochs >= epochs:
            raise ValueError(
                f"off_epochs={off_epochs} of epochs={epochs} would never mix at all: "
                "off_epochs must be smaller than epochs"
            )
        self.p = p
        self.epochs = epochs
        self.off_epochs = off_epochs
        self._epoch = SharedEpoch()

    @property
    def epoch(self) -> int:
        """The epoch set last, from 0."""
        return self._epoch.value

    @property
    def active(self) -> bool:
        """Whether this epoch mixes at all."""
        return (
            self.epochs is None
            or self.off_epochs == 0
            or self.epoch < self.epochs - self.off_epochs
        )

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0; call it before iterating over the loader."""
        self._epoch.value = epoch

    @abc.abstractmethod
    def draw_pair(self, rng: random.Random) -> Any:
        """Draw how one pair is mixed, such as its ratio λ; never None."""

    @abc.abstractmethod
    def mix_pair(self, sample_a: Sample, sample_b: Sample, how: Any) -> Sample:
        """Mix two checked samples as `draw_pair` drew it."""

    def draw(self, rng: random.Random) -> Any | None:
        """Draw whether and how one sample is mixed.

        Args:
            rng: The sample's own random numbers, of which as many are drawn whether the
                sample is mixed or not.

        Returns:
            What `draw_pair` drew; None for a sample that stays as it is.
        """
        chosen, how = rng.random() < self.p, self.draw_pair(rng)
        return how if chosen and self.active else None

    def make_params(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> list[MixParams | None]:
        """Draw partners for a batch, and how each pair is mixed.

        Partners are the neighbours on a random circle through the batch: each sample is the
        partner of exactly one other, and never its own.

        Args:
            batch_size: B.
            generator: A CPU generator; None for torch's global one.
            seeds: B seeds in place of a generator. Whether and how a sample is mixed
                are then a function of its own seed, whatever else is in the batch; partners are
                one of all the batch's seeds, whatever their order.

        Returns:
            B entries, None for a sample that stays as it is.

        Raises:
            ValueError: If there is not one seed for each sample.
        """
        if seeds is None:
            seeds = draw_seeds(batch_size, generator)
        if len(seeds) != batch_size:
            raise ValueError(f"got {len(seeds)} seeds for {batch_size} samples, expected one each")
        circle = sorted(range(batch_size), key=seeds.__getitem__)
        params: list[MixParams | None] = [None] * batch_size
        for position, index in enumerate(circle):
            how = self.draw(random.Random(seeds[index]))
            if how is not None and batch_size > 1:
                params[index] = MixParams(circle[position - 1], how)
        return params

    def transform(
        self, samples: Sequence[Sample], params: Sequence[MixParams | None]
    ) -> list[Sample]:
        """Mix the samples of a batch as ``params`` say.

        Args:
            samples: B pairs of an image ``(3, H, W)`` and a target.
            params: What `make_params` returned.

        Returns:
            B new samples, all with ``boxes``, ``labels`` and ``box_weights``; the inputs are not
            changed.

        Raises:
            ValueError: Naming the index of a sample that breaks the contract, or if there is not
                one entry of ``params`` for each sample.
        """
        if len(params) != len(samples):
            raise ValueError(f"got {len(params)} params for {len(samples)} samples")
        names = [_name(index, target) for index, (_, target) in enumerate(samples)]
        for (image, target), name in zip(samples, names, strict=True):
            check_sample(image, target, name)
        mixed = []
        for (image, target), name, param in zip(samples, names, params, strict=True):
            if param is None:
                mixed.append((image, completed(target, image.device)))
            else:
                partner = samples[param.partner]
                pair_names = (name, names[param.partner])
                mixed.append(self.mix_named((image, target), partner, param.how, pair_names))
        return mixed

    def mix_named(
        self, sample_a: Sample, sample_b: Sample, how: Any, names: tuple[str, str]
    ) -> Sample:
        """Mix two checked samples; an error names them."""
        try:
            return self.mix_pair(sample_a, sample_b, how)
        except ValueError as error:
            raise ValueError(f"mixing {names[0]} with {names[1]}: {error}") from error

    def forward(
        self,
        images: Images | Sequence[Sample],
        targets: Sequence[Target] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Images, list[Target]]:
        """Mix a batch.

        Args:
            images: A list of B images ``(3, H_i, W_i)`` or one tensor ``(B, 3, H, W)``. Without
                ``targets``, a list of B samples (image, target), as a ``collate_fn`` gets them.
            targets: B targets.
            generator: A CPU generator to draw from; None for torch's global one.

        Returns:
            The images, as one tensor where one came in and as a list otherwise, and B targets,
            all with ``box_weights``.

        Raises:
            ValueError: If images and targets differ in number, or naming the index of a sample
                that breaks the contract.
        """
        if targets is None:
            if isinstance(images, Tensor):
                raise ValueError("targets are needed with a tensor of images")
            samples = [(image, target) for image, target in images]
        elif len(images) != len(targets):
            raise ValueError(f"got {len(images)} images but {len(targets)} targets")
        else:
            samples = list(zip(images, targets, strict=True))
        mixed = self.transform(samples, self.make_params(len(samples), generator))
        mixed_images = [image for image, _ in mixed]
        mixed_targets = [target for _, target in mixed]
        if not isinstance(images, Tensor):
            return mixed_images, mixed_targets
        if not mixed:
            return images, mixed_targets
        stacked = torch.stack(mixed_images)
        return typed_as(stacked, images, image_size(stacked)), mixed_targets

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"p={self.p}, epochs={self.epochs}, off_epochs={self.off_epochs}"


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless Beta(alpha, alpha) is a distribution."""
    if not 0.0 < alpha < float("inf"):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")


def _name(index: int, target: Target) -> str:
    image_id = target.get("image_id") if isinstance(target, dict) else None
    return f"sample {index}" if image_id is None else f"sample {index} (image_id {image_id})"


class RandomChoice(DetectionMixer):
    """Picks a mixer for each sample, and leaves to it whether and how the sample is mixed.

    Each mixer keeps its own ``p`` and its own schedule: where the one picked does not mix, the
    sample stays as it is. It serves wherever a mixer does.

    Args:
        mixers: The mixers to choose from.
        probabilities: How likely each is picked, relative to the others; None for all alike.

    Raises:
        ValueError: If there is no mixer, or the probabilities are not one for each, not
            negative, with a positive sum.
        TypeError: If one is not a `DetectionMixer`.

    Example:
        >>> from detmix import DetectionCutMix, DetectionMixUp
        >>> mix = RandomChoice([DetectionMixUp(p=0.5), DetectionCutMix(p=0.5)])
        >>> mix.p
        0.5
    """

    def __init__(
        self, mixers: Sequence[DetectionMixer], probabilities: Sequence[float] | None = None
    ) -> None:
        mixers = list(mixers)
        _check_mixers(mixers)
        shares = _shares(len(mixers), probabilities)
        # as a share of all samples: what the mixers do in the epochs in which they mix
        chance = math.fsum(share * mixer.p for share, mixer in zip(shares, mixers, strict=True))
        super().__init__(min(chance, 1.0))
        self.mixers = nn.ModuleList(mixers)
        self.probabilities = shares
        self._epoch.value = max(mixer.epoch for mixer in mixers)

    @property
    def active(self) -> bool:
        """Whether any of the mixers mixes in this epoch."""
        return any(self._mixer(number).active for number in range(len(self.mixers)))

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0, in all mixers."""
        super().set_epoch(epoch)
        for number in range(len(self.mixers)):
            self._mixer(number).set_epoch(epoch)

    def draw(self, rng: random.Random) -> tuple[int, Any] | None:
        """Pick a mixer and let it draw whether and how one sample is mixed.

        Args:
            rng: The sample's own random numbers.

        Returns:
            The mixer's number and what it drew; None for a sample that stays as it is.
        """
        number = self._pick(rng)
        how = self._mixer(number).draw(rng)
        return None if how is None else (number, how)

    def draw_pair(self, rng: random.Random) -> tuple[int, Any]:
        """Pick a mixer and let it draw how a pair is mixed: its number and what it drew."""
        number = self._pick(rng)
        return number, self._mixer(number).draw_pair(rng)

    def mix_pair(self, sample_a: Sample, sample_b: Sample, how: tuple[int, Any]) -> Sample:
        """Mix two checked samples with the mixer picked."""
        number, drawn = how
        return self._mixer(number).mix_pair(sample_a, sample_b, drawn)

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"probabilities={self.probabilities}"

    def _pick(self, rng: random.Random) -> int:
        return rng.choices(range(len(self.mixers)), self.probabilities)[0]

    def _mixer(self, number: int) -> DetectionMixer:
        return cast(DetectionMixer, self.mixers[number])


def _check_mixers(mixers: list[DetectionMixer]) -> None:
    if not mixers:
        raise ValueError("mixers must hold at least one mixer, got none")
    for number, mixer in enumerate(mixers):
        if not isinstance(mixer, DetectionMixer):
            raise TypeError(
                f"mixers[{number}] must be a DetectionMixer, got {type(mixer).__name__}"
            )


def _shares(num: int, probabilities: Sequence[float] | None) -> tuple[float, ...]:
    """Return the probabilities, one for each of ``num`` mixers, with a sum of 1."""
    given = [1.0] * num if probabilities is None else [float(value) for value in probabilities]
    valid = len(given) == num and all(0.0 <= value < math.inf for value in given)
    if not valid or not 0 < sum(given) < math.inf:
        raise ValueError(
            f"probabilities must be {num} finite numbers, one for each mixer, not negative and "
            f"with a positive sum, got {probabilities}"
        )
    return tuple(value / sum(given) for value in given)
