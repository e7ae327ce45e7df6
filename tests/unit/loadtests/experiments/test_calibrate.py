"""The calibration: what counts as an error, and where it ends."""

from loadtests.experiments.calibrate import errors
from loadtests.experiments.calibrate import summary as calibrated
from loadtests.generator.workload import message
from tests.loads import record


def test_calibration_holds_the_client_against_what_the_server_wrote() -> None:
    one = record(t_sched_us=0, t_send_us=2000, t_first_us=105_000, itl_us=[21_000, 40_000])
    begin = 1_000_000
    log = {
        message(0, 0, 0, 0, 80): {
            "read_us": begin + 3000,
            "written_us": [begin + 103_000, begin + 123_000, begin + 163_500],
        }
    }
    ttft, itl, lag = errors([one], log, begin)
    assert ttft == [3.0]  # 1 ms until it was read, 2 ms until its first event was
    assert itl == [1.0, 0.5]
    assert lag == [2.0]


def test_calibration_ends_at_the_first_level_that_is_too_inaccurate() -> None:
    levels = [
        {"streams": streams, "events_per_s": 50 * streams, "within": within}
        for streams, within in ((1, True), (8, True), (64, False), (128, True))
    ]
    found = calibrated(levels)
    assert (found["streams_per_worker"], found["events_per_s_per_worker"]) == (8, 400)
    assert calibrated(levels[2:])["streams_per_worker"] == 0
