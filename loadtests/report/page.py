"""The report of a run as one HTML file that loads nothing: verdict, figures, charts, definitions, surroundings.

It knows the document of `summary`; the page's text is in `templates/run.html.j2`. It computes nothing.
"""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from loadtests.generator.saturation import answer
from loadtests.report import charts
from loadtests.report.tables import render


def page(document: Mapping[str, Any]) -> str:
    """The whole page."""
    found = document["run"].get("saturation")
    return render(
        "run.html.j2",
        document,
        search=found,
        answer=answer(found) if found else None,
        distributions=[Markup(charts.draw(chart)) for chart in charts.distributions(document)],
        courses=[Markup(charts.draw(chart)) for chart in charts.course(document)],
    )
