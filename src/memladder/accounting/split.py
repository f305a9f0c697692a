"""The ledger of a record: what it read, what its framework told, what follows from shapes.

Nothing is forced to close: what no entry explains is the residual. Old records carry less, and
their ledgers say so entry by entry (`Known`).
"""

from __future__ import annotations

from collections.abc import Iterator

from memladder.core.errors import RecordError
from memladder.core.ledger import Entry, Known, Ledger, closing
from memladder.core.prediction import Prediction
from memladder.core.record import PhaseUse, Record, Run, Status
from memladder.predictor import evidence

# What frameworks call what they tell, and the ledger's category.
_TOLD = {
    "weights": "weights",
    "tables": "scales",
    "embeddings": "embeddings",
    "kv_cache": "kv_cache",
    "workspace": "workspace",
    "arena": "activations",
}
# Taken over from the rules where a record does not tell them.
_DERIVED = ("inputs_outputs", "activations", "workspace", "kv_cache", "driver_step")
_PAGE = 2 << 20


def ledger(record: Record, known: evidence.Compared | None = None) -> Ledger:
    """Of the run whose steady bytes are the median. Raises RecordError for one not measured.

    `known` is the record's prediction where it was made already.
    """
    run, total = _median_run(record)
    rules = known.prediction if known else _rules(record)
    if record.case.device == "cpu":
        return closing(total, _on_cpu(run, rules), "shared pages, heap")
    note = None if rules else "no rules for this row"
    return closing(total, _on_gpu(run, rules), note)


def phase_bytes(record: Record) -> list[tuple[str, int, int]]:
    """Name, highest and last reading of each phase of that run."""
    run, _ = _median_run(record)
    return [(phase.name, phase.peak_bytes, phase.end_bytes) for phase in run.phases]


def _median_run(record: Record) -> tuple[Run, int]:
    if record.status is not Status.MEASURED:
        raise RecordError(f"{record.case.id}: {record.status} has no measured bytes to explain")
    runs = sorted(record.runs, key=lambda run: run.steady_bytes)
    run = runs[len(runs) // 2]
    return run, run.steady_bytes


def _rules(record: Record) -> Prediction | None:
    (compared,) = evidence.compare([record])
    return compared.prediction


def _phase(run: Run, name: str) -> PhaseUse | None:
    return next((phase for phase in run.phases if phase.name == name), None)


def _on_gpu(run: Run, rules: Prediction | None) -> Iterator[Entry]:
    told, derived = run.categories, _amounts(rules)
    context = _phase(run, "context")
    read = context.end_bytes if context is not None else 0
    yield Entry("context", read, Known.DIFFERENCE, "after its phase")
    sizes = {category: told[name] for name, category in _TOLD.items() if name in told}
    for category, size in sizes.items():
        yield Entry(category, size, Known.TOLD)
    if "arena" in told:
        # Two blocks of the driver's, each of whole pages.
        blocks = (told["weights"], told["arena"] + told.get("workspace", 0))
        derived["driver_step"] = sum(-size % _PAGE for size in blocks)
    for category in _DERIVED:
        if category == "activations" and "allocator_steady_peak" in told:
            continue
        if category not in sizes and derived.get(category):
            yield Entry(category, derived[category], Known.DERIVED, _note(rules, category))
            sizes[category] = derived[category]
    highest = told.get("allocator_steady_peak")
    if highest is not None:
        rest = sum(size for name, size in sizes.items() if name != "activations")
        sizes["activations"] = highest - rest
        note = "the allocator's peak while steady, less what is held"
        yield Entry("activations", sizes["activations"], Known.DIFFERENCE, note)
    reserved = told.get("allocator_reserved")
    if reserved is not None:
        slack = reserved - sum(sizes.values())
        yield Entry("allocator_slack", slack, Known.DIFFERENCE, "reserved, less what is in use")
    elif derived.get("allocator_slack"):
        yield Entry("allocator_slack", derived["allocator_slack"], Known.DERIVED)
    # What the import had loaded already is in the context's reading.
    early = max(read - derived.get("context", read), 0)
    yield Entry("modules", max(derived.get("modules", 0) - early, 0), Known.ASSUMED)


def _amounts(rules: Prediction | None) -> dict[str, int]:
    if rules is None:
        return {}
    return {entry.category: entry.nbytes for entry in rules.ledger.entries}


def _note(rules: Prediction | None, category: str) -> str | None:
    entry = rules.ledger.get(category) if rules else None
    return entry.note if entry else None


def _on_cpu(run: Run, rules: Prediction | None) -> Iterator[Entry]:
    """PSS by phase: what the import took, what the framework tells, and the rules' rest."""
    told, derived = run.categories, _amounts(rules)
    imported = _phase(run, "import")
    if imported is not None:
        yield Entry("libraries", imported.end_bytes, Known.DIFFERENCE, "interpreter and imports")
    for name, category in _TOLD.items():
        if told.get(name):
            yield Entry(category, told[name], Known.TOLD)
    if "arena" not in told and derived.get("activations"):
        yield Entry("activations", derived["activations"], Known.DERIVED)
    if derived.get("heap"):
        yield Entry("heap", derived["heap"], Known.ASSUMED, _note(rules, "heap"))
