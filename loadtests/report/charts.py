"""The charts of a run: the distributions of its latencies and its course by the second, as data and as SVG.

It knows the document of `summary`. It does not know the page.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loadtests.generator.records import from_dict

Points = Sequence[tuple[float, float | None]]
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
MARK = "#b3372b"


@dataclass(frozen=True)
class Series:
    """One line; a point whose y is None was not measured."""

    label: str
    points: Points
    kind: Literal["line", "steps", "bars"] = "line"


@dataclass(frozen=True)
class Chart:
    """Lines over a common x; `mark` is an upright line and its name."""

    title: str
    x_name: str
    y_name: str
    series: Sequence[Series]
    log_x: bool = False
    y_top: float | None = None
    mark: tuple[float, str] | None = None


def distributions(document: Mapping[str, Any]) -> list[Chart]:
    """Empirical distribution functions of the requests that ended well, with the SLO's bounds."""
    ok = [record for record in map(from_dict, document["records"]) if record.ok]
    bounds = document["slo"]["bounds"] if document["slo"] else {}

    def chart(metric: str, series: Sequence[Series], x_name: str, of: str = "requests") -> Chart:
        names = [name for name in bounds if name.startswith(f"{metric}_p")]
        mark = (bounds[names[-1]], names[-1].removesuffix("_ms").replace("_", " ")) if names else None
        return Chart(f"{metric.upper()}, share of {of}", x_name, "share", series, True, 1, mark)

    def both(metric: str) -> list[Series]:
        corrected = {"from schedule": True, "from sending": False}
        return [_cdf(label, (r.metric_ms(metric, schedule) for r in ok)) for label, schedule in corrected.items()]

    return [
        chart("ttft", both("ttft"), "TTFT, ms"),
        chart("e2e", both("e2e"), "E2E, ms"),
        chart("tpot", [_cdf("TPOT", (record.tpot_ms() for record in ok))], "TPOT, ms"),
        chart("itl", [_cdf("ITL", (gap / 1e3 for r in ok for gap in r.itl_us))], "gap between events, ms", "gaps"),
    ]


def _cdf(label: str, values: Iterable[float | None]) -> Series:
    """The distribution function in at most 400 steps."""
    known = [max(value, 1e-3) for value in values if value is not None]
    shares = np.linspace(0, 1, min(len(known), 400) + 1)
    points = np.quantile(known, shares, method="inverted_cdf") if known else np.array([])
    return Series(label, list(zip(points.tolist(), shares.tolist(), strict=False)), "steps")


def course(document: Mapping[str, Any]) -> list[Chart]:
    """The run second by second, and what the server showed meanwhile."""

    def column(label: str, name: str, kind: Literal["line", "bars"] = "line") -> Series:
        return Series(label, [(row["second"] or 0.0, row.get(name)) for row in document["course"]], kind)

    second = "second of the run"
    arrivals = [column("arrivals", "arrivals", "bars"), column("requests open", "open")]
    queue = [column("running", "running"), column("waiting", "waiting")]
    cache = [column("prompt tokens from cache", "cache_hits"), column("KV cache in use", "kv_usage")]
    return [
        Chart("Arrivals and open requests", second, "requests", arrivals),
        Chart("Output tokens", second, "tokens/s", [column("output tokens", "output_tokens")]),
        Chart("In the server: running and waiting", second, "requests", queue),
        Chart("Prefix cache", second, "share", cache, y_top=1),
    ]


def draw(chart: Chart) -> str:
    """An `<svg>` element that loads nothing. Without any point it says so."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(Path(__file__).with_name("charts.mplstyle")):
        figure = Figure(figsize=(5.6, 2.7))
        axes = figure.subplots(gridspec_kw={"left": 0.12, "right": 0.96, "bottom": 0.18, "top": 0.89})
        axes.set(title=chart.title, xlabel=chart.x_name, ylabel=chart.y_name)
        drawn = [one for one in chart.series if any(y is not None for _, y in one.points)]
        for index, one in enumerate(drawn):
            _plot(axes, one, index)
        if drawn:
            _scale(axes, chart)
        else:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes)
        if len(drawn) > 1:
            axes.legend(loc="best")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=NO_METADATA)
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


def _plot(axes: Any, series: Series, index: int) -> None:
    x, y = zip(*[point for point in series.points if point[1] is not None], strict=True)
    look = {"color": f"C{index}", "label": series.label}
    if series.kind == "bars":
        axes.fill_between(x, y, step="mid", alpha=0.35, **look)
    else:
        look |= {"drawstyle": "steps-post"} if series.kind == "steps" else {}
        look |= {"linestyle": "--"} if index else {}  # lines on top of each other are both to be seen
        axes.plot(x, y, marker="o" if len(x) == 1 else "", linewidth=1.6, **look)


def _scale(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if chart.log_x:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(6))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_ylim(0, chart.y_top)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"))
    if chart.mark and chart.mark[0] < 3 * axes.get_xlim()[1]:
        axes.axvline(chart.mark[0], color=MARK, linestyle=":")
        look = {"color": MARK, "ha": "right", "va": "top", "transform": axes.get_xaxis_transform()}
        axes.text(chart.mark[0], 0.98, f"{chart.mark[1]} ", **look)
