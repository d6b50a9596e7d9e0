"""Who is mixed with whom, in a batch or in a data set, and when; and a choice of several mixers.

A mixer draws all its randomness in `make_params` and applies it in `transform`, so that a test can
inject what would be drawn. B is the batch size.
"""

from __future__ import annotations

import abc
import math
import random
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from detmix.mixing.seeding import HasEpoch, SharedEpoch, draw_seeds, held_by, sample_seed
from detmix.mixing.target import (
    Sample,
    Target,
    check_share,
    checked_samples,
    image_size,
    key_names,
    sample_name,
    told_keys,
    wrap_like,
)

Images = Tensor | Sequence[Tensor]
TargetGetter = Callable[[Any], Target]


class MixParams(NamedTuple):
    """How one sample of a batch is mixed."""

    partner: int  # index of the other sample: in the batch, or in the data set
    how: Any  # what `draw` of the mixer returned


class DetectionMixer(HasEpoch, nn.Module, abc.ABC):
    """A mixer of sample pairs that serves on a batch, in a ``collate_fn`` and on a data set.

    A module as torchvision's transforms are, without parameters; ``eval()`` does not stop it. A
    subclass says whether and how a sample is mixed, and does it: `draw` and `mix_pair`. The
    arguments are as of `DetectionMixUp`.
    """

    def __init__(
        self, *, keys: Collection[str] = (), target_getter: TargetGetter | None = None
    ) -> None:
        super().__init__()
        self._epoch = SharedEpoch()
        self.keys = key_names(keys)
        self.target_getter = target_getter
        self._told = told_keys()

    @property
    def epoch(self) -> int:
        """The epoch set last, from 0."""
        return self._epoch.value

    def extra_repr(self) -> str:
        """Describe the settings, those of a subclass too."""
        given = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}
        return ", ".join(f"{name}={value}" for name, value in given.items())

    @property
    @abc.abstractmethod
    def active(self) -> bool:
        """Whether this epoch mixes at all."""

    @abc.abstractmethod
    def draw(self, rng: random.Random) -> Any | None:
        """Draw how one sample is mixed, such as its ratio λ, or None if it is not."""

    @abc.abstractmethod
    def mix_pair(self, sample_a: Sample, sample_b: Sample, how: Any) -> Sample:
        """Mix two samples that `transform` has checked and completed, as `draw` said."""

    def make_params(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> list[MixParams | None]:
        """Draw a partner for each sample, and how the pair is mixed; None for one that is not.

        Partners are the neighbours on a random circle through the batch: each sample is the
        partner of exactly one other, and never its own. Seeds, one for each sample, can take the
        place of a generator (by default torch's global one). Whether and how a sample is mixed
        are then a function of its own seed; partners depend on the seeds of the whole batch.
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
        self,
        samples: Sequence[Sample],
        params: Sequence[MixParams | None],
        *,
        numbers: Sequence[int] | None = None,
    ) -> list[Sample]:
        """Mix the samples of a batch as `make_params` said.

        New targets are returned, all with ``boxes`` and ``box_weights``; the inputs are not
        changed, and an unmixed image is the input's own. ValueError names a sample that breaks the
        contract, or two that do not match, by their ``numbers`` (0 to B - 1 by default). Known keys
        that not all objects of the batch have are left out of it, as `union` does with a pair; the
        first time a warning says so.
        """
        if len(params) != len(samples):
            raise ValueError(f"got {len(params)} params for {len(samples)} samples")
        numbers = range(len(samples)) if numbers is None else numbers
        names = [sample_name(*numbered) for numbered in zip(numbers, samples, strict=True)]
        if self.target_getter is not None:
            samples = [(image, self.target_getter(target)) for image, target in samples]
        checked = checked_samples(samples, self.keys, names, self._told)
        mixed = []
        for sample, name, param in zip(checked, names, params, strict=True):
            if param is None:
                mixed.append(sample)
                continue
            try:
                mixed.append(self.mix_pair(sample, checked[param.partner], param.how))
            except ValueError as error:
                raise ValueError(f"mixing {name} with {names[param.partner]}: {error}") from error
        return mixed

    def forward(
        self,
        images: Images | Sequence[Any],
        targets: Sequence[Target] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Images, list[Target]]:
        """Mix a batch.

        Args:
            images: A list of B images ``(C, H_i, W_i)`` or one tensor ``(B, C, H, W)``. Without
                ``targets``, a list of B samples (image, target), as a ``collate_fn`` gets them, or
                a pair (images, targets), as torchvision's own `MixUp` takes it too.
            targets: B targets.
            generator: A CPU generator to draw from; None for torch's global one.

        Returns:
            The images, as one tensor where one came in and as a list otherwise, and B targets,
            all with ``box_weights``. Errors are those of `transform`.
        """
        if targets is None and _is_packed(images):
            packed: Any = images
            images, targets = packed
        if targets is None:
            if isinstance(images, Tensor):
                raise ValueError("targets are needed with a tensor of images")
            samples = list(images)
        elif len(images) != len(targets):
            raise ValueError(f"got {len(images)} images but {len(targets)} targets")
        else:
            samples = list(zip(images, targets, strict=True))
        mixed = self.transform(samples, self.make_params(len(samples), generator))
        mixed_images = [image for image, _ in mixed]
        mixed_targets = [target for _, target in mixed]
        if not isinstance(images, Tensor):
            return mixed_images, mixed_targets
        stacked = torch.stack(mixed_images) if mixed else images
        return wrap_like(stacked, images, image_size(stacked)), mixed_targets


class MixedDataset(HasEpoch, Dataset[tuple[Tensor, Target]]):
    """A map-style detection data set, each sample mixed with one drawn from all the others.

    Costs a second decode for each mixed sample; a mixer on the batch costs none, but finds its
    partners within the batch.

    Args:
        dataset: Yields (image, target) by index and has a length.
        mix: The mixer, such as `DetectionMixUp`.
        seed: With a seed, whether a sample is mixed, its partner and how they are mixed are
            a function of (seed, epoch, index) alone: call `set_epoch` at the start of each
            epoch. One within another, whatever lies between, draws its own; side by side, as in a
            ``ConcatDataset``, equal seeds draw alike: give each a seed of its own. With None
            they come from torch's global generator.
    """

    def __init__(
        self, dataset: Dataset[Any], mix: DetectionMixer, *, seed: int | None = None
    ) -> None:
        self.dataset = dataset
        self.mix = mix
        self.seed = seed
        # Each of several one within the other, and a mixer on the batch, draw their own.
        depth = sum(isinstance(part, MixedDataset) for part in held_by(self))
        self._stream = f"mixing/dataset/{depth}"

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def draw_params(self, index: int) -> MixParams | None:
        """Draw a sample's partner in the data set and how they are mixed; None if it is not.

        With a seed, always the same within an epoch.
        """
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} samples")
        index %= size
        if self.seed is None:
            (seed,) = draw_seeds(1)
        else:
            seed = sample_seed(self.seed, self.mix.epoch, index, self._stream)
        rng = random.Random(seed)
        how = self.mix.draw(rng)
        if how is None or size == 1:
            return None
        partner = rng.randrange(size - 1)
        partner += partner >= index  # every index but its own is equally likely
        return MixParams(partner, how)

    def __getitem__(self, index: int) -> Sample:
        params = self.draw_params(index)
        index %= len(self)
        if params is None:
            return self.mix.transform([self.dataset[index]], [None], numbers=[index])[0]
        pair = [self.dataset[index], self.dataset[params.partner]]
        in_pair = MixParams(1, params.how)
        return self.mix.transform(pair, [in_pair, None], numbers=[index, params.partner])[0]


class RatioMixer(DetectionMixer):
    """Draws a ratio λ from Beta(alpha, alpha) with chance ``p``, but not in the last epochs."""

    def __init__(
        self, alpha: float, p: float, epochs: int | None, off_epochs: int, **reading: Any
    ) -> None:
        super().__init__(**reading)
        if not 0.0 < alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {alpha}")
        check_share("p", p)
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs must be positive, got {epochs}")
        if off_epochs and not 0 < off_epochs < (epochs or 0):
            raise ValueError(f"off_epochs must be from 0 and below {epochs=}, got {off_epochs}")
        self.alpha = alpha
        self.p = p
        self.epochs = epochs
        self.off_epochs = off_epochs

    @property
    def active(self) -> bool:
        """Whether this epoch mixes at all."""
        return not self.off_epochs or self.epoch < (self.epochs or 0) - self.off_epochs

    def draw(self, rng: random.Random) -> Any | None:
        """Draw λ, or None where a sample is not mixed."""
        if not self.active or rng.random() >= self.p:
            return None
        return rng.betavariate(self.alpha, self.alpha)


class RandomChoice(DetectionMixer):
    """Picks a mixer for each sample, and leaves to it whether and how the sample is mixed.

    Each mixer keeps its own ``p`` and its own schedule: where the one picked does not mix, the
    sample stays as it is. It serves wherever a mixer does.

    Args:
        mixers: The mixers to choose from, at least one; with the same ``keys`` and
            ``target_getter`` all, as a batch is read before it is chosen.
        probabilities: How likely each is picked, relative to the others; None for all alike.
    """

    def __init__(
        self, mixers: Sequence[DetectionMixer], probabilities: Sequence[float] | None = None
    ) -> None:
        mixers = list(mixers)
        if not mixers:
            raise ValueError("mixers must hold at least one mixer, got none")
        for number, mixer in enumerate(mixers):
            if not isinstance(mixer, DetectionMixer):
                raise TypeError(f"mixers[{number}] must be a DetectionMixer, got {mixer!r}")
            first, own = ((sorted(m.keys), m.target_getter) for m in (mixers[0], mixer))
            if own != first:
                what = f"keys and target_getter, got {first} and {own} of mixers[{number}]"
                raise ValueError(f"mixers must all have the same {what}")
        super().__init__(keys=mixers[0].keys, target_getter=mixers[0].target_getter)
        self.mixers: Sequence[DetectionMixer] = nn.ModuleList(mixers)  # type: ignore[assignment]
        self.probabilities = _shares(len(mixers), probabilities)
        self.set_epoch(max(mixer.epoch for mixer in mixers))

    @property
    def active(self) -> bool:
        """Whether any of the mixers mixes in this epoch."""
        return any(mixer.active for mixer in self.mixers)

    def draw(self, rng: random.Random) -> tuple[int, Any] | None:
        """Pick a mixer and let it draw: its number and what it drew, or None if it does not mix."""
        number = rng.choices(range(len(self.mixers)), self.probabilities)[0]
        how = self.mixers[number].draw(rng)
        return None if how is None else (number, how)

    def mix_pair(self, sample_a: Sample, sample_b: Sample, how: tuple[int, Any]) -> Sample:
        """Mix two checked samples with the mixer picked."""
        number, drawn = how
        return self.mixers[number].mix_pair(sample_a, sample_b, drawn)


def _is_packed(batch: Any) -> bool:
    """Tell a pair (images, targets) from two samples (image, target)."""
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    targets = batch[1] if is_pair else None
    return isinstance(targets, (tuple, list)) and not any(isinstance(t, Tensor) for t in targets)


def _shares(num: int, probabilities: Sequence[float] | None) -> tuple[float, ...]:
    """Return the probabilities, one for each of ``num`` mixers, with a sum of 1."""
    given = [1.0] * num if probabilities is None else [float(value) for value in probabilities]
    valid = len(given) == num and all(0.0 <= value < math.inf for value in given)
    if not valid or not 0 < sum(given) < math.inf:
        expected = f"{num} finite numbers from 0, and not all 0"
        raise ValueError(f"probabilities must be {expected}, got {probabilities}")
    return tuple(value / sum(given) for value in given)
