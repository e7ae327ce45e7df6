"""The report of a run as one HTML file that loads nothing: verdict, figures, plots, definitions, surroundings.

It knows the document of `summary`. It computes nothing but curves.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loadtests.records import from_dict
from loadtests.saturation import answer
from loadtests.svg import Series, plot

__all__ = ["page"]

STYLE = """
body{font:15px/1.5 system-ui,"DejaVu Sans",sans-serif;color:#1d2733;background:#f6f7f9;margin:0}
main{max-width:1180px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:24px;margin:0 0 2px}h2{font-size:17px;margin:30px 0 8px}p{margin:6px 0}
.sub{color:#5b6776}
.banner{border-radius:8px;padding:12px 16px;margin:16px 0;font-weight:600;color:#fff}
.met{background:#2e7d4f}.unmet{background:#b3372b}.void{background:#6b4b8a}.open{background:#4d5b6b}
.banner ul{margin:6px 0 0;padding-left:20px;font-weight:400}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(230px,45%),1fr));gap:10px}
.tile{background:#fff;border:1px solid #dfe4ea;border-radius:8px;padding:10px 12px}
.tile b{display:block;font-size:20px;font-variant-numeric:tabular-nums}.tile span{color:#5b6776;font-size:13px}
table{border-collapse:collapse;background:#fff;border:1px solid #dfe4ea;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:5px 10px;border-bottom:1px solid #eceff3;text-align:right;font-size:14px}
th:first-child,td:first-child{text-align:left}th{background:#eef1f5;font-weight:600}
.wide{overflow-x:auto}
.words td{overflow-wrap:anywhere;text-align:left;vertical-align:top}
.words td:first-child{font-weight:600;overflow-wrap:normal;min-width:90px}
.yes{color:#2e7d4f;font-weight:600}.no{color:#b3372b;font-weight:700}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:12px}
.plots svg{background:#fff;border:1px solid #dfe4ea;border-radius:8px;width:100%;height:auto;padding:8px;
box-sizing:border-box}
svg text{font:11px system-ui,"DejaVu Sans",sans-serif;fill:#3a4653}svg .title{font-size:13px;font-weight:600}
svg .x,svg .none{text-anchor:middle}svg .y{text-anchor:end}
svg .grid{stroke:#e8ecf0}svg .axis{stroke:#8794a3}svg .mark{stroke:#b3372b;stroke-dasharray:4 3}
@media print{body{background:#fff}.plots svg{break-inside:avoid}}
"""

NAMES = {
    "ttft_from_schedule": "TTFT from schedule",
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2e_from_schedule": "E2E from schedule",
    "e2e": "E2E",
    "lag": "schedule lag of the generator",
}


def page(document: Mapping[str, Any]) -> str:
    """The whole page."""
    run, figures = document["run"], document["figures"]
    options = run["options"]
    title = f"Load report: {run['profile']} at {options['rate']:g} requests/s"
    sub = f"{options['workload']} on {options['host']}, {options['duration']:g} s of arrivals, seed {options['seed']}"
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><main>',
        f'<h1>{html.escape(title)}</h1><p class="sub">{html.escape(sub)}</p>',
        banner(document),
        tiles(figures),
        slo(document),
        "<h2>Latency of the requests that ended well, ms</h2>",
        latency(figures["latency_ms"]),
        f'<h2>Distributions</h2><div class="plots">{"".join(curves(document))}</div>',
        f'<h2>Course</h2><div class="plots">{"".join(timeline(document))}</div>',
        search(run.get("saturation")),
        "<h2>How requests ended</h2>",
        table(["outcome", "requests"], [*figures["outcomes"].items(), *figures["details"].items()]),
        "<h2>Server and clients side by side</h2>",
        f"<p>Token totals: {html.escape(document['agreement']['verdict'])}.</p>",
        agreement(document["agreement"]["rows"]),
        "<h2>Definitions</h2>",
        words(document["definitions"]),
        "<h2>Surroundings</h2>",
        words({"workload": document["workload"], **_flat(document["environment"]), **_flat(document["server"])}),
        "<h2>Calibration of the generator</h2>",
        calibration(document["calibration"], figures),
        "<h2>Settings of the run</h2>",
        words({name: value for name, value in options.items() if value is not None}),
        "</main></body></html>\n",
    ]
    return "".join(parts)


def banner(document: Mapping[str, Any]) -> str:
    if document["void"]:
        kind, text = "void", "Void: these figures say nothing about the server."
    elif document["met"] is None:
        kind, text = "open", "No SLO was given."
    elif found := document["run"].get("saturation"):
        kind, text = "met" if document["met"] else "unmet", answer(found)
    else:
        kind, text = ("met", "The SLO is met.") if document["met"] else ("unmet", "The SLO is not met.")
    items = "".join(f"<li>{html.escape(line)}</li>" for line in [*document["void"], *document["notes"]])
    return f'<div class="banner {kind}">{text}{f"<ul>{items}</ul>" if items else ""}</div>'


def tiles(figures: Mapping[str, Any]) -> str:
    cached, cpu = figures["cached_part"], figures["generator_cpu_part"]
    failed = figures["requests"] - figures["ok"]
    shown = [
        (f"{figures['ok']} / {figures['requests']}", "requests ended well"),
        (f"{100 * failed / max(1, figures['requests']):.2g} %", "errors"),
        (f"{figures['requests_per_s']:.2f}", "requests/s that ended well"),
        (f"{figures['output_tokens_per_s']:.1f}", "output tokens/s"),
        *([(f"{figures['goodput']:.2f}", "goodput, requests/s")] if "goodput" in figures else []),
        ("unknown" if cached is None else f"{100 * cached:.0f} %", "prompt tokens from cache"),
        (f"{figures['peak']['streams']:.0f}", "streams at once, busiest process"),
        ("unknown" if cpu is None else f"{100 * cpu:.0f} %", "of one core for the generator"),
    ]
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for value, name in shown)
    return f'<div class="tiles">{cells}</div>'


def slo(document: Mapping[str, Any]) -> str:
    if not document["verdicts"]:
        return ""
    rows = [
        [
            row["name"],
            number(row["bound"]),
            number(row["measured"]),
            f'<span class="{"yes" if row["met"] else "no"}">{"met" if row["met"] else "not met"}</span>',
            str(row["samples"]),
        ]
        for row in document["verdicts"]
    ]
    corrected = document["slo"]["bounds"]["schedule_corrected"]
    sentence = "Latencies count from " + ("the schedule." if corrected else "sending: client queueing is left out.")
    heads = ["bound on", "bound", "measured", "verdict", "samples"]
    body = table(heads, rows, escaped=True)
    return f"<h2>SLO {html.escape(document['slo']['file'])}</h2>{body}<p class='sub'>{sentence}</p>"


def latency(metrics: Mapping[str, Mapping[str, float | None]]) -> str:
    columns = ["mean", "p50", "p90", "p95", "p99", "max", "count"]
    rows = [[NAMES[name], *(number(row[column]) for column in columns)] for name, row in metrics.items()]
    return table(["", *columns], rows)


def curves(document: Mapping[str, Any]) -> Iterable[str]:
    """Empirical distribution functions."""
    records = [from_dict(record) for record in document["records"]]
    ok = [record for record in records if record.ok]
    bounds = document["slo"]["bounds"] if document["slo"] else {}

    def mark(metric: str) -> tuple[float, str] | None:
        names = [name for name in bounds if name.startswith(f"{metric}_p")]
        return (bounds[names[-1]], names[-1].removesuffix("_ms").replace("_", " ")) if names else None

    for metric in ("ttft", "e2e"):
        series = [
            Series("from schedule", cdf([record.metric_ms(metric, True) for record in ok])),
            Series("from sending", cdf([record.metric_ms(metric, False) for record in ok])),
        ]
        name = metric.upper()
        yield plot(
            f"{name}, share of requests", f"{name}, ms", "share", series, log_x=True, y_top=1, mark_x=mark(metric)
        )
    tpot = [Series("TPOT", cdf([record.tpot_ms() for record in ok]))]
    yield plot("TPOT, share of requests", "TPOT, ms", "share", tpot, log_x=True, y_top=1, mark_x=mark("tpot"))
    gaps = [Series("ITL", cdf([max(gap, 1) / 1e3 for record in ok for gap in record.itl_us]))]
    yield plot("ITL, share of gaps", "gap between events, ms", "share", gaps, log_x=True, y_top=1, mark_x=mark("itl"))


def cdf(values: Iterable[float | None]) -> list[tuple[float, float | None]]:
    """Steps of the distribution function, at most some hundred of them."""
    ordered = sorted(max(value, 1e-3) for value in values if value is not None)
    if not ordered:
        return []
    count = len(ordered)
    every = max(1, count // 400)
    kept = sorted({*range(0, count, every), count - 1})
    points: list[tuple[float, float | None]] = [(ordered[0], 0.0)]
    for index in kept:
        points += [(ordered[index], points[-1][1]), (ordered[index], (index + 1) / count)]
    return points


def timeline(document: Mapping[str, Any]) -> Iterable[str]:
    rows: Sequence[Mapping[str, float | None]] = document["course"]

    def column(name: str) -> list[tuple[float, float | None]]:
        return [(row["second"] or 0.0, row.get(name)) for row in rows]

    second = "second of the run"
    arrivals = [Series("arrivals", column("arrivals"), "bars"), Series("requests open", column("open"))]
    yield plot("Arrivals and open requests", second, "requests", arrivals)
    yield plot("Output tokens", second, "tokens/s", [Series("output tokens", column("output_tokens"))])
    queue = [Series("running", column("running")), Series("waiting", column("waiting"))]
    yield plot("In the server: running and waiting", second, "requests", queue)
    cache = [Series("prompt tokens from cache", column("cache_hits")), Series("KV cache in use", column("kv_usage"))]
    yield plot("Prefix cache", second, "share", cache, y_top=1)


def search(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    rows = [
        [
            f"{row['rate']:.3g}",
            f"{row['good']} of {row['requests']}",
            f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}",
            ("meets" if row["meets"] else "does not") + ("" if row["decided"] else ", not decided"),
        ]
        for row in sorted(found["rates"], key=lambda row: float(row["rate"]))
    ]
    heads = ["requests/s", "good requests", f"95% interval of the good part (needed: {found['need']:g})", "verdict"]
    return f"<h2>Saturation</h2><p>{answer(found)}</p>{table(heads, rows)}"


def agreement(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    shown = [
        [
            row["name"],
            f"{row['server']:,.0f}",
            "" if row["own"] is None else f"{row['own']:,.0f}",
            "not in usage" if row["clients"] is None else f"{row['clients']:,.0f}",
            "" if row["apart"] is None or "hits" in row["name"] else f"{100 * row['apart']:.2f} %",
        ]
        for row in rows
    ]
    said = "<p class='sub'>Cache hits are not judged: the watchdog's are among the server's, and unknown.</p>"
    heads = ["counter", "server", "of these the watchdog's", "clients, warm-up included", "apart"]
    return table(heads, shown) + said


def calibration(found: Mapping[str, Any] | None, figures: Mapping[str, Any]) -> str:
    if found is None:
        return "<p>None: <code>make calibrate</code> measures the generator against a server of known timing.</p>"
    peak = figures["peak"]
    sentence = (
        f"Of {found['date']}: accurate up to {found['streams_per_worker']} streams and "
        f"{found['events_per_s_per_worker']:,.0f} events/s a process. This run's busiest process had "
        f"{peak['streams']:.0f} streams and {peak['events_per_s']:,.0f} events/s."
    )
    heads = [
        "streams",
        "events/s",
        "TTFT error p50",
        "p99",
        "ITL error p50",
        "p99",
        "schedule lag p50",
        "p99",
        "within",
    ]
    rows = [
        [
            row["streams"],
            f"{row['events_per_s']:,.0f}",
            *(
                number(row[name][percent])
                for name in ("ttft_error_ms", "itl_error_ms", "lag_ms")
                for percent in ("p50", "p99")
            ),
            "yes" if row["within"] else "no",
        ]
        for row in found["levels"]
    ]
    return f"<p>{html.escape(sentence)}</p>{table(heads, rows)}<p class='sub'>Errors in ms.</p>"


def number(value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, escaped: bool = False, kind: str = "") -> str:
    """`escaped`: the cells are HTML already."""
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if escaped else html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}">{f"<tr>{top}</tr>" if heads else ""}{body}</table></div>'


def words(rows: Mapping[str, object]) -> str:
    return table([], rows.items(), kind="words")


def _flat(data: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in data.items():
        inner = {f"{name} {key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
        found |= inner
    return found
