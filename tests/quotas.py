"""What a quota says of one more request."""

from borg_serve.api.errors import ApiError
from borg_serve.gate.keys import Key
from borg_serve.gate.quota import Quota


async def refusal(quota: Quota, key: Key, tokens: int = 0) -> ApiError | None:
    """The error of one more request that costs so much and is over at once, None if it is admitted."""
    try:
        await quota.begin(key)
    except ApiError as error:
        return error
    await quota.end(key, tokens)
    return None


def retry_after_s(error: ApiError) -> int:
    return int(error.headers["retry-after"])
