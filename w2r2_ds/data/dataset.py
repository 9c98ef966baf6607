"""The dataset class, and the mixture of prepared data sets that a data configuration names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch.utils.data import Dataset

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.prepared_set import MANIFEST, PreparedSet
from w2r2_ds.data.processor import Features
from w2r2_ds.data.tasks.base import TASKS
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.plugins import ImportsPlugins


class SampleDataset(ImportsPlugins, Dataset[Features]):
    """Map-style dataset that processes a sample on access.

    Spawned loader workers import the plug-ins before they unpickle it.

    Args:
        samples: the samples.
        processor: (sample, with_answer) -> features.
        with_answer: True for prompt and answer (training), False for the prompt only (generation).
    """

    def __init__(
        self, samples: Sequence[Sample], processor: Callable[[Sample, bool], Features], with_answer: bool
    ) -> None:
        self.samples, self.processor, self.with_answer = samples, processor, with_answer

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Features:
        return self.processor(self.samples[index], self.with_answer)


def load_mixture(config: DataConfig, split: str) -> Mixture:
    """Open the prepared data sets of a split.

    Args:
        config: data configuration.
        split: ``"train"`` or ``"val"``.

    Raises:
        ValueError: a data set is missing, damaged or of a task that is not registered, or a training epoch is empty.
    """
    sources = {"train": config.train, "val": config.val}[split]
    sets = [PreparedSet(Path(config.root) / source.path, config.root) for source in sources]
    for prepared in sets:
        TASKS.find(prepared.task)  # raises now, not at the first batch, if the task of a plug-in is missing
    mixture = Mixture(sets, [source.weight for source in sources], [source.cap for source in sources])
    if split == "train" and mixture.epoch_size == 0:
        sizes = ", ".join(f"{prepared.folder / MANIFEST} ({len(prepared)})" for prepared in sets)
        raise ValueError(
            f"A training epoch has no samples: {sizes}, times the weights in data.train; see skipped.jsonl beside "
            "each manifest and prepare the data set again, or raise the weight."
        )
    return mixture


def check_frames_are_shared(mixture: Mixture, questions_per_scene: int) -> None:
    """Check that samples share frames, which `data.questions_per_scene` above 1 requires.

    Raises:
        ValueError: the frames of a data set were drawn per sample (``frames.protocol`` vgllm).
    """
    if questions_per_scene == 1:
        return
    for prepared in mixture.sets:
        if isinstance(prepared, PreparedSet) and prepared.manifest["options"]["frames"].get("protocol") == "vgllm":
            raise ValueError(
                f"{prepared.folder / MANIFEST}: frames.protocol is vgllm, which draws different frames for every "
                f"sample, but data.questions_per_scene {questions_per_scene} needs samples that share frames; prepare "
                "the data set with scene_sets (or uniform, coverage, list), or set it to 1."
            )


def digests(mixture: Mixture) -> list[str]:
    """Digest of each prepared data set of a mixture; equal digests mean equal samples. Other sources have none."""
    return [samples.digest for samples in mixture.sets if isinstance(samples, PreparedSet)]
