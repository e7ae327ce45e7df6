"""What may be asked of `/v1/usage`, in its query.

It does not know whose usage it is, nor how it is stored.
"""

from urllib.parse import parse_qsl

from borg_serve.api.errors import invalid
from borg_serve.errors import ConfigError
from borg_serve.usage.report import moment, this_month

__all__ = ["asked"]

PERIODS = ("day", "hour", "month")


def asked(query: bytes) -> tuple[str, str | None, str]:
    """(first moment, the moment after the last or None, `day`, `hour` or `month`). Moments are ISO 8601 in UTC.

    Raises ApiError 400, naming the parameter.
    """
    given = dict(parse_qsl(query.decode("latin-1")))
    if unknown := sorted(given.keys() - {"since", "until", "by"}):
        raise invalid(unknown[0][:40], "is not known; use since, until and by")
    if (by := given.get("by", "day")) not in PERIODS:
        raise invalid("by", f"must be one of {', '.join(PERIODS)}")
    since = _moment(given, "since") or this_month().isoformat()
    return since, _moment(given, "until"), by


def _moment(given: dict[str, str], name: str) -> str | None:
    try:
        return moment(name, given[name]).isoformat() if name in given else None
    except ConfigError:
        raise invalid(name, "must be a day or an hour in UTC, as 2026-11-01 or 2026-11-01T13") from None
