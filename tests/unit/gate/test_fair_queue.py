"""Who is served next: in proportion to weights, whatever comes in which order, and nobody never."""

import heapq
import random
from collections import Counter, deque

from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.gate.fair_queue import FairQueue


def serve(queue: FairQueue[str]) -> str:
    """Start whoever is next."""
    name, tenant = next(queue.in_order())
    item, sequences, cost = tenant.waiting.popleft()
    queue.start(name, sequences, cost)
    return item


def put(queue: FairQueue[str], name: str, cost: float, weight: float = 1.0) -> None:
    queue.tenant(name, weight).waiting.append((name, 1, cost))


def test_queue_is_first_come_first_served_within_a_tenant() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "abc":
        queue.tenant("one").waiting.append((item, 1, 1.0))
    assert [serve(queue) for _ in range(3)] == ["a", "b", "c"]
    assert len(queue) == 0


def test_queue_serves_who_has_had_least() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(50):
        put(queue, "flood", 100)
    assert [serve(queue) for _ in range(5)] == ["flood"] * 5
    put(queue, "other", 100)
    assert [serve(queue), serve(queue)] == ["other", "flood"]


def test_queue_keeps_no_credit_for_a_pause() -> None:
    queue: FairQueue[str] = FairQueue()
    put(queue, "late", 10)
    serve(queue)
    queue.end("late", 1, 0)
    for _ in range(1000):
        put(queue, "steady", 10)
        serve(queue)
        queue.end("steady", 1, 0)
    for _ in range(100):
        put(queue, "steady", 10)
        put(queue, "late", 10)
    served = Counter(serve(queue) for _ in range(20))
    assert abs(served["late"] - served["steady"]) <= 2


def test_queue_corrects_what_was_estimated() -> None:
    queue: FairQueue[str] = FairQueue()
    put(queue, "long", 10)
    put(queue, "short", 10)
    for _ in range(2):
        serve(queue)
    queue.end("long", 1, 490)
    queue.end("short", 1, -5)
    for _ in range(200):
        put(queue, "long", 10)
        put(queue, "short", 10)
    assert Counter(serve(queue) for _ in range(50)) == {"short": 50}


def test_queue_forgets_tenants_that_owe_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(1000):
        put(queue, f"tenant {number}", 1)
        serve(queue)
        queue.end(f"tenant {number}", 1, 0)
        put(queue, "steady", 2)
        serve(queue)
        queue.end("steady", 1, 0)
    assert len(queue._tenants) <= 3


WEIGHTS = st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=6)


@settings(deadline=None, max_examples=30)
@given(WEIGHTS, st.integers(1, 8), st.integers(0, 2**32))
def test_queue_gives_tokens_by_weight_whatever_the_requests_cost(weights: list[float], slots: int, seed: int) -> None:
    """A simulated engine: every tenant always has more waiting, and its estimates are wrong."""
    queue: FairQueue[str] = FairQueue()
    rng = random.Random(seed)
    had: Counter[str] = Counter()
    running: list[tuple[float, int, str, float]] = []
    now, names = 0.0, [f"tenant {number}" for number in range(len(weights))]
    mean = {name: rng.choice([20, 100, 400]) for name in names}
    for step in range(3000):
        for name, weight in zip(names, weights, strict=True):
            while len(queue.tenant(name, weight).waiting) <= slots:
                put(queue, name, 100, weight)
        while len(running) < slots:
            name = serve(queue)
            tokens = rng.uniform(0.5, 1.5) * mean[name]
            heapq.heappush(running, (now + tokens, step, name, tokens))
        now, _, name, tokens = heapq.heappop(running)
        queue.end(name, 1, tokens - 100)
        had[name] += int(tokens)
    shares = [had[name] / weight for name, weight in zip(names, weights, strict=True)]
    index = sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))
    assert index >= 0.98, f"{had} for {weights}"


ARRIVALS = st.lists(st.tuples(st.integers(0, 4), st.floats(10, 500)), max_size=80)


@settings(deadline=None)
@given(ARRIVALS, st.integers(1, 3), st.floats(0.5, 8))
def test_queue_starves_nobody_under_any_order_of_arrivals(
    arrivals: list[tuple[int, float]], slots: int, weight: float
) -> None:
    """One request waits, and four tenants bring whatever they like, as fast as they are served."""
    queue: FairQueue[str] = FairQueue()
    running: deque[str] = deque()
    put(queue, "patient", 500, weight)
    serve(queue)  # it has had much already
    put(queue, "patient", 500, weight)
    coming = deque(arrivals)
    least = min((cost for _, cost in arrivals), default=1)
    served = 0
    while True:
        for _ in range(3):
            if coming:
                number, cost = coming.popleft()
                put(queue, f"other {number}", cost)
                coming.append((number, cost))
        if len(running) == slots:
            queue.end(running.popleft(), 1, 0)
        if (name := serve(queue)) == "patient":
            break
        running.append(name)
        served += 1
        # Each of the others may get as much as the patient one was charged for its weight, and one request more.
        assert served <= 5 * (500 / weight / least + 2)


@given(ARRIVALS)
def test_queue_tells_how_many_are_served_before_another(arrivals: list[tuple[int, float]]) -> None:
    queue: FairQueue[str] = FairQueue()
    for number, cost in arrivals:
        put(queue, f"tenant {number}", cost)
    queue.tenant("tenant 0")
    ahead = queue.ahead("tenant 0")
    put(queue, "tenant 0", 1)
    queue.tenant("tenant 0").waiting[-1] = ("mine", 1, 1)
    order = []
    while len(queue):
        order.append(serve(queue))
    # Those that are just as far may come before it or after it.
    assert order.index("mine") <= ahead
    assert ahead - order.index("mine") <= 5
