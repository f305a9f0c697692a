"""The page: data and what shows it, in one file that asks nothing of anybody.

What comes from records is in two blocks of JSON, in which no character can end a block; a policy
allows the page's own style and script by their hashes, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from memladder import __version__
from memladder.core import serial
from memladder.core.errors import UsageError
from memladder.predictor.model import Model
from memladder.reports.cells import system_label
from memladder.reports.html import comparison, fitting, rows
from memladder.reports.html.rows import Shown

_SCRIPTS = ("base", "figure", "cell", "compare", "table", "fit", "main")
# None of these can stand in a block of JSON: `</script>` and `<!--` would end or change it, and the
# separators end a line in old readers of JavaScript.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def page(
    stores: Sequence[Shown],
    *,
    systems: Sequence[str] = (),
    published: Mapping[str, int] | None = None,
    published_name: str = "",
    models: Sequence[Model] = (),
) -> str:
    """The page of one or more stores; the first two are compared.

    `systems` come first, in their order; `published` are MiB by case id, drawn over cells of the
    same layers; `models` are those that the form asks about. Raises UsageError without records.
    """
    if not any(store.records for store in stores):
        raise UsageError("there are no records to report")
    light, heavy, environments = _cells(stores, systems, published or {})
    first = {
        "version": __version__,
        "stores": [store.name for store in stores],
        "publishedName": published_name,
        "rows": light,
        "compared": (
            comparison.compare(stores[0].records, stores[1].records) if len(stores) > 1 else None
        ),
        "fit": fitting.tables(tuple(models)) if models else None,
    }
    return _filled(first, {"cells": heavy, "environments": environments})


def _cells(
    stores: Sequence[Shown], systems: Sequence[str], published: Mapping[str, int]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Rows and details in the page's order, and the environments that the details count."""
    environments: dict[str, int] = {}
    made = []
    for number, store in enumerate(stores):
        known = rows.compare_all(store.records)
        for record, prediction in zip(store.records, known, strict=True):
            light = rows.row(record, store.verifications, number, prediction, published)
            heavy = rows.detail(record, prediction)
            environment = serial.dumps(record.environment)
            heavy["environment"] = environments.setdefault(environment, len(environments))
            place = systems.index(record.case.framework) if record.case.framework in systems else 99
            shape = record.case.shape
            order = (record.case.model, record.case.layers != 1, shape.tokens, shape, place)
            made.append(((*order, system_label(record.case.framework), number), light, heavy))
    # By the key alone: two cells may tie, and dictionaries have no order.
    made.sort(key=lambda item: item[0])
    light_rows, heavy_rows = [item[1] for item in made], [item[2] for item in made]
    return light_rows, heavy_rows, [serial.loads(text) for text in environments]


def _filled(first: Mapping[str, Any], later: Mapping[str, Any]) -> str:
    style = _asset("style.css")
    script = "".join(["'use strict';\n(() => {\n", *(_asset(f"{n}.js") for n in _SCRIPTS), "})();"])
    parts = {
        "{{policy}}": (
            f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
            "base-uri 'none'; form-action 'none'"
        ),
        "{{style}}": style,
        "{{script}}": script,
        "{{rows}}": embedded(first),
        "{{details}}": embedded(later),
    }
    # The template alone is searched for names, and never what a record says.
    pieces = re.split(r"(\{\{\w+\}\})", _asset("page.html"))
    return "".join(parts.get(piece, piece) for piece in pieces)


def embedded(data: object) -> str:
    r"""JSON that can stand in a `script` element, whatever its texts say.

    >>> embedded("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    # A lone half of a pair of surrogates is no character of UTF-8.
    return text.translate(_ESCAPES).encode("utf-8", "replace").decode()


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
