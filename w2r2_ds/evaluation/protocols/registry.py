"""The registry of scoring protocols, and the "Overall" of the W2R2 paper.

A protocol is one way to score the answers of one task, named ``task/protocol``. Built-in protocols are registered when
the package ``w2r2_ds.evaluation.protocols`` is imported; a file given with ``--plugin`` may register others.
docs/reference/metrics/ lists which published numbers each protocol is comparable with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from w2r2_ds.evaluation.metrics.captions import MetricValue
from w2r2_ds.evaluation.protocols.records import AnswerRecord, Coordinates, Proposals, RecordFields
from w2r2_ds.utils.registry import Registry

ProtocolResult = dict[str, Any]
"""Result of a protocol: scores, counts and scores per item, as JSON values."""
KeyPath = tuple[str, ...]
"""Nested keys of a number in a `ProtocolResult`."""


@dataclass(frozen=True)
class ItemTerms:
    """What one record contributes to metrics that are a ratio of two sums over records.

    Attributes:
        groups: the protocol's groups that the record is in, besides the whole set.
        sums: metric -> (numerator, denominator); the score of a set is sum(numerators) / sum(denominators).
    """

    groups: tuple[str, ...]
    sums: Mapping[str, tuple[float, float]]


def records_only(records: Sequence[AnswerRecord], proposals: Proposals | None) -> tuple[Any, ...]:
    """Arguments of a score function that takes the records themselves."""
    return (records,)


@dataclass(frozen=True)
class Protocol:
    """One way to score one task.

    Attributes:
        name: ``task/protocol``.
        description: one sentence.
        source: repository and file of the evaluator whose numbers it reproduces.
        score: the score function; its arguments are those that `inputs` returns.
        metrics: the metrics that papers print: name -> path in the result.
        best_by: the metric of `metrics` that selects the best checkpoint if ``train.best_by`` is empty.
        inputs: (records of one task, detected boxes or None without ``--proposals``) -> arguments of `score`.
        record_model: pydantic model of the record fields that `inputs` reads; validates saved predictions.
        default: whether it is used if no protocol is named; of several such protocols that can score the answers, the
            one with the fewest `coordinates`.
        coordinates: coordinates of boxes that the protocol can score; ignored for tasks that do not answer with a box.
        needs_proposals: whether detected boxes must be given with ``--proposals``.
        item_terms: result of `score` -> terms of every record, in the order of the records. A metric that is not a
            ratio of sums, such as BLEU of a corpus, has none; then confidence intervals of it are not computed.
        extra_metrics: metrics that validation during training logs in addition to `metrics`: name -> path in the
            result.
    """

    name: str
    description: str
    source: str
    score: Callable[..., ProtocolResult]
    metrics: Mapping[str, KeyPath]
    best_by: str
    inputs: Callable[[Sequence[AnswerRecord], Proposals | None], tuple[Any, ...]] = records_only
    record_model: type[RecordFields] = RecordFields
    default: bool = False
    coordinates: tuple[str, ...] = get_args(Coordinates)
    needs_proposals: bool = False
    item_terms: Callable[[ProtocolResult], list[ItemTerms]] | None = None
    extra_metrics: Mapping[str, KeyPath] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The first part of the name."""
        return self.name.partition("/")[0]

    def score_records(self, records: Sequence[AnswerRecord], proposals: Proposals | None = None) -> ProtocolResult:
        """Score records of this protocol's task."""
        return self.score(*self.inputs(records, proposals))

    def printed(self, result: Mapping[str, Any]) -> dict[str, MetricValue]:
        """Value of each of `metrics` in a result."""
        return {name: number_at(result, path) for name, path in self.metrics.items()}


PROTOCOLS: Registry[Protocol] = Registry("protocol")


def register_protocol(protocol: Protocol) -> Protocol:
    """Add a protocol to `PROTOCOLS`.

    Raises:
        ValueError: the name is not ``task/protocol`` or is taken, or `best_by` is not one of the metrics.
    """
    if not all(protocol.name.partition("/")):
        raise ValueError(f"Protocol {protocol.name!r} must be named task/protocol, such as scanqa/leo.")
    if protocol.best_by not in protocol.metrics:
        raise ValueError(f"best_by of protocol {protocol.name} is {protocol.best_by!r}, which is not in its metrics.")
    known = PROTOCOLS.get(protocol.name)
    # A plug-in file may be imported twice in one process; it registers an equal protocol again.
    if known is not None and (known.description, known.source) != (protocol.description, protocol.source):
        raise ValueError(f"Protocol {protocol.name!r} is registered already ({known.source}); choose another name.")
    PROTOCOLS[protocol.name] = protocol
    return protocol


def find_protocol(name: str) -> Protocol:
    """The protocol ``task/protocol``; raises ValueError with the names of all protocols if there is none."""
    return PROTOCOLS.find(name)


def protocols_of(task: str) -> list[Protocol]:
    """All protocols of a task.

    Raises:
        ValueError: there are none; names the tasks that have some.
    """
    found = [each for each in PROTOCOLS.values() if each.task == task]
    if not found:
        tasks = ", ".join(sorted({each.task for each in PROTOCOLS.values()}))
        raise ValueError(
            f"Task {task!r} has no scoring protocol; it is one of {tasks}. Register one with register_protocol and "
            "name its file with --plugin."
        )
    return found


def number_at(result: Mapping[str, Any], path: KeyPath) -> MetricValue:
    """The number at a path of nested keys; None if it was not computed."""
    value: Any = result
    for key in path:
        value = value[key]
    return None if value is None else float(value)


def overall(
    acc_25: MetricValue, acc_50: MetricValue, bleu_4: MetricValue, cider: MetricValue, em: MetricValue
) -> MetricValue:
    """ "Overall" of the W2R2 paper's Table 2, in percent: the arithmetic mean of five numbers of three tasks.

    overall = 100 (Acc@0.25 + Acc@0.5 + BLEU-4 + CIDEr + EM) / 5

    The table's header gives BLEU-4 and CIDEr at IoU 0.25, the text at 0.5; the table's numbers for Video-3D-LLM are
    those of that paper at 0.5. The mean mixes fractions with CIDEr, which may exceed 1, and different protocols: report
    the five numbers too.

    Args:
        acc_25: ScanRefer's Acc@0.25, a fraction.
        acc_50: ScanRefer's Acc@0.5, a fraction.
        bleu_4: Scan2Cap's BLEU-4, a fraction.
        cider: Scan2Cap's CIDEr on its own scale (``metrics/captions.py``).
        em: ScanQA's exact match, a fraction.

    Returns:
        The mean; None if one of the five is None.
    """
    parts = [part for part in (acc_25, acc_50, bleu_4, cider, em) if part is not None]
    return 100 * sum(parts) / 5 if len(parts) == 5 else None
